"""A band that follows the data of each part, source by source."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import SelectionConfig
from npd.selection.rules import Bounds, Judgement, Rule, bands

CHANCE = 0.01
"""How probable a sample may at most be, under the student itself, for its likelihood to count as an anomaly."""
SIGMAS = 3.0
ENOUGH = 200
"""Samples from which a spread is estimated; with fewer the bounds are the fixed ones and chance's."""
_Z10 = 1.2815515655446004  # of the normal distribution's 10% and 90% points


class AdaptiveBand(Rule):
    """Keeps what lies between `bounds_by_source`."""

    bounds_of = "the adaptive"

    def check(self, config: SelectionConfig) -> None:
        if not config.adaptive_lower <= config.lower <= 0 < config.upper:
            raise ValueError(
                f"the adaptive rule needs adaptive_lower <= lower <= 0 < upper, but they are {config.adaptive_lower}, "
                f"{config.lower} and {config.upper}"
            )
        if config.ifd != "loss_ratio":
            raise ValueError("the adaptive rule's bounds are those of ifd loss_ratio; choose that, or rule delta_ifd")

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        bounds = bounds_by_source(table, config)
        lower, upper = np.array([bounds[source] for source in table["source"].to_pylist()]).reshape(-1, 2).T
        return Judgement(bands(table["delta_ifd"].to_numpy(), lower, upper), bounds)

    def note(self, config: SelectionConfig, responses: int) -> str | None:
        if responses >= ENOUGH:
            return None
        return (
            f"The adaptive rule needs {ENOUGH} responses in a part to follow them, and parts have {responses}: its upper "
            "bound will be the fixed one. Raise rollout.part_size."
        )


def adaptive_bounds(delta: npt.ArrayLike, free_nats: npt.ArrayLike, config: SelectionConfig) -> Bounds:
    """Bounds for Δ that follow N samples: `delta` [N], and `free_nats` [N], nats of each response read without its prompt.

    The lower bound lies where Δ is both improbable by chance and an outlier of these samples. Chance: for y ~ p_S,
    P(p_T(y)/p_S(y) >= 1/α) <= α (Markov; the mean of the ratio is 1), so with α = 1% a teacher that is ahead by less than
    ln 100 nats over the whole response says nothing; in units of Δ that is ln 100 / free_nats, at the median response.
    Outlier: 3 σ below the median, with σ from the median and the 10% point, as of a normal distribution. The upper bound
    is 3 σ above the median, with σ from the 90% point, but at least half of `config.upper`: few wrong responses among
    many right ones look like outliers, and are what there is to learn. Never below `config.adaptive_lower` nor above
    `config.upper`. Up to 10% of outliers on a side, however far out, move a bound only as far as the quantile moves.
    """
    d, nats = np.asarray(delta, np.float64), np.asarray(free_nats, np.float64)
    finite = np.isfinite(d)
    d, nats = d[finite], nats[finite]
    lower, upper = config.lower, config.upper
    if d.size >= ENOUGH:
        low, middle, high = np.quantile(d, (0.1, 0.5, 0.9))
        lower = float(middle - SIGMAS * (middle - low) / _Z10)
        upper = float(middle + SIGMAS * (high - middle) / _Z10)
    median = float(np.median(nats)) if nats.size else 0.0
    chance = math.log(1 / CHANCE) / median if median > 0 else math.inf
    return Bounds(
        max(config.adaptive_lower, min(lower, -chance, config.lower)),
        min(config.upper, max(upper, config.upper / 2)),
    )


def bounds_by_source(table: pa.Table, config: SelectionConfig) -> dict[str, Bounds]:
    """The adaptive bounds of each source in a scored part; sources with too few samples share those of the part."""
    sources: list[str] = table["source"].unique().to_pylist()
    delta = table["delta_ifd"].to_numpy()
    nats = table["student_nll_free"].to_numpy() * pc.list_value_length(table["response_ids"]).to_numpy()
    of_all = adaptive_bounds(delta, nats, config)
    bounds = {}
    for source in sources:
        mask = pc.equal(table["source"], source).to_numpy(zero_copy_only=False)
        bounds[source] = adaptive_bounds(delta[mask], nats[mask], config) if mask.sum() >= ENOUGH else of_all
    return bounds
