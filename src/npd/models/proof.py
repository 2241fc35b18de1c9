"""That a model is read and written with rightly: found when it is loaded, by comparing with each sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from npd.attention import NAME as VARLEN
from npd.attention import NotEndToEnd
from npd.errors import UserError
from npd.models.head import AfterHead, after_head_candidates
from npd.models.layout import (
    MODES,
    OWN_ATTENTION,
    STATE,
    Layout,
    Mode,
    Parts,
    decoder_names,
    has_state,
    probe_ids,
    remember_layout,
    windows_of,
)
from npd.models.reading import apply_layout
from npd.models.rope import rope_switch

# Disagreement that is asked for: the mean over tokens of |difference| / |hidden state|. Rounding in float32 makes 1e-6 to
# 1e-4, and samples that see each other 0.1 and more. In a model's own bfloat16 rounding alone makes a hundredth.
TOLERANCE = 1e-3
OWN_TOLERANCE = 0.04


class InFloat32(TorchFunctionMode):
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


def apart(mine: Tensor, theirs: Tensor) -> float:
    """Mean over tokens of |difference| / |theirs|; NaN if either has one."""
    return float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-6)).mean())


def samples_for(model: PreTrainedModel) -> list[Tensor]:
    """Token ids of samples whose lengths differ; one passes a short window or chunk."""
    text = model.config.get_text_config()
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max([19, *(int(span) + 9 for span in spans if isinstance(span, int) and span <= 512)])
    switch = rope_switch(text)
    most = switch - 4 if switch else getattr(text, "max_position_embeddings", None) or longest
    samples, last = [], 0
    for length in (min(length, most) for length in (9, 15, longest, 4)):
        samples.append(probe_ids(model, length, last))
        last += length
    return samples


@torch.no_grad()
def prove_layout(model: PreTrainedModel, name: str, *, varlen: bool = False) -> Layout:
    """Find how a model is built and the fastest way that reads samples as it reads each alone; remembered for `layout_of`.

    It computes in float32 whatever the weights are, and compares hidden states by means over tokens.

    Args:
        varlen: try `npd.attention` too, and leave the model with it where it holds. A model that has it already is tried
            with it in any case.

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
            with InFloat32() if exact else nullcontext():
                layout = _prove(model, name, head, TOLERANCE if exact else OWN_TOLERANCE, varlen)
            remember_layout(model, layout)
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


def _prove(model: PreTrainedModel, name: str, head: nn.Module, tolerance: float, varlen: bool) -> Layout:
    samples = samples_for(model)
    probe = _probe(model, head, samples)
    who = f"{name} ({model.config.model_type})"
    if not all(bool(x.isfinite().all()) for x in probe.inputs):
        raise UserError(f"{who} computes hidden states that are not finite: its weights are damaged. Restore them.")
    after = _prove_head(who, head, after_head_candidates(model.config), probe, tolerance)
    ladder: list[Mode] = ["one a row"] if has_state(model.config) else [mode for mode in MODES if mode != "varlen"]
    parts, found = _find_parts(model, head, samples, probe, tolerance)
    if parts is None:
        raise UserError(
            f"{who} has hidden states that npd cannot read by themselves: they differ by {found:.2g} from what its "
            "language-model head is given. It can't be used."
        )
    layout = Layout(parts, "packed", after, rope_switch(model.config))
    layout = _try_varlen(model, layout, samples, probe, tolerance, wanted=varlen)
    if layout.mode == "varlen":
        return layout
    differences = {}
    for mode in ladder:
        for windows in ((), windows_of(model.config)) if mode == "block mask" else ((),):
            tried = replace(layout, mode=mode, windows=windows)
            try:
                difference = max(map(apart, _read(model, tried, samples), probe.inputs))
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


def _try_varlen(
    model: PreTrainedModel, layout: Layout, samples: list[Tensor], probe: _Probe, tolerance: float, *, wanted: bool
) -> Layout:
    """The layout that reads samples end to end, with the model left to compute so; else the given one with the reason."""
    config: Any = getattr(model.get_submodule(layout.parts.decoder), "config", model.config)
    started = config._attn_implementation
    if started != VARLEN and not wanted:
        return layout
    if started not in (VARLEN, "sdpa"):
        return replace(layout, why=OWN_ATTENTION)
    if has_state(model.config):
        config._attn_implementation = "sdpa"
        return replace(layout, why=STATE)
    tried = replace(layout, mode="varlen")
    config._attn_implementation = VARLEN
    try:
        difference = max(map(apart, _read(model, tried, samples), probe.inputs))
    except NotEndToEnd as reason:
        why = str(reason)
    except Exception as error:  # a decoder that looks into its mask
        why = f"it cannot be called so ({type(error).__name__})"
    else:
        if difference <= tolerance:
            return tried
        why = f"read so, a sample differs from itself alone by {difference:.2g} of its hidden states"
    config._attn_implementation = "sdpa"
    return replace(layout, why=why)


def _prove_head(who: str, head: Any, candidates: list[AfterHead], probe: _Probe, tolerance: float) -> AfterHead:
    x_LD = probe.inputs[0].to(head.weight.device)
    bias = getattr(head, "bias", None)
    theirs = head(x_LD.to(head.weight.dtype)).float()
    mine = F.linear(x_LD, head.weight.float(), None if bias is None else bias.float())
    if not apart(mine, theirs) <= tolerance:
        raise UserError(
            f"{who} has a language-model head that is not one plain matrix; npd cannot learn from it or train it."
        )
    differences = {after: apart(after(probe.head_output), probe.logits) for after in candidates}
    after, difference = min(differences.items(), key=lambda pair: pair[1])
    if not difference <= tolerance:
        raise UserError(
            f"{who} changes its logits after the language-model head in a way that npd does not know (they differ by "
            f"{difference:.2g} of their size from what its configuration says: {after}); its loss would be wrong."
        )
    return after


def _find_parts(
    model: PreTrainedModel, head: nn.Module, samples: list[Tensor], probe: _Probe, tolerance: float
) -> tuple[Parts | None, float]:
    """The decoder, and what is between it and the head; None with the least difference where nothing fits."""
    nearest = float("inf")
    for decoder in dict.fromkeys(decoder_names(model)):
        between = [n for n, child in model.named_children() if child is not head and n != decoder.split(".")[0]]
        for before in (None, *between):
            layout = Layout(Parts(decoder, before), "one a row")
            try:
                [mine, *_] = _read(model, layout, samples[:1])
            except Exception:
                continue
            if mine.shape != probe.inputs[0].shape:
                continue
            difference = apart(mine, probe.inputs[0])
            if difference <= tolerance:
                return layout.parts, difference
            nearest = min(nearest, difference)
    return None, nearest


def _read(model: PreTrainedModel, layout: Layout, samples: list[Tensor]) -> list[Tensor]:
    """Hidden states [L, D] of each sample, read together as a layout says."""
    if layout.mode == "one a row":
        rows = [[i] for i in range(len(samples))]
    elif layout.mode == "varlen":
        rows = [list(range(len(samples)))]
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
