"""Many points to few, without losing what the eye looks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def m4(y: npt.ArrayLike, buckets: int = 300) -> npt.NDArray[np.int64]:
    """Indices of at most 4 points a bucket of y [N]: its first, its last, its lowest and its highest finite value.

    A line through them draws, pixel by pixel, what a line through all N does, where a bucket is a pixel wide (M4; Jugel et
    al., VLDB 2014). Ascending, without repeats; values that are not finite are left out.
    """
    values = np.asarray(y, np.float64)
    index = np.flatnonzero(np.isfinite(values))
    if len(index) <= 4 * buckets:
        return index.astype(np.int64)
    chosen = []
    for bucket in np.array_split(index, buckets):
        part = values[bucket]
        chosen += [bucket[0], bucket[part.argmin()], bucket[part.argmax()], bucket[-1]]
    return np.unique(np.array(chosen, np.int64))


def bucket_means(x: npt.ArrayLike, y: npt.ArrayLike, buckets: int = 120) -> tuple[Floats, Floats]:
    """Means of x and y over equal-sized stretches of the points whose y is finite: a smooth line."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    groups = np.array_split(np.arange(len(ys)), min(buckets, max(1, len(ys))))
    return (
        np.array([xs[g].mean() for g in groups if len(g)]),
        np.array([ys[g].mean() for g in groups if len(g)]),
    )


def smoothed_kl(kl: npt.ArrayLike, tokens: npt.ArrayLike, generation: npt.ArrayLike, weight: float) -> Floats:
    """The near-policy KL as schedule.kl_budget is held against: weighed by tokens, older steps by `weight`, per generation.

    Args:
        kl: [N] nats per token of each step; NaN where a step has none.
        tokens: [N] tokens that it was measured on.
        generation: [N] which generation a step belongs to.
    """
    out = np.full(len(np.asarray(kl)), np.nan)
    total = count = 0.0
    before = None
    for i, (value, n, g) in enumerate(
        zip(np.asarray(kl, float), np.asarray(tokens, float), np.asarray(generation), strict=True)
    ):
        if g != before:
            total = count = 0.0
            before = g
        measured = np.isfinite(value)
        total = weight * total + (value * n if measured else 0.0)
        count = weight * count + (n if measured else 0.0)
        out[i] = total / count if count else np.nan
    return out


def histogram(values: npt.ArrayLike, edges: Floats) -> tuple[npt.NDArray[np.int64], int, int]:
    """Counts in each bin, and how many finite values lie below and above all of them; the last bin holds its upper edge."""
    v = np.asarray(values, np.float64)
    v = v[np.isfinite(v)]
    counts, _ = np.histogram(v, edges)
    return counts.astype(np.int64), int((v < edges[0]).sum()), int((v > edges[-1]).sum())


def edges_for(values: npt.ArrayLike, bins: int, *must: float, whole: bool = False) -> Floats:
    """[bins + 1] edges over the middle 99% of the finite values and over `must`; between whole numbers, and over all values,
    where asked.

    Where `must` is given, no bin straddles one of them that lies inside: bins are laid from the first of them.
    """
    v = np.asarray(values, np.float64)
    v = v[np.isfinite(v)]
    middle = (0.0, 1.0) if whole else (0.005, 0.995)
    low, high = (float(q) for q in np.quantile(v, middle)) if v.size else (0.0, 1.0)
    low, high = min([low, *must]), max([high, *must])
    if whole:
        step = max(1, int(np.ceil((high - low + 1) / bins)))
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + step + 0.5, step, dtype=np.float64)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins
    if must:
        below, above = np.ceil((must[0] - low) / width - 1e-9), np.ceil((high - must[0]) / width - 1e-9)
        return must[0] + width * np.arange(-below, above + 1)
    return np.linspace(low, high, bins + 1)


def spread(groups: npt.ArrayLike, most: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """At most `most` indices, as many from each group as from any other as far as they go; a fixed random choice."""
    g = np.asarray(groups)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(g))
    _, inverse = np.unique(g, return_inverse=True)
    turn = np.empty(len(g), np.int64)  # the how-manieth of its group each is
    seen: dict[int, int] = {}
    for i in order:
        turn[i] = seen.get(int(inverse[i]), 0)
        seen[int(inverse[i])] = int(turn[i]) + 1
    ranked = order[np.argsort(turn[order], kind="stable")]
    return np.sort(ranked[:most])


def few_digits(values: Any, digits: int = 5) -> list[float | None]:
    """Rounded to significant digits, and None for what is not finite: what JSON takes and a plot needs."""
    rounded = (float(f"{v:.{digits}g}") for v in np.asarray(values, np.float64))
    return [v if np.isfinite(v) else None for v in rounded]
