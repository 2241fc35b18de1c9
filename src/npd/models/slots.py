"""Sequences that a model goes on with side by side, each at a position of its own: what continuous batching needs.

transformers' own (`generate_batch`) reads all running sequences as one row under a mask of all of them by all of them, and
takes nearly all memory for its cache: measured on a CPU it is no faster than `generate()`, and a seventh as fast as this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from npd.attention import NAME as VARLEN
from npd.models.layout import decoder_arguments, has_state, layout_of, windows_of
from npd.models.proof import OWN_TOLERANCE, TOLERANCE, InFloat32, apart, samples_for
from npd.models.reading import base_model
from npd.models.rope import rope_switch

ROUND = 64
"""Positions by which the cache grows and masks widen: kernels want even shapes, and allocators few of them."""
PREFILL_TOKENS = 8192
"""Prompt tokens that are read at once, unless one prompt has more."""

Windows = tuple[tuple[str, int | None], ...]


class Continuing(NamedTuple):
    """How a model goes on from a cache of slots, or why it cannot."""

    why_not: str | None = None
    windows: Windows = ()
    """As `Layout.windows`, with the kind "" where all layers take one mask."""
    longest: int | None = None
    """Most tokens of a sequence for which that was proved; None: any number."""


class _Cache(Cache):
    """Keys and values [S, H, L, D] of each layer; a sequence's lie from 0 to where it stands."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: dict[int, list[Tensor]] = {}
        self.fresh: dict[int, list[Tensor]] | None = None
        """What prompts that are being read have, until they are placed; None while sequences go on."""
        self.rows = self.at = torch.empty(0)
        self.length = 0
        """Positions that are seen in this step."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.fresh is not None:
            self.fresh[layer_idx] = [key_states, value_states]
            return key_states, value_states
        kept = self.kept[layer_idx]
        for mine, theirs in zip(kept, (key_states, value_states), strict=True):
            mine[self.rows, :, self.at] = theirs[:, :, 0].to(mine.dtype)
        keys, values = (mine[:, :, : self.length] for mine in kept)
        return keys, values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self.fresh is not None else self.length - 1

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return (int(query_length) if self.fresh is not None else self.length), 0


class Slots:
    """`count` sequences; those in use are known to the caller."""

    def __init__(self, model: Any, count: int, windows: Windows = ()) -> None:
        self.model: Any = base_model(model)
        self.windows = windows
        self.device = self.model.device
        self.layout = layout_of(self.model)
        self.decoder = self.model.get_submodule(self.layout.parts.decoder)
        self.at_S = torch.zeros(count, dtype=torch.long, device=self.device)
        """Where each one's next token goes."""
        self._rows_S = torch.arange(count, device=self.device)
        self._cache = _Cache()

    def __len__(self) -> int:
        return len(self.at_S)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """What the head is given behind each prompt, [P, D]; kept for `place` until the next call."""
        width = max(map(len, prompts))
        ids_PL = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        # Causal, so what is right of a prompt changes nothing in it.
        positions_PL = torch.arange(width, device=self.device).expand_as(ids_PL)
        self._cache.fresh = {}
        last_P = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        hidden_PLD = self._decode(ids_PL, positions_PL, None)
        return self._before_head(hidden_PLD[torch.arange(len(prompts), device=self.device), last_P][:, None])[:, 0]

    def place(self, slots: Sequence[int], which: Sequence[int], lengths: Sequence[int]) -> None:
        """Let sequences in `slots` go on from the prompts `which` of the last `read`, which have these `lengths`."""
        assert self._cache.fresh is not None, "prompts are read first"
        slots_N, which_N = (torch.tensor(list(x), device=self.device) for x in (slots, which))
        width = max(lengths)
        for layer, fresh in self._cache.fresh.items():
            kept = self._cache.kept.setdefault(layer, [x.new_zeros(len(self), x.shape[1], 0, x.shape[3]) for x in fresh])
            for i, new in enumerate(fresh):
                kept[i] = _grown(kept[i], width)
                kept[i][slots_N, :, :width] = new[which_N, :, :width]
        self.at_S[slots_N] = torch.tensor(list(lengths), device=self.device)

    def step(self, tokens_S: Tensor, longest: int) -> Tensor:
        """One token more in every slot; what the head is given behind it, [S, D].

        `longest`: tokens of the longest sequence in use, this one included. Slots that are not in use compute something.
        """
        cache = self._cache
        cache.fresh, cache.rows = None, self._rows_S
        cache.length = length = -(-longest // ROUND) * ROUND
        for kept in cache.kept.values():
            for i, tensor in enumerate(kept):
                kept[i] = _grown(tensor, length)
        cache.at = at_S = self.at_S.clamp(max=length - 1)
        hidden_SD = self._before_head(self._decode(tokens_S[:, None], at_S[:, None], self._mask(at_S, length)))[:, 0]
        self.at_S = self.at_S + 1
        return hidden_SD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits [N, V] of what the head is given."""
        logits: Tensor = self.layout.after_head(self.model.get_output_embeddings()(hidden_ND).float())
        return logits

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all others; these come to stand in this order."""
        index = torch.tensor(list(slots), device=self.device)
        for kept in self._cache.kept.values():
            for i, tensor in enumerate(kept):
                kept[i] = tensor[index]
        self.at_S, self._rows_S = self.at_S[index], self._rows_S[: len(index)]

    def _decode(self, ids: Tensor, positions: Tensor, mask: Any) -> Tensor:
        arguments = {"attention_mask": mask, "past_key_values": self._cache, "use_cache": True}
        # Of rows that are read end to end it takes what it takes of packed ones: the mask here is one of its own.
        layout = replace(self.layout, mode="packed") if self.layout.mode == "varlen" else self.layout
        taken = decoder_arguments(layout, self.decoder, ids, positions)
        hidden: Tensor = self.decoder(**taken | {"input_ids": ids, "position_ids": positions} | arguments).last_hidden_state
        return hidden

    def _before_head(self, hidden_NLD: Tensor) -> Tensor:
        name = self.layout.parts.before_head
        return hidden_NLD if name is None else self.model.get_submodule(name)(hidden_NLD)

    def _mask(self, at_S: Tensor, length: int) -> Any:
        back_SL = at_S[:, None] - torch.arange(length, device=self.device)
        eager = self.decoder.config._attn_implementation == "eager"

        def within(window: int | None) -> Tensor:
            seen = ((back_SL >= 0) if window is None else (back_SL >= 0) & (back_SL < window))[:, None, None]
            if not eager:
                return seen
            kept = next(iter(self._cache.kept.values()))[0]
            return torch.zeros_like(seen, dtype=kept.dtype).masked_fill(~seen, torch.finfo(kept.dtype).min)

        if not self.windows:
            return within(None)
        if self.windows[0][0] == "":
            return within(self.windows[0][1])
        return {kind: within(window) for kind, window in self.windows}


def _grown(tensor: Tensor, length: int) -> Tensor:
    """[S, H, L, D] with room for `length` positions."""
    missing = length - tensor.shape[2]
    return tensor if missing <= 0 else F.pad(tensor, (0, 0, 0, -(-missing // ROUND) * ROUND))


def _grouped(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """sdpa, where one token at a time reads grouped keys as they are; transformers would copy them for every head."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    plain = kwargs.get("position_bias") is None and kwargs.get("cache") is None and not kwargs.get("dropout")
    mask = attention_mask
    if query.shape[2] != 1 or groups == 1 or not plain or not isinstance(mask, Tensor) or mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query = query.reshape(len(query), key.shape[1], groups, query.shape[3])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return out.reshape(len(out), 1, heads, value.shape[3]), None


GROUPED = "npd_grouped"
AttentionInterface.register(GROUPED, _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def going_on(model: Any) -> Iterator[None]:
    """Around everything that is done with `Slots`: attention as it is fastest there."""
    base = base_model(model)
    configs = {id(m.config): m.config for m in base.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    before = [(config, name) for config, name in before if name in ("sdpa", VARLEN)]
    for config, _ in before:
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


# -- the proof


def expected_continuing(config: PreTrainedConfig) -> str | None:
    """Why a model will not go on in slots, as far as its configuration says; `continuing` decides."""
    if has_state(config):
        return "it has recurrent layers, or attention in chunks"
    if rope_switch(config) is not None:
        return "the meaning of its positions changes with the length of a sequence"
    if getattr(config.get_text_config(), "alibi", False) or config.get_text_config().model_type == "bloom":
        return "its positions are biases of attention that follow from where a mask begins"
    return None


def continuing(model: Any) -> Continuing:
    """Whether and how a model goes on in slots as it would read each sequence alone; found once a kind of model."""
    base = base_model(model)
    key = (type(base), base.config.to_json_string(), base.dtype, base.device.type, base.config._attn_implementation)
    if key not in _found:
        _found[key] = _find(base)
    return _found[key]


_found: dict[Any, Continuing] = {}


def _find(model: PreTrainedModel) -> Continuing:
    why_not = expected_continuing(model.config)
    if why_not is not None:
        return Continuing(why_not)
    samples = samples_for(model)
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = windows_of(model.config)
    candidates: list[Windows] = [kinds] if any("sliding" in kind for kind, _ in kinds) else []
    candidates += [(), (("", window),)] if window else [()]
    nearest = float("inf")
    for windows in candidates:
        for exact in (True, False):
            with InFloat32() if exact else nullcontext():
                difference = _apart_going_on(model, samples, windows)
            if difference <= (TOLERANCE if exact else OWN_TOLERANCE):
                # What lies behind a window is seen by none of the samples where it is longer than they are.
                return Continuing(None, windows, window if window and window >= max(map(len, samples)) else None)
            if difference < float("inf"):
                nearest = min(nearest, difference)
                break
    how = f"differ by {nearest:.2g} of their size" if nearest < float("inf") else "cannot be computed"
    return Continuing(f"hidden states of sequences that go on beside others {how}")


@torch.no_grad()
def _apart_going_on(model: PreTrainedModel, samples: list[Tensor], windows: Windows) -> float:
    """How far sequences that begin and go on at different times are from what the model computes for each alone."""
    prompts = [sample.tolist() for sample in samples]
    forced = [sample.flip(0).tolist() for sample in samples]  # what each goes on with
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(prompts))}
    try:
        with going_on(model):
            slots = Slots(model, 3, windows)
            first = slots.read(prompts[:2])
            slots.place([2, 0, 1], [0, 1, 1], [len(prompts[i]) for i in (0, 1, 1)])
            running = [1, 1, 0]  # which sample each slot holds
            found[0].append(first[0])
            found[1].append(first[1])

            def step(count: int) -> None:
                for _ in range(count):
                    done = [len(found[sample]) for sample in running]
                    tokens = torch.tensor([forced[s][n - 1] for s, n in zip(running, done, strict=True)], device=slots.device)
                    hidden = slots.step(tokens, max(len(prompts[s]) + n for s, n in zip(running, done, strict=True)))
                    for sample in set(running):
                        found[sample].append(hidden[running.index(sample)])

            step(2)
            for slot, sample in ((1, 2), (0, 3)):
                found[sample].append(slots.read([prompts[sample]])[0])
                slots.place([slot], [0], [len(prompts[sample])])
                running[slot] = sample
                step(1)
            slots.keep([2, 1])
            running = [running[2], running[1]]
            step(2)
        differences = []
        head: Any = model.get_output_embeddings()
        for i, ids in enumerate(samples):
            whole = torch.cat([ids, ids.flip(0)[: len(found[i]) - 1]])
            alone: list[Tensor] = []
            hook = head.register_forward_hook(lambda module, args, output, alone=alone: alone.append(args[0]))
            try:
                model(input_ids=whole[None], use_cache=False)
            finally:
                hook.remove()
            differences.append(apart(torch.stack(found[i]).float(), alone[0].detach().float()[0, len(ids) - 1 :]))
        return max(differences)
    except Exception:  # a decoder that takes no mask of this shape, or has a cache of its own kind
        return float("inf")
