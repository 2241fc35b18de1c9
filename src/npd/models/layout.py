"""How a model is built, and how many samples it may be given at once: found and proved when it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from npd.errors import UserError
from npd.models.head import AfterHead, after_head_candidates
from npd.models.rope import rope_switch

Mode = Literal["packed", "block mask", "one a row"]

MODES: dict[Mode, str] = {
    "packed": "packed rows, samples kept apart by their positions",
    "block mask": "packed rows, samples kept apart by a mask: memory grows with the square of a row",
    "one a row": "one sample a row: exact, and slower by the padding",
}
"""The ways to read, from the fastest to the one that always holds, and what each costs."""

# Families that are found not to keep packed samples apart, for what is said before anything is loaded.
BLOCK_MASK = {"afmoe", "biogpt", "falcon", "gpt_oss", "mpt", "opt", "qwen2_5_vl_text", "qwen2_vl_text", "xglm"}
ONE_A_ROW = {"bloom"}

# Disagreement that is asked for: the mean over tokens of |difference| / |hidden state|. Rounding in float32 makes 1e-6 to
# 1e-4, and samples that see each other 0.1 and more. In a model's own bfloat16 rounding alone makes a hundredth.
TOLERANCE = 1e-3
OWN_TOLERANCE = 0.04


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
    left_padding: bool = True
    """May prompts of different lengths be answered together, padded on their left under a mask?"""
    windows: tuple[tuple[str, int | None], ...] = ()
    """For block masks: kinds of layers and how many tokens they see, where the decoder takes a mask for each kind."""


_layouts: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of(model: PreTrainedModel) -> Layout:
    """A model's layout: what `prove_layout` found, else what its configuration promises."""
    if model not in _layouts:
        name = next(_decoders(model))
        _layouts[model] = Layout(
            Parts(name, None), "packed", after_head_candidates(model.config)[0], rope_switch(model.config)
        )
    return _layouts[model]


def expected_mode(config: PreTrainedConfig) -> Mode:
    """The fastest way that a model may be read, as far as its configuration says; `prove_layout` decides."""
    text = config.get_text_config()
    if has_state(config) or getattr(text, "alibi", False) or text.model_type in ONE_A_ROW:
        return "one a row"
    return "block mask" if text.model_type in BLOCK_MASK else "packed"


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


def _decoders(model: PreTrainedModel) -> Iterator[str]:
    """Names of what may be the decoder, the likeliest first."""
    names = {id(module): name for name, module in model.named_modules()}
    multimodal = model.config.get_text_config() is not model.config
    prefixed = getattr(model, model.base_model_prefix, None)
    inner = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for module in [*inner, prefixed, *children] if multimodal else [prefixed, *children, *inner]:
        if isinstance(module, nn.Module) and module is not model:
            yield names[id(module)]


def decoder_arguments(layout: Layout, decoder: Callable[..., Any], input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """What the decoder is called with for rows [R, L] whose positions restart at 0 with each sample."""
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": None, "use_cache": False}
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


def _windows(config: PreTrainedConfig) -> tuple[tuple[str, int | None], ...]:
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    return tuple((kind, window if "sliding" in kind else None) for kind in kinds)


# -- proof


class _InFloat32(TorchFunctionMode):
    """Computes in float32 with weights as they are: what is bfloat16 or float16 is widened, one tensor at a time, in use."""

    NARROW = (torch.bfloat16, torch.float16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):  # attributes, such as a weight's dtype
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self._widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in self.NARROW:
            return torch.float32
        if isinstance(value, Tensor) and value.dtype in self.NARROW:
            with torch._C.DisableTorchFunction():
                return value.to(torch.float32)
        return value


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


class _Probe(NamedTuple):
    """What a model was seen to do with samples, one at a time."""

    inputs: list[Tensor]
    """[L, D] each: what the head was given."""
    head_output: Tensor
    """[L, V] what was put in the place of the head's output for the first."""
    logits: Tensor
    """[L, V] what the model made of that."""


def _probe(model: PreTrainedModel, head: Any, samples: Sequence[Tensor]) -> _Probe:
    inputs: list[Tensor] = []
    V = head.weight.shape[0]
    # Large enough for a cap to show, and the same at every call; no generator of the run is drawn from.
    x_LV = 40 * torch.sin(torch.arange(len(samples[0]) * V, device=model.device).view(-1, V) * 0.7311)

    def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs.append(args[0].detach().float()[0])
        return x_LV[None].clone() if len(inputs) == 1 else output[..., :1]

    hook = head.register_forward_hook(take)
    try:
        logits = [model(input_ids=sample[None], use_cache=False).logits for sample in samples]
    finally:
        hook.remove()
    return _Probe(inputs, x_LV, logits[0][0].float())


def _apart(mine: Tensor, theirs: Tensor) -> float:
    """Mean over tokens of |difference| / |theirs|; NaN if either has one."""
    return float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-6)).mean())


def probe_ids(model: PreTrainedModel, length: int, start: int = 0) -> Tensor:
    """Token ids [L] to try a model with, always the same; none is special."""
    config = model.config
    # Those that stand for images mean more to a whole multimodal model than to its decoder.
    marks: set[int | None] = {
        v for name, v in config.to_dict().items() if name.endswith(("token_id", "token_index")) and isinstance(v, int)
    }
    marks.add(getattr(config.get_text_config(), "pad_token_id", None))
    usable = torch.tensor([i for i in range(min(config.get_text_config().vocab_size, 997)) if i not in marks])
    return usable[torch.arange(start, start + length) * 7 % len(usable)].to(model.device)


def _samples(model: PreTrainedModel) -> list[Tensor]:
    """Token ids of samples whose lengths differ; one passes a short window or chunk."""
    text = model.config.get_text_config()
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max([19, *(int(span) + 9 for span in spans if isinstance(span, int) and span <= 512)])
    most = rope_switch(text) or getattr(text, "max_position_embeddings", None) or longest
    samples, last = [], 0
    for length in (9, 15, min(longest, most), 4):
        samples.append(probe_ids(model, length, last))
        last += length
    return samples


@torch.no_grad()
def prove_layout(model: PreTrainedModel, name: str) -> Layout:
    """Find how a model is built and the fastest way that reads samples as it reads each alone; remembered for `layout_of`.

    It computes in float32 whatever the weights are, and compares hidden states by means over tokens.

    Raises:
        UserError: it has no decoder with a plain language-model head, or no way to read it holds.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(f"{name} ({model.config.model_type}) is not a decoder with a language-model head; it can't be used.")
    failed: Exception | None = None
    for exact in (True, False):
        try:
            with _InFloat32() if exact else _as_it_is():
                layout = _prove(model, name, head, TOLERANCE if exact else OWN_TOLERANCE)
            _layouts[model] = layout
            return layout
        except UserError:
            raise
        except Exception as error:  # kernels of one's own may know their own type alone
            failed = error
    detail = " ".join(str(failed).split())[:300]
    raise UserError(
        f"{name} ({model.config.model_type}) is not a decoder with a plain language-model head "
        f"({type(failed).__name__}: {detail}); it can't be used."
    ) from failed


def _prove(model: PreTrainedModel, name: str, head: nn.Module, tolerance: float) -> Layout:
    samples = _samples(model)
    probe = _probe(model, head, samples)
    who = f"{name} ({model.config.model_type})"
    if not all(bool(x.isfinite().all()) for x in probe.inputs):
        raise UserError(f"{who} computes hidden states that are not finite: its weights are damaged. Restore them.")
    after = _prove_head(who, head, after_head_candidates(model.config), probe, tolerance)
    ladder: list[Mode] = ["one a row"] if has_state(model.config) else list(MODES)
    parts, found = _find_parts(model, head, samples, probe, tolerance)
    if parts is None:
        raise UserError(
            f"{who} has hidden states that npd cannot read by themselves: they differ by {found:.2g} from what its "
            "language-model head is given. It can't be used."
        )
    padded = _apart_padded(model, head, samples, probe) <= tolerance
    layout = Layout(parts, "packed", after, rope_switch(model.config), left_padding=padded)
    differences = {}
    for mode in ladder:
        for windows in ((), _windows(model.config)) if mode == "block mask" else ((),):
            tried = replace(layout, mode=mode, windows=windows)
            try:
                difference = max(map(_apart, _read(model, tried, samples), probe.inputs))
            except Exception as error:  # a decoder that takes no positions, or no mask of this shape
                difference, differences[mode] = float("nan"), type(error).__name__
            else:
                differences[mode] = f"{difference:.2g}"
            if difference <= tolerance:
                return tried
    told = ", ".join(f"{mode}: {value}" for mode, value in differences.items())
    raise UserError(
        f"{who}, attention {model.config._attn_implementation}: read with others, a sample differs from itself alone by more "
        f"than {tolerance:g} of its hidden states, in whatever way it is read ({told}). Choose another attention "
        "implementation."
    )


def _prove_head(who: str, head: Any, candidates: list[AfterHead], probe: _Probe, tolerance: float) -> AfterHead:
    x_LD = probe.inputs[0].to(head.weight.device)
    bias = getattr(head, "bias", None)
    theirs = head(x_LD.to(head.weight.dtype)).float()
    mine = F.linear(x_LD, head.weight.float(), None if bias is None else bias.float())
    if not _apart(mine, theirs) <= tolerance:
        raise UserError(
            f"{who} has a language-model head that is not one plain matrix; npd cannot learn from it or train it."
        )
    differences = {after: _apart(after(probe.head_output), probe.logits) for after in candidates}
    after, difference = min(differences.items(), key=lambda pair: pair[1])
    if not difference <= tolerance:
        raise UserError(
            f"{who} changes its logits after the language-model head in a way that npd does not know (they differ by "
            f"{difference:.2g} of their size from what its configuration says: {after}); its loss would be wrong."
        )
    return after


def _apart_padded(model: PreTrainedModel, head: nn.Module, samples: list[Tensor], probe: _Probe) -> float:
    """How far samples are from themselves alone when they are padded on the left, as generation pads prompts."""
    width = max(map(len, samples))
    ids = torch.stack([F.pad(sample, (width - len(sample), 0)) for sample in samples])
    mask = torch.stack([F.pad(torch.ones_like(sample), (width - len(sample), 0)) for sample in samples])
    given: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        given.append(args[0].detach().float())
        return output[..., :1]

    hook = head.register_forward_hook(take)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    try:
        model(**_accepted(model.forward, arguments), use_cache=False)
    except Exception:
        return float("inf")
    finally:
        hook.remove()
    return max(_apart(given[0][i, width - len(s) :], probe.inputs[i]) for i, s in enumerate(samples))


def _find_parts(
    model: PreTrainedModel, head: nn.Module, samples: list[Tensor], probe: _Probe, tolerance: float
) -> tuple[Parts | None, float]:
    """The decoder, and what is between it and the head; None with the least difference where nothing fits."""
    nearest = float("inf")
    for decoder in dict.fromkeys(_decoders(model)):
        between = [n for n, child in model.named_children() if child is not head and n != decoder.split(".")[0]]
        for before in (None, *between):
            layout = Layout(Parts(decoder, before), "one a row")
            try:
                [mine, *_] = _read(model, layout, samples[:1])
            except Exception:
                continue
            if mine.shape != probe.inputs[0].shape:
                continue
            difference = _apart(mine, probe.inputs[0])
            if difference <= tolerance:
                return layout.parts, difference
            nearest = min(nearest, difference)
    return None, nearest


def _read(model: PreTrainedModel, layout: Layout, samples: list[Tensor]) -> list[Tensor]:
    """Hidden states [L, D] of each sample, read together as a layout says."""
    from npd.models.reading import apply_layout

    if layout.mode == "one a row":
        rows = [[i] for i in range(len(samples))]
    else:
        # Two rows: some attention implementations keep samples apart in a single row only.
        rows = [list(range(len(samples))), list(range(len(samples)))[::-1]]
    length = max(sum(len(samples[i]) for i in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=model.device)
    positions = torch.zeros_like(ids)
    where: dict[int, tuple[int, int]] = {}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            where[i] = (r, at)
            ids[r, at : at + len(samples[i])] = samples[i]
            positions[r, at : at + len(samples[i])] = torch.arange(len(samples[i]))
            at += len(samples[i])
        positions[r, at:] = torch.arange(length - at)
    hidden = apply_layout(model, layout, ids, positions).float()
    return [hidden[where[i][0], where[i][1] : where[i][1] + len(sample)] for i, sample in enumerate(samples)]
