"""Which prompts may be answered together, and whether from a cache: found before a model first writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from npd.models.layout import layout_of
from npd.models.proof import OWN_TOLERANCE, TOLERANCE, InFloat32, apart, samples_for
from npd.models.reading import base_model


class Writing(NamedTuple):
    """How a model may generate."""

    left_padding: bool
    """May prompts of different lengths be answered together, padded on their left under a mask?"""
    cache: bool
    """May it go on from a cache, instead of computing every prefix anew?"""


def prompt_batches(model: nn.Module, lengths: Sequence[int], new_tokens: int, size: int) -> Iterator[tuple[list[int], bool]]:
    """Prompts in batches of at most `size` that may be answered together with up to `new_tokens` each, the longest first.

    With each batch comes whether generation may use a cache; without one it computes every prefix anew.
    """
    layout, way = layout_of(base_model(model)), ways_to_write(base_model(model))

    def crosses(i: int) -> bool:
        """Does the meaning of positions change while this prompt is answered, so that what is cached is void?"""
        return layout.switch is not None and lengths[i] <= layout.switch < lengths[i] + new_tokens

    def alike(i: int) -> tuple[bool, int]:
        """Prompts that share a batch have the same of this."""
        past = layout.switch is not None and lengths[i] > layout.switch
        return past, lengths[i] if crosses(i) or not way.left_padding else 0

    for _, group in groupby(sorted(range(len(lengths)), key=lambda i: -lengths[i]), alike):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size], way.cache and not crosses(together[0])


def ways_to_write(model: PreTrainedModel) -> Writing:
    """The fastest way of generating that computes what reading what was written computes; found once a kind of model."""
    key = (type(model), model.config.to_json_string(), model.dtype, model.device.type, model.config._attn_implementation)
    if key not in _writing:
        _writing[key] = _find_writing(model)
    return _writing[key]


def writing_note(model: nn.Module) -> str:
    """What generate() does more slowly with a model than with most, as that alone was proved; nothing where it does not."""
    way = ways_to_write(base_model(model))
    slower = [] if way.cache else ["without a cache, every prefix computed anew"]
    slower += [] if way.left_padding else ["prompts of one length at a time"]
    return " and ".join(slower)


_writing: dict[Any, Writing] = {}


def _find_writing(model: PreTrainedModel) -> Writing:
    head, samples = model.get_output_embeddings(), samples_for(model)
    for way in (Writing(True, True), Writing(False, True), Writing(True, False)):
        groups = [samples] if way.left_padding else [[sample, sample.flip(0)] for sample in samples]
        for exact in (True, False):
            tolerance = TOLERANCE if exact else OWN_TOLERANCE
            with InFloat32() if exact else nullcontext():
                differences = [_apart_written(model, head, group, cache=way.cache) for group in groups]
            if all(difference <= tolerance for difference in differences):
                return way
            if all(difference < float("inf") for difference in differences):
                break
    return Writing(False, False)


@torch.no_grad()
def _apart_written(model: PreTrainedModel, head: nn.Module, prompts: list[Tensor], *, cache: bool) -> float:
    """How far what generation computes for some prompts is from each of them, with what was written, read alone."""
    width, new = max(map(len, prompts)), 4
    padded = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    steps: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        steps.append(args[0].detach().float()[:, -1])

    options = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, use_cache=cache)
    theirs, model.generation_config = model.generation_config, options
    hook = head.register_forward_hook(take)
    try:
        out: Any = model.generate(input_ids=padded, attention_mask=mask)  # type: ignore[operator]
        written = torch.stack(steps[:new], dim=1)
        differences = []
        for i, prompt in enumerate(prompts):
            whole = torch.cat([prompt, out[i, width : width + new - 1]])
            alone: list[Tensor] = []
            inner = head.register_forward_hook(lambda module, args, output, alone=alone: alone.append(args[0]))
            model(input_ids=whole[None], use_cache=False)
            inner.remove()
            differences.append(apart(written[i], alone[0].detach().float()[0, -new:]))
        return max(differences)
    except Exception:  # a cache of its own kind, or kernels that take no mask
        return float("inf")
    finally:
        hook.remove()
        model.generation_config = theirs
