"""Δ-IFD: which of the student's responses may be trained on.

Instruction-Following Difficulty is from Li et al., arXiv:2308.12032; its perplexity form from Superfiltering,
arXiv:2402.00530; the difference of teacher and student and its bands from Near-Policy Distillation, arXiv:2605.05940.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import SelectionConfig
from npd.errors import RunError
from npd.records import SelectionSummary

Floats = npt.NDArray[np.float64]

PROXIMAL, DEGENERATE, DISCONNECT, UNDEFINED = "proximal", "degenerate", "disconnect", "undefined"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Of the adaptive rule.
CHANCE = 0.01
"""How probable a sample may at most be, under the student itself, for its likelihood to count as an anomaly."""
SIGMAS = 3.0
ENOUGH = 200
"""Samples from which a spread is estimated; with fewer the bounds are the fixed ones and chance's."""
_Z10 = 1.2815515655446004  # of the normal distribution's 10% and 90% points


def instruction_following_difficulty(
    nll: npt.ArrayLike, nll_free: npt.ArrayLike, *, ifd: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio"
) -> Floats:
    """IFD of N responses from their mean nats per token with the prompt (`nll`) and without (`nll_free`).

    loss_ratio is nll / nll_free; perplexity_ratio is exp(nll - nll_free). Where nll_free is 0 the ratio is undefined:
    NaN or infinite, as IEEE has it.
    """
    s, s_free = np.asarray(nll, np.float64), np.asarray(nll_free, np.float64)
    with np.errstate(all="ignore"):
        return s / s_free if ifd == "loss_ratio" else np.exp(s - s_free)


def delta_ifd(
    student_nll: npt.ArrayLike,
    student_nll_free: npt.ArrayLike,
    teacher_nll: npt.ArrayLike,
    teacher_nll_free: npt.ArrayLike,
    *,
    ifd: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio",
) -> Floats:
    """IFD_teacher - IFD_student for N responses; arguments [N] are mean nats per response token."""
    with np.errstate(all="ignore"):
        return instruction_following_difficulty(teacher_nll, teacher_nll_free, ifd=ifd) - instruction_following_difficulty(
            student_nll, student_nll_free, ifd=ifd
        )


def bands(delta: npt.ArrayLike, lower: npt.ArrayLike, upper: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """Verdict for each Δ: both edges of the band belong to "proximal"; a Δ that is not a number is "undefined".

    Bounds are numbers, or one for each Δ.
    """
    d = np.asarray(delta, np.float64)
    verdicts = np.full(d.shape, PROXIMAL, dtype="<U10")
    verdicts[d < np.asarray(lower, np.float64)] = DEGENERATE
    verdicts[d > np.asarray(upper, np.float64)] = DISCONNECT
    verdicts[np.isnan(d)] = UNDEFINED
    return verdicts


class Bounds(NamedTuple):
    lower: float
    upper: float


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


class Select:
    """Stage: adds ifd_student, ifd_teacher, delta_ifd and verdict to a scored table."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config

    def __call__(self, table: pa.Table) -> pa.Table:
        student, teacher = (
            instruction_following_difficulty(
                table[f"{who}_nll"].to_numpy(), table[f"{who}_nll_free"].to_numpy(), ifd=self.config.ifd
            )
            for who in ("student", "teacher")
        )
        with np.errstate(all="ignore"):
            # Rounded before it is judged, so that the verdict can be recomputed from the stored column.
            delta = (teacher - student).astype(np.float32)
        table = (
            table.append_column("ifd_student", pa.array(student, pa.float32()))
            .append_column("ifd_teacher", pa.array(teacher, pa.float32()))
            .append_column("delta_ifd", pa.array(delta, pa.float32()))
        )
        if self.config.rule == "adaptive":
            by_source = bounds_by_source(table, self.config)
            lower, upper = np.array([by_source[source] for source in table["source"].to_pylist()]).reshape(-1, 2).T
            verdicts = bands(delta, lower, upper)
        else:
            verdicts = bands(delta, self.config.lower, self.config.upper)
        if self.config.rule == "none":
            verdicts[:] = PROXIMAL
        return table.append_column("verdict", pa.array(verdicts.tolist(), pa.string()))


class Summary:
    """Counts per verdict, and per source with quantiles of Δ: what the manifest keeps and the command prints."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config
        self.verdicts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.deltas: defaultdict[str, list[npt.NDArray[np.float32]]] = defaultdict(list)
        self.bounds: defaultdict[str, list[Bounds]] = defaultdict(list)

    def add(self, table: pa.Table) -> None:
        """Count a finished part; needs columns source, verdict, delta_ifd, and for adaptive bounds those they follow."""
        adaptive = self.config.rule == "adaptive" and table["delta_ifd"].null_count < len(table)
        for source, bounds in (bounds_by_source(table, self.config) if adaptive else {}).items():
            self.bounds[source].append(bounds)
        for source in table["source"].unique().to_pylist():
            mine = table.filter(pc.equal(table["source"], source))
            self.verdicts[source].update(mine["verdict"].to_pylist())
            self.deltas[source].append(mine["delta_ifd"].to_numpy().astype(np.float32))

    def result(self) -> SelectionSummary:
        """Of all that was added; `bounds` are the lowest and the highest that any part had."""
        sources = {source: self._one([source]) for source in sorted(self.verdicts)}
        return replace(self._one(list(self.verdicts)), sources=sources)

    def _one(self, sources: list[str]) -> SelectionSummary:
        counts = sum((self.verdicts[source] for source in sources), Counter())
        deltas = np.concatenate([piece for source in sources for piece in self.deltas[source]] or [np.empty(0, np.float32)])
        finite = deltas[np.isfinite(deltas)]
        quantiles = [float(q) for q in np.quantile(finite, QUANTILES)] if finite.size else []
        bounds = [b for source in sources for b in self.bounds[source]]
        return SelectionSummary(
            counts.total(),
            dict(sorted(counts.items())),
            dict(zip(map(str, QUANTILES), quantiles, strict=False)),
            (min(b.lower for b in bounds), max(b.upper for b in bounds)) if bounds else None,
        )


def check_some_kept(summary: SelectionSummary, config: SelectionConfig) -> None:
    """Stop a run whose selection leaves nothing to train on, and say which bound did it."""
    if summary.kept:
        return
    counts = summary.verdicts
    adaptive = config.rule == "adaptive"
    lower = "the adaptive lower bound" if adaptive else f"selection.lower {config.lower}"
    upper = "the adaptive upper bound" if adaptive else f"selection.upper {config.upper}"
    reasons: dict[str, Callable[[int], str]] = {
        DEGENERATE: lambda n: f"{n} below {lower} (degenerate)",
        DISCONNECT: lambda n: f"{n} above {upper} (disconnect)",
        UNDEFINED: lambda n: f"{n} with an undefined delta (a model gives the response alone a likelihood of 1)",
    }
    what = ", ".join(say(counts[verdict]) for verdict, say in reasons.items() if counts.get(verdict))
    quantiles = ", ".join(f"{float(q):.0%}: {value:.3f}" for q, value in summary.delta_ifd_quantiles.items())
    raise RunError(
        f"Selection dropped all {summary.rows} responses of this generation: {what}. Quantiles of delta: "
        f"{quantiles or 'none'}. Widen the bound, choose selection.rule none, or warm the student up with `npd sft`."
    )
