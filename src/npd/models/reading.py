"""Samples through a decoder, in rows that it reads as it would read each sample alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from npd.attention import without_kernel
from npd.config import ModelConfig
from npd.errors import UserError
from npd.models.devices import device
from npd.models.head import AfterHead
from npd.models.layout import MODES, Layout, decoder_arguments, layout_of
from npd.models.rope import split_at
from npd.packing import end_to_end, short_rows


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    decoder: Callable[..., Any] | None = None,
    *,
    cu_seq_lens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """What the language-model head is given, [R, L, D], for rows [R, L]; `position_ids` restart at 0 with each sample.

    Rows are those of `batches_for`: how many samples one may hold follows from the model (see `npd.models.layout`).

    Args:
        decoder: called in place of the model's own, for instance a compiled one.
        cu_seq_lens, lengths: as in `npd.packing.Packed`; without them, a model that needs them asks its device for
            `position_ids`, and waits.
    """
    base = base_model(model)
    return apply_layout(base, layout_of(base), input_ids, position_ids, decoder, cu_seq_lens, lengths)


def apply_layout(
    base: PreTrainedModel,
    layout: Layout,
    input_ids: Tensor,
    position_ids: Tensor,
    decoder: Callable[..., Any] | None = None,
    cu_seq_lens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`hidden_states` by a given layout."""
    own = base.get_submodule(layout.parts.decoder)
    arguments = decoder_arguments(layout, own, input_ids, position_ids, cu_seq_lens, lengths, compiled=decoder is not None)
    hidden = (decoder or own)(**arguments).last_hidden_state
    if layout.parts.before_head is not None:
        hidden = base.get_submodule(layout.parts.before_head)(hidden)
    return hidden


def batches_for(
    models: nn.Module | Sequence[nn.Module], lengths: Sequence[int], tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    """All samples in batches of rows that every one of the models reads rightly, each batch with the length of its rows.

    As `npd.packing.end_to_end` where every model reads so; else as `npd.packing.short_rows`, but one sample a row where a
    model needs it. Never are samples in one batch that would change what each other's positions mean.
    """
    layouts = [layout_of(base_model(m)) for m in ([models] if isinstance(models, nn.Module) else models)]
    alone = any(layout.mode == "one a row" for layout in layouts)
    unpadded = all(layout.mode == "varlen" for layout in layouts)
    for group in split_at(lengths, {layout.switch for layout in layouts if layout.switch is not None}):
        sizes = [lengths[i] for i in group]
        for rows, length in end_to_end(sizes, tokens) if unpadded else short_rows(sizes, tokens, alone=alone):
            yield [[group[i] for i in row] for row in rows], length


def reading_note(model: nn.Module, config: ModelConfig) -> str:
    """What a person should know where a model is not read in the fastest way, though `attention` leaves that open."""
    layout = layout_of(base_model(model))
    if config.attention != "auto":
        return ""
    if layout.mode != "varlen":
        return f"{config.model} is read as {MODES[layout.mode]}" + (
            f" (not end to end: {layout.why})." if layout.why else "."
        )
    on_gpu = next(model.parameters()).device.type == "cuda"
    lacks = without_kernel() if on_gpu else ""
    return f"{config.model} is read sample by sample, which is slower on a GPU: {lacks}." if lacks else ""


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
    base = base_model(model)
    return base.get_submodule(layout_of(base).parts.decoder)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a family keeps in one piece, mostly decoder layers, inner ones first; none that holds the head's
    weight, which the loss reads by itself."""
    base = base_model(model)
    names, head = set(base._no_split_modules or ()), base.get_output_embeddings().weight
    found = [m for m in model.modules() if type(m).__name__ in names and all(p is not head for p in m.parameters())]
    return found[::-1]


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft model (adapters stay in place), or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def head_weight(model: nn.Module) -> Tensor:
    """The language-model head's weight [V, D]."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


def head_bias(model: nn.Module) -> Tensor | None:
    """The language-model head's bias [V], if it has one."""
    return getattr(model.get_output_embeddings(), "bias", None)  # type: ignore[operator]


def after_head_of(model: nn.Module) -> AfterHead:
    """What makes logits of the head's output."""
    return layout_of(base_model(model)).after_head
