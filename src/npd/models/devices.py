"""Where models run, and in which precision."""

from __future__ import annotations

import torch

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


def resolve_dtype(config: ModelConfig, *, trained: bool, on: str | None = None) -> torch.dtype:
    """The type of a model's weights. `auto` takes bfloat16 only where the device is fast at it, so never on a CPU.

    What the optimiser updates is float32: steps of 1e-5 vanish in the rounding of bfloat16, and float16 overflows.
    """
    frozen_base = isinstance(config, StudentConfig) and config.lora is not None
    if trained and not frozen_base:
        return torch.float32
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if fast_bfloat16(on) else torch.float32
