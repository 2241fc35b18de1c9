"""Where models run, and in which precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from npd.config import ModelConfig, StudentConfig

_placed: torch.device | None = None


def use_device(name: str | None) -> None:
    """Make this process's models run on a device; None: the first CUDA device if there is one, else the CPU."""
    global _placed
    _placed = None if name is None else torch.device(name)
    if _placed is not None and _placed.type == "cuda":
        torch.cuda.set_device(_placed)


def device() -> torch.device:
    """The device that models run on where nothing else is said."""
    return _placed or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16(on: str | None = None) -> bool:
    """Has a device (default `device()`) bfloat16 arithmetic of its own? Older GPUs only emulate it."""
    return torch.device(on or device()).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(config: ModelConfig, *, trained: bool, on: str | None = None, half: bool | None = None) -> torch.dtype:
    """The type of a model's weights. `auto` takes bfloat16 only where the device is fast at it, so never on a CPU.

    Args:
        half: is it, of a device that is not here? None: as `on` is.

    What the optimiser updates is float32: steps of 1e-5 vanish in the rounding of bfloat16, and float16 overflows.
    """
    frozen_base = isinstance(config, StudentConfig) and config.adapts
    if trained and not frozen_base:
        return torch.float32
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if (fast_bfloat16(on) if half is None else half) else torch.float32


def to_host(tensor: Tensor) -> Tensor:
    """A copy in CPU memory; of what is on a GPU in page-locked memory, complete only after `torch.cuda.synchronize()`."""
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False).copy_(
        tensor.detach(), non_blocking=True
    )


@torch.no_grad()
def move(tensors: Iterable[Tensor], device: torch.device | str) -> None:
    """Put tensors elsewhere, in place: whoever holds them finds them there. Those on a GPU go to page-locked memory."""
    target = torch.device(device)
    moved = [(tensor, to_host(tensor) if target.type == "cpu" else tensor.data) for tensor in tensors]
    finish_copies()
    for tensor, data in moved:
        tensor.data = data.to(target, non_blocking=True)


def finish_copies() -> None:
    """Wait until what `to_host` began is there."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]
