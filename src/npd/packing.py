"""Samples into rows: best-fit decreasing, no sample split or dropped."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of sample indices whose lengths sum to at most `capacity`; every index appears once.

    Best-fit decreasing: longest sample first, each into the row it fills best. Ties go to the lower index, so the result
    is a function of the lengths alone. Equal lengths go together (see `_best_fit`): O(log capacity) for each different
    length, and little for a sample.

    Raises:
        ValueError: a length that is over the capacity, or not positive.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    for bad, why in ((sizes > capacity, f"over the capacity of {capacity}"), (sizes < 1, "not positive")):
        if bad.any():
            index = int(np.argmax(bad))
            raise ValueError(f"sample {index} has a length of {sizes[index]} tokens, which is {why}")
    groups = _by_length(sizes)
    rows: list[list[int]] = []
    for size, first, each, into in _best_fit({size: len(group) for size, group in groups.items()}, capacity):
        group = groups[size]
        if into[0] == len(rows):
            rows += [[] for _ in into]
        for at, row in enumerate(into):
            rows[row] += group[first + at * each : first + (at + 1) * each]
    return rows


WINDOW = 2048
"""Samples that `short_rows` sorts and packs together."""


def short_rows(lengths: Sequence[int], tokens: int, *, alone: bool = False) -> Iterator[tuple[list[list[int]], int]]:
    """All samples in batches of packed rows, each batch with the length of its rows; with `alone`, one sample a row.

    Attention over packed samples costs as many operations a token as the row is long, unless its kernel skips what is
    masked. So a batch begins with the longest sample left, its rows are as long as that one, and samples of like lengths
    meet; short ones fill what is left in a row. A batch has at most `tokens` tokens, padding included, unless a single
    sample has more. Every index appears once, and the result is a function of the arguments alone.

    For each batch all that is left is packed anew, so of very many samples each `WINDOW` makes batches of its own.
    """
    for start in range(0, len(lengths), WINDOW):
        sizes = np.asarray(lengths[start : start + WINDOW], dtype=np.int64)
        left = np.argsort(-sizes, kind="stable")
        while left.size:
            length = int(sizes[left[0]])
            rows = [[i] for i in range(len(left))] if alone else pack(sizes[left], length)
            rows = rows[: max(1, tokens // length)]
            yield [[start + int(left[i]) for i in row] for row in rows], length
            left = np.delete(left, [i for row in rows for i in row])


def _by_length(sizes: np.ndarray) -> dict[int, list[int]]:
    """Indices of the samples of each length, the longest first."""
    order = np.argsort(-sizes, kind="stable")
    negative, starts = np.unique(-sizes[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {-int(n): part.tolist() for n, part in zip(negative, parts, strict=False)}


Fill = tuple[int, int, int, range]
"""(length, first, each, rows): of the samples of a length, from the first on, so many into each of these rows in turn."""


def _best_fit(of_each: Mapping[int, int], capacity: int) -> Iterator[Fill]:
    """Best-fit decreasing of so many samples of each length, the longest first. Rows are numbered as they are begun.

    A row that a sample fits best is also the one that the next of its length fits best, as long as that goes in: what is
    left in it is less than in any other row that would take it. So rows of the same free space are filled one after
    another, all by one rule, and stay together: the work is in runs of rows, not in samples. Of the rows with one free
    space the last to come to it is filled first.
    """
    spaces: list[int] = []  # free spaces that some row has, sorted
    runs_with: dict[int, list[range]] = {}  # free space -> its rows as a stack of runs, the last row on top

    def put(space: int, rows: range) -> None:
        if space and rows:
            if space not in runs_with:
                insort(spaces, space)
                runs_with[space] = []
            runs_with[space].append(rows)

    begun = 0
    for size, count in of_each.items():
        first = 0
        while first < count:
            left, place = count - first, bisect_left(spaces, size)
            space = spaces[place] if place < len(spaces) else capacity
            each = min(space // size, left)
            if place < len(spaces):
                run = runs_with[space].pop()[::-1]
                if not runs_with[space]:
                    del runs_with[space], spaces[place]
            else:
                run = range(begun, begun + -(-left // each))
                begun = run.stop
            full, rest = run[: left // each], run[left // each :]
            over = left % each if rest else 0  # samples that fill one more row in part
            yield size, first, each, full
            first += len(full) * each
            if over:
                yield size, first, over, rest[:1]
                first, rest = first + over, rest[1:]
            put(space, rest[::-1])
            put(space - each * size, full)
            if over:
                put(space - over * size, run[len(full) : len(full) + 1])


def end_to_end(lengths: Sequence[int], tokens: int) -> Iterator[tuple[list[list[int]], int]]:
    """All samples in batches of one row without padding, each with the length of its row.

    Samples are taken in their order, as many as have `tokens` tokens together, or one that has more; in the row the
    longest comes first, so that those of one length are neighbours and may be computed together.
    """
    row: list[int] = []
    total = 0
    for sample, length in enumerate(lengths):
        if row and total + length > tokens:
            yield [sorted(row, key=lambda i: -lengths[i])], total
            row, total = [], 0
        row.append(sample)
        total += length
    if row:
        yield [sorted(row, key=lambda i: -lengths[i])], total


class Packed(NamedTuple):
    """Samples laid into R rows of L tokens."""

    input_ids: Tensor
    """[R, L]"""
    position_ids: Tensor
    """[R, L], restarting at 0 with each sample; padding is one sample more."""
    predictors: Tensor
    """[T] flat indices into R * L of the positions that predict response tokens, sample after sample."""
    labels: Tensor
    """[T] the response tokens."""
    cu_seq_lens: Tensor
    """[S + 1] int32, where each sample begins in the flat R * L, and the end; padding is a sample."""
    lengths: list[int]
    """[S] tokens of each sample, padding included: what `cu_seq_lens` says, where no device need be asked."""
    samples: list[int]
    """Sample indices in the order of `labels`."""


def pack_tokens(
    contexts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    length: int,
    pad_id: int,
) -> Packed:
    """Lay samples (context, then response) into rows as `rows` says, each row padded to `length`.

    Contexts are at least one token: the first response token needs something to predict it.
    """
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    predictors, labels, lengths, samples = [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for sample in row:
            context, response = contexts[sample], responses[sample]
            size = len(context) + len(response)
            ids[r, at : at + len(context)] = context
            ids[r, at + len(context) : at + size] = response
            positions[r, at : at + size] = np.arange(size)
            first = r * length + at + len(context) - 1
            predictors.append(np.arange(first, first + len(response)))
            labels.append(np.asarray(response, dtype=np.int64))
            lengths.append(size)
            samples.append(sample)
            at += size
        positions[r, at:] = np.arange(length - at)
        lengths += [length - at] if at < length else []
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(np.concatenate(predictors)),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths,
        samples,
    )
