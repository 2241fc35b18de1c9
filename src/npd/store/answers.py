"""What no model can have answered: values are looked at where they come in, and where a part is read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ROUNDING = 0.02
"""Nats by which a log-probability may be above 0, and probabilities in sum above 1: of float16, bfloat16, two decimals."""
LEAST = float(np.finfo(np.float16).min)
"""The lowest log-probability that a part can hold. (vLLM says -9999 where a model says -inf.)"""
LEAST_BEST = -float(np.log(1 << 24))
"""The most likely of V tokens has at least 1/V, and no vocabulary has 16 million."""
FINISHED = ("stop", "length")

Array = npt.NDArray[Any]


def wrong_logprobs(values: Array, *, finite: bool = True) -> str | None:
    """What is wrong with log-probabilities [N], if anything; with `finite` -inf is.

    A few passes over the values, none of them in Python: what is read for training pays for it.
    """
    if not values.size:
        return None
    if values.dtype == np.float16:  # which numpy compares slowly; as integers, what is below 0 has the highest bit
        below = int(values.view(np.uint16).max())  # 0xFC00 is -inf, and what follows is no number
        above = int(values.view(np.int16).max())
        if below <= 0xFC00 - finite and above <= int(np.float16(ROUNDING).view(np.int16)):
            return None
        values = values.astype(np.float32)
    # Of NaN, if there is one, both are NaN.
    if values.max() <= ROUNDING and (values.min() >= LEAST or not finite):
        return None
    bad = values[~((values <= ROUNDING) & ((values >= LEAST) if finite else True))]
    return f"{bad[0]:g} as a log-probability"


def wrong_ids(ids: Array, size: int | None) -> str | None:
    """What is wrong with token ids [N] below `size` (None: of an unknown vocabulary), if anything."""
    if not ids.size:
        return None
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= (1 << 31 if size is None else size):
        return f"token {lowest if lowest < 0 else highest}" + ("" if size is None else f" of a vocabulary of {size}")
    return None


def wrong_top(ids: Array, logprobs: Array, *, finite: bool = True) -> str | None:
    """What is wrong with a top-k, ids [T, K] and their log-probabilities in any order, if anything."""
    if not ids.size:
        return None
    ordered = np.sort(ids, axis=1)
    if (twice := (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)).any():
        at = int(twice.argmax())
        row = ordered[at]
        return f"token {row[1:][row[1:] == row[:-1]][0]} more than once at position {at}"
    if (wrong := wrong_logprobs(logprobs.ravel(), finite=finite)) is not None:
        return wrong
    with np.errstate(under="ignore"):
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if mass.max() > 1 + ROUNDING:
        return f"probabilities of {mass.max():.4g} in sum at position {int(mass.argmax())}"
    if (best := logprobs.max(axis=1)).min() == -np.inf:
        return f"nothing that is likely at position {int(best.argmin())}"
    return None


def wrong_part(table: pa.Table, size: int | None = None) -> str | None:
    """What a part's columns, all or some, hold that none can hold; None if nothing.

    Args:
        size: token ids lie below it; None: not known.
    """
    if not len(table):
        return "it has no rows"
    lists = {name: _List(table[name]) for name in table.column_names if pa.types.is_list(table[name].type)}
    for name, column in lists.items():
        what: str | None = None
        if column.nulls:
            what = "a null"
        elif name.endswith("_ids"):
            what = (
                wrong_ids(column.values, size) if column.values.dtype.kind == "i" else f"values of type {column.values.dtype}"
            )
        elif column.values.dtype.kind != "f":
            what = f"values of type {column.values.dtype}"
        else:
            what = wrong_logprobs(column.values, finite=name != "topk_logprobs")
        if what is not None:
            return f"{name} holds {what}"
    return _wrong_lengths(lists) or _wrong_scalars(table)


class _List:
    """A list column's lengths [N] (0 for null) and values."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        pieces = [chunk.flatten() for chunk in column.chunks]
        self.nulls = sum(piece.null_count for piece in pieces)
        arrays = [piece.to_numpy(zero_copy_only=False) for piece in pieces]
        self.values = np.concatenate(arrays) if len(arrays) != 1 else arrays[0]
        self.lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _wrong_lengths(lists: dict[str, _List]) -> str | None:
    for name in ("prompt_ids", "response_ids"):
        if name in lists and (lists[name].lengths == 0).any():
            return f"row {int(lists[name].lengths.argmin())} has no {name}"
    if "response_ids" in lists:
        tokens = lists["response_ids"].lengths
        if "behavior_logprobs" in lists:
            given = lists["behavior_logprobs"].lengths
            if ((given != tokens) & (given != 0)).any():
                row = int(((given != tokens) & (given != 0)).argmax())
                return f"row {row} has {given[row]} behavior_logprobs for {tokens[row]} tokens"
        if "topk_ids" in lists and len(tokens):
            given = lists["topk_ids"].lengths
            k = given[0] // max(tokens[0], 1)
            if (given != k * tokens).any():
                row = int((given != k * tokens).argmax())
                return (
                    f"row {row} has {given[row]} topk_ids for {tokens[row]} tokens, the first row {given[0]} for {tokens[0]}"
                )
    if "topk_ids" in lists and "topk_logprobs" in lists:
        ids, logprobs = lists["topk_ids"].lengths, lists["topk_logprobs"].lengths
        if (ids != logprobs).any():
            row = int((ids != logprobs).argmax())
            return f"row {row} has {ids[row]} topk_ids and {logprobs[row]} topk_logprobs"
    return None


def _wrong_scalars(table: pa.Table) -> str | None:
    tests: dict[str, Callable[[pa.ChunkedArray], pa.ChunkedArray]] = {
        "sample_id": pc.is_null,
        "source": pc.is_null,
        "verdict": pc.is_null,
        "policy_version": lambda column: pc.or_kleene(pc.is_null(column), pc.less(column, -1)),
        "finish_reason": lambda column: pc.invert(pc.is_in(column, pa.array(FINISHED))),
    }
    tests |= dict.fromkeys(
        ("student_nll", "student_nll_free", "teacher_nll", "teacher_nll_free"),
        # Infinite where a teacher gives a token nothing; absent where nobody has read.
        lambda column: pc.fill_null(pc.or_(pc.is_nan(column), pc.less(column, -ROUNDING)), False),
    )
    tests["reward"] = lambda column: pc.fill_null(
        pc.invert(pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, 1))), False
    )
    for name in table.column_names:
        if name in tests and (bad := tests[name](table[name])).to_numpy().any():
            row = int(bad.to_numpy().argmax())
            return f"{name} holds {table[name][row].as_py()!r} in row {row}"
    return None
