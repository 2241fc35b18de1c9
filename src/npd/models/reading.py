"""Packed rows through a decoder, and whether it reads them sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from npd.errors import UserError
from npd.models.devices import device

# Numerical agreement asked of a packed row at load. Attention that leaks across samples differs by 0.3 and more.
PACKED_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.25, torch.float16: 0.05}


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, decoder: Callable[..., Any] | None = None
) -> Tensor:
    """Last hidden states [R, L, D] of packed rows [R, L]; `position_ids` restart at 0 with each sample.

    transformers separates packed samples only with no mask and no cache: with either, attention leaks in silence.
    `decoder` is called in place of the model's own, for instance a compiled one.
    """
    return (decoder or backbone(model))(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state


def check_compiler() -> None:
    """See that torch.compile works on this machine, which needs a compiler for C++, or Triton on a GPU.

    Raises:
        UserError: it does not.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device()))
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"training.compile is true, but torch.compile does not work here ({type(error).__name__}: {detail}). Install "
            f"{'Triton' if device().type == 'cuda' else 'a C++ compiler (g++ or clang)'}, or set training.compile: false."
        ) from error


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head."""
    inner = base_model(model)
    return getattr(inner, inner.base_model_prefix)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft model (adapters stay in place), or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def head_weight(model: nn.Module) -> Tensor:
    """The language-model head's weight [V, D]."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not hidden @ head.T, or whose packed rows differ from their samples alone."""
    ids = torch.arange(24, device=model.device) * 7 % min(model.config.get_text_config().vocab_size, 997)
    first, second = ids[:9], ids[9:]
    positions = torch.cat([torch.arange(9), torch.arange(15)]).to(ids)
    try:
        # Two rows: some attention implementations keep samples apart in a single row only.
        rows = hidden_states(model, torch.stack([ids.flip(0), ids]), torch.stack([positions, positions]))
        packed = rows[1] @ head_weight(model).T
    except (AttributeError, TypeError) as error:
        raise UserError(f"{name} is not a decoder with a plain language-model head ({error}); it can't be used.") from error
    alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in (first, second)]
    tolerance = PACKED_TOLERANCE.get(model.dtype, 0.25) * max(1.0, float(alone[0].float().std()))
    differences = [
        float((mine.float() - theirs.float()).abs().max()) for mine, theirs in zip(packed.split([9, 15]), alone, strict=True)
    ]
    if differences[0] > tolerance:
        raise UserError(
            f"{name} ({model.config.model_type}) changes its logits after the language-model head (soft-capping, scaling "
            f"or a bias: they differ by {differences[0]:.2g}), which npd's loss does not support."
        )
    if differences[1] > tolerance:
        raise UserError(
            f"{name} ({model.config.model_type}, attention {model.config._attn_implementation}) mixes samples that share a "
            f"row: logits differ by {differences[1]:.2g} from the sample read alone. Choose another attention implementation."
        )
