"""Positions whose meaning hangs on the longest sample beside them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedConfig


def rope_switch(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a sample is read with the short factors of longrope; None where there is one set of factors.

    transformers chooses by the largest position of the whole batch, so a sample of more tokens changes what those beside it
    mean. Dynamic NTK changes beyond max_position_embeddings only, where npd reads nothing.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    sets = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    found = [p for p in sets if p.get("rope_type") == "longrope"]
    return min((int(p["original_max_position_embeddings"]) for p in found), default=None)


def split_at(lengths: Sequence[int], switches: Collection[int]) -> list[list[int]]:
    """Indices of the samples that may share a batch, the longest first: those between the same switches."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(sum(length > switch for switch in switches), []).append(i)
    return [groups[past] for past in sorted(groups, reverse=True)]
