"""How a model is built, and how many samples it may be given at once: found and proved when it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from npd.attention import end_to_end
from npd.models.head import AfterHead, after_head_candidates
from npd.models.rope import rope_switch

Mode = Literal["varlen", "packed", "block mask", "one a row"]

MODES: dict[Mode, str] = {
    "varlen": "samples end to end, without padding or masks",
    "packed": "packed rows, samples kept apart by their positions",
    "block mask": "packed rows, samples kept apart by a mask: memory grows with the square of a row",
    "one a row": "one sample a row: exact, and slower by the padding",
}
"""The ways to read, from the fastest to the one that always holds, and what each costs."""

# Families that are found not to keep packed samples apart, for what is said before anything is loaded.
BLOCK_MASK = {"afmoe", "biogpt", "falcon", "gpt_oss", "mpt", "opt", "qwen2_5_vl_text", "qwen2_vl_text", "xglm"}
ONE_A_ROW = {"bloom"}
OWN_ATTENTION = "it computes attention in a way of its own"
DROPS = "its layers drop arguments that its attention needs"
NOT_VARLEN = {
    **dict.fromkeys(("bloom", "codegen", "doge", "falcon", "gpt_neo", "gptj", "mpt", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("nemotron", "stablelm"), DROPS),
    "gpt_oss": "its attention has sinks",
}
STATE = "something runs along its rows whatever the mask"


class Parts(NamedTuple):
    """The pieces of a model that npd calls by themselves, by their names in it."""

    decoder: str
    """From token ids to hidden states."""
    before_head: str | None
    """Between the decoder and the head."""


@dataclass(frozen=True)
class Layout:
    """How a model is read."""

    parts: Parts
    mode: Mode = "packed"
    after_head: AfterHead = field(default_factory=AfterHead)
    switch: int | None = None
    """See `npd.models.rope.rope_switch`."""
    windows: tuple[tuple[str, int | None], ...] = ()
    """For block masks: kinds of layers and how many tokens they see, where the decoder takes a mask for each kind."""
    why: str = ""
    """Why it is not read end to end, where that was tried."""


_layouts: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def remember_layout(model: PreTrainedModel, layout: Layout) -> None:
    """What `layout_of` says of a model from now on."""
    _layouts[model] = layout


def layout_of(model: PreTrainedModel) -> Layout:
    """A model's layout: what `prove_layout` found, else what its configuration promises."""
    if model not in _layouts:
        name = next(decoder_names(model))
        _layouts[model] = Layout(
            Parts(name, None), "packed", after_head_candidates(model.config)[0], rope_switch(model.config)
        )
    return _layouts[model]


def expected_mode(config: PreTrainedConfig, attention: str = "auto") -> Mode:
    """The fastest way that a model may be read, as far as its configuration says; `prove_layout` decides."""
    if attention == "auto" and not _hinders(config):
        return "varlen"
    text = config.get_text_config()
    if has_state(config) or getattr(text, "alibi", False) or text.model_type in ONE_A_ROW:
        return "one a row"
    return "block mask" if text.model_type in BLOCK_MASK else "packed"


def expected_reading(config: PreTrainedConfig, attention: str = "auto") -> str:
    """`expected_mode` in words, with the reason where it is not the fastest."""
    words = MODES[expected_mode(config, attention)]
    reason = _hinders(config) if attention == "auto" else f"attention is {attention}"
    return f"{words} (not end to end: {reason})" if reason else words


def _hinders(config: PreTrainedConfig) -> str:
    """What keeps a model from being read end to end, as far as its configuration says; else nothing."""
    text = config.get_text_config()
    if has_state(config):
        return STATE
    if getattr(text, "alibi", False):
        return "its attention has a bias by position"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention is soft-capped"
    return NOT_VARLEN.get(text.model_type, "")


def has_state(config: PreTrainedConfig) -> bool:
    """Does something run along a row whatever the mask: recurrent or convolutional layers, or chunks of positions?"""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    attends = all("attention" in kind and "linear" not in kind and "compressed" not in kind for kind in kinds)
    return "chunked_attention" in kinds or not attends or _stateful(text)


def _stateful(config: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return False
    return bool(getattr(kind, "_is_stateful", False))


def decoder_names(model: PreTrainedModel) -> Iterator[str]:
    """Names of what may be the decoder, the likeliest first."""
    names = {id(module): name for name, module in model.named_modules()}
    multimodal = model.config.get_text_config() is not model.config
    prefixed = getattr(model, model.base_model_prefix, None)
    inner = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for module in [*inner, prefixed, *children] if multimodal else [prefixed, *children, *inner]:
        if isinstance(module, nn.Module) and module is not model:
            yield names[id(module)]


def decoder_arguments(
    layout: Layout,
    decoder: Callable[..., Any],
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seq_lens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """What the decoder is called with for rows [R, L] whose positions restart at 0 with each sample."""
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": None, "use_cache": False}
    if layout.mode == "varlen":
        if cu_seq_lens is None or lengths is None:
            flat = position_ids.flatten()
            ends = (flat == 0).nonzero()[1:, 0].tolist()
            lengths = [end - start for start, end in zip([0, *ends], [*ends, len(flat)], strict=True)]
            cu_seq_lens = torch.tensor([0, *ends, len(flat)], dtype=torch.int32, device=flat.device)
        arguments |= {"position_ids": position_ids, **end_to_end(cu_seq_lens, lengths, compiled=compiled)}
        return _accepted(getattr(decoder, "forward", decoder), arguments)
    if layout.mode == "packed":
        # transformers separates packed samples only with no mask and no cache: with either, attention leaks in silence.
        return arguments | {"position_ids": position_ids}
    if layout.mode == "block mask":
        arguments |= {"position_ids": position_ids, "attention_mask": _block_mask(layout, decoder, position_ids)}
    else:
        # Causal, so what is right of a sample changes nothing in it: neither mask nor positions of the padding.
        arguments["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return _accepted(getattr(decoder, "forward", decoder), arguments)


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes."""
    taken = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in taken}


def _block_mask(layout: Layout, decoder: Any, position_ids: Tensor) -> Any:
    """Masks in which a token sees those of its own sample up to itself: [R, 1, L, L], for each kind of layer if need be."""
    sample_RL = (position_ids == 0).cumsum(-1)
    at_L = torch.arange(position_ids.shape[1], device=position_ids.device)
    back_LL = at_L[:, None] - at_L
    seen = ((sample_RL[:, :, None] == sample_RL[:, None, :]) & (back_LL >= 0))[:, None]
    weight = next(decoder.parameters())
    eager = decoder.config._attn_implementation == "eager"

    def within(window: int | None) -> Tensor:
        mask = seen if window is None else seen & (back_LL < window)
        if not eager:
            return mask
        return torch.zeros_like(mask, dtype=weight.dtype).masked_fill(~mask, torch.finfo(weight.dtype).min)

    if not layout.windows:
        return within(None)
    return {kind: within(window) for kind, window in layout.windows}


def windows_of(config: PreTrainedConfig) -> tuple[tuple[str, int | None], ...]:
    """`Layout.windows` as a configuration says."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    return tuple((kind, window if "sliding" in kind else None) for kind in kinds)


def probe_ids(model: PreTrainedModel, length: int, start: int = 0) -> Tensor:
    """Token ids [L] to try a model with, always the same; none is special."""
    config = model.config
    # Those that stand for images mean more to a whole multimodal model than to its decoder.
    values = config.to_dict().items()
    marks = {v for name, v in values if name.endswith(("token_id", "token_index")) and isinstance(v, int)}
    marks.add(getattr(config.get_text_config(), "pad_token_id", None) or 0)
    usable = torch.tensor([i for i in range(min(config.get_text_config().vocab_size, 997)) if i not in marks])
    return usable[torch.arange(start, start + length) * 7 % len(usable)].to(model.device)
