"""Samples into rows: best-fit decreasing, no sample split or dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample indices whose lengths sum to at most `capacity`; every index appears once.

    Best-fit decreasing: longest sample first, each into the row it fills best. Free space takes whole numbers up to
    `capacity`, so the fullest row that still fits is a lookup in a segment tree over free space: O(log capacity) a
    sample. Ties go to the lower index, so the result is a function of the lengths alone.

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

    leaves = 1 << int(capacity).bit_length()
    occupied = [False] * (2 * leaves)  # a node: does any row below it have this free space?
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rows: list[list[int]] = []

    def tightest(need: int) -> int:
        """Least free space >= need that some row has, or -1."""
        node = need + leaves
        if occupied[node]:
            return need
        while node > 1:
            if node % 2 == 0 and occupied[node + 1]:
                node += 1
                while node < leaves:
                    node = 2 * node if occupied[2 * node] else 2 * node + 1
                return node - leaves
            node //= 2
        return -1

    def mark(free: int, value: bool) -> None:
        node = free + leaves
        while node and occupied[node] != value:
            occupied[node] = value
            if not value and node > 1 and occupied[node ^ 1]:
                return
            node //= 2

    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        free = tightest(size)
        if free < 0:
            row, free = len(rows), capacity
            rows.append([])
        else:
            row = rows_with[free].pop()
            if not rows_with[free]:
                mark(free, False)
        rows[row].append(index)
        left = free - size
        if left:
            rows_with[left].append(row)
            if len(rows_with[left]) == 1:
                mark(left, True)
    return rows


def short_rows(lengths: Sequence[int], tokens: int, *, alone: bool = False) -> Iterator[tuple[list[list[int]], int]]:
    """All samples in batches of packed rows, each batch with the length of its rows; with `alone`, one sample a row.

    Attention over packed samples costs as many operations a token as the row is long, unless its kernel skips what is
    masked. So a batch begins with the longest sample left, its rows are as long as that one, and samples of like lengths
    meet; short ones fill what is left in a row. A batch has at most `tokens` tokens, padding included, unless a single
    sample has more. Every index appears once, and the result is a function of the arguments alone.
    """
    left = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    while left:
        length = int(lengths[left[0]])
        rows = [[i] for i in range(len(left))] if alone else pack([lengths[i] for i in left], length)
        rows = rows[: max(1, tokens // length)]
        yield [[left[i] for i in row] for row in rows], length
        taken = {i for row in rows for i in row}
        left = [sample for i, sample in enumerate(left) if i not in taken]


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
