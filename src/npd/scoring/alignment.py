"""Positions of two tokenizers over the same bytes, and what of a teacher's reading can be said in the student's tokens.

Dimensions: S tokens of the student, M of the teacher, K the teacher's top-k, V the teacher's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npd.models import Span

LEFT_OUT, MERGED, EXACT = 0, 1, 2
"""What becomes of a position of the student."""
NONE = -1


class Alignment(NamedTuple):
    """Where each token of the student's lies among the teacher's."""

    kinds: np.ndarray
    """[S] int8: EXACT where one token meets one; MERGED where it covers several of the teacher's, or is the first within one;
    LEFT_OUT where it begins within one of the teacher's, ends within a later one, or was not read whole."""
    first: np.ndarray
    """[S] int64: the teacher's token that begins with it; NONE where it is left out."""
    last: np.ndarray
    """[S] int64: the teacher's token in which it ends; NONE where it is left out."""
    within: np.ndarray
    """[S] bool: does it end before the teacher's token does?"""
    seen: np.ndarray
    """[S] bool: did the teacher read any of its bytes?"""
    owner: np.ndarray
    """[M] int64: the student's token in which each of the teacher's begins."""


def align(student: Sequence[Span], teacher: Sequence[Span]) -> Alignment:
    """Meet two sequences of spans over the same bytes; the student's lie end to end, the teacher's may leave gaps."""
    starts, ends = (np.array([span[i] for span in student], np.int64) for i in (1, 2))
    if not teacher:
        nothing, no = np.full(len(student), NONE), np.zeros(len(student), bool)
        return Alignment(no.astype(np.int8), nothing, nothing, no, no, np.zeros(0, np.int64))
    t_starts, t_ends = (np.array([span[i] for span in teacher], np.int64) for i in (1, 2))
    M = len(teacher)
    owner = np.searchsorted(starts, t_starts, side="right") - 1
    a, b = (np.minimum(at, M - 1) for at in (np.searchsorted(t_starts, starts), np.searchsorted(t_ends, ends)))
    touched = np.minimum(np.searchsorted(t_ends, starts, side="right"), M - 1)
    seen = (t_starts[touched] < ends) & (t_ends[touched] > starts)
    begins = t_starts[a] == starts
    read = np.concatenate(([0], np.cumsum(t_ends - t_starts)))  # bytes that tokens before each have
    covered = begins & (b >= a) & (t_ends[b] == ends) & (read[b + 1] - read[a] == ends - starts)
    within = begins & (a == b) & (t_ends[b] > ends)
    kinds = np.where(covered & (a == b), EXACT, np.where(covered | within, MERGED, LEFT_OUT)).astype(np.int8)
    known = kinds != LEFT_OUT
    return Alignment(kinds, np.where(known, a, NONE), np.where(known, b, NONE), within, seen, owner)


def token_logprobs(alignment: Alignment, logprobs: np.ndarray) -> np.ndarray:
    """[S] log-probabilities whose sum is that of what the teacher read: each of its tokens counts where it begins.

    Tokens of the student's that the teacher did not read at all get the mean of the others, so that the mean is over what was
    read; the second and later ones within a token of the teacher's get 0, as what is certain then.

    Args:
        logprobs: [M] of the teacher's tokens.
    """
    total = np.zeros(len(alignment.kinds))
    np.add.at(total, alignment.owner, logprobs.astype(np.float64))
    if alignment.seen.any():
        total[~alignment.seen] = total[alignment.seen].mean()
    return total


def carry(
    alignment: Alignment,
    labels: np.ndarray,
    read: np.ndarray,
    logprobs: np.ndarray,
    topk_ids: np.ndarray,
    topk_logprobs: np.ndarray,
    image: np.ndarray,
    same: np.ndarray,
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's top-k in the student's tokens, best first: ids [S, K] and log-probabilities [S, K] (-inf: no entry).

    A position that begins with a token of the teacher's, and ends with it or within it, has the mass of every token of the
    top-k at the token that `image` writes it with first. One that covers several of the teacher's tokens has its own alone,
    with the product along them. Others have nothing.

    Args:
        labels: [S] the student's tokens.
        read: [M] the teacher's tokens.
        logprobs: [M] theirs.
        topk_ids, topk_logprobs: [M, K] of the teacher.
        image: [V] the student's token that a token of the teacher's is written with, or first; NONE: there is none.
        same: [V] bool: is it that one token alone?
        size: the student's ids lie below it; K is below it too.
    """
    S, K = len(labels), topk_ids.shape[1]
    ids, values = np.full((S, K), NONE, np.int64), np.full((S, K), -np.inf, np.float32)
    if not K:
        return ids.astype(np.int32), values
    whole = (alignment.kinds != LEFT_OUT) & (alignment.first == alignment.last)
    rows = alignment.first[whole]
    theirs = topk_ids[rows]
    mapped = image[theirs]
    # What was read begins with the label, however the student would have written it alone.
    mine = (theirs == read[rows][:, None]) & ~same[theirs] & alignment.within[whole][:, None]
    ids[whole], values[whole] = np.where(mine, labels[whole][:, None], mapped), topk_logprobs[rows]
    several = np.flatnonzero((alignment.kinds == MERGED) & ~whole)
    if len(several):
        bounds = np.stack((alignment.first[several], alignment.last[several] + 1), axis=1).ravel()
        sums = np.add.reduceat(np.append(logprobs.astype(np.float64), 0.0), bounds)[::2]
        ids[several, 0], values[several, 0] = labels[several], sums
    return _sorted(ids, values, size)


def _sorted(ids: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Join what has the same id; best first; places without an entry get ids that the row does not have."""
    K = ids.shape[1]
    values = np.where(ids < 0, np.float32(-np.inf), values)
    rank = np.broadcast_to(np.arange(K), ids.shape)
    order = np.argsort(ids, axis=1, kind="stable")
    ids, values, rank = (np.take_along_axis(x, order, axis=1) for x in (ids, values, rank))
    rank = rank.copy()
    for j in range(1, K):
        twice = (ids[:, j] == ids[:, j - 1]) & (ids[:, j] >= 0)
        joined = np.logaddexp(values[:, j], values[:, j - 1], where=twice, out=values[:, j].copy())
        values[:, j] = np.where(twice, np.minimum(joined, 0), values[:, j])
        rank[:, j] = np.where(twice, np.minimum(rank[:, j], rank[:, j - 1]), rank[:, j])
        values[:, j - 1] = np.where(twice, -np.inf, values[:, j - 1])
    order = np.lexsort((rank, -values), axis=1)
    ids, values = (np.take_along_axis(x, order, axis=1) for x in (ids, values))
    ids = np.where(values == -np.inf, NONE, ids)
    rows = np.flatnonzero((ids < 0).any(axis=1))
    if len(rows):
        # Of 2K ids at most K are taken.
        pool = np.arange(min(2 * K, size))
        taken = np.zeros((len(rows), len(pool)), bool)
        at, _ = np.nonzero(small := (ids[rows] >= 0) & (ids[rows] < len(pool)))
        taken[at, ids[rows][small]] = True
        free = np.argsort(taken, axis=1, kind="stable")[:, :K]  # those that are free first, in order
        missing = ids[rows] < 0
        nth = np.cumsum(missing, axis=1) - 1
        ids[rows] = np.where(missing, np.take_along_axis(free, np.maximum(nth, 0), axis=1), ids[rows])
    return ids.astype(np.int32), values.astype(np.float32)
