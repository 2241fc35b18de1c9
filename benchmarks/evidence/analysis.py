"""Figures from the cells' entries: read from curves after equal steps or seconds, paired by seed, with 95% intervals.

The interval is Student's t over seeds: it says how sure the mean over seeds is, each seed having its own problems, warm
student and order. Entries are those of benchmarks/results/evidence/, nothing else is read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.arms import timed
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.hypotheses import Contrast, Equal, Hypothesis
from benchmarks.study import T95

Entry = Mapping[str, Any]
Entries = Mapping[Cell, Entry]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with the half-width of its 95% interval; None of fewer than two."""

    value: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        count = len(values)
        half = None
        if count > 1:
            half = T95[min(count, max(T95))] * statistics.stdev(values) / count**0.5
        return cls(statistics.fmean(values), half, count)

    def __format__(self, spec: str) -> str:
        shown = format(self.value, spec)
        return shown if self.half is None else f"{shown} ± {format(self.half, spec.replace('+', ''))}"


def once(entry: Entry, figure: str) -> float | None:
    """A figure that is measured once a run, such as pass@8 and the KL to the teacher."""
    return next((float(point[figure]) for point in reversed(entry["curve"]) if figure in point), None)


def end(entry: Entry) -> float:
    """Processor's seconds of a whole run."""
    return float(entry["curve"][-1]["cpu_seconds"])


def difference(one: Entry, other: Entry, figure: str = "accuracy", at: int = -1) -> float:
    """In points, where both end; or with `at` 0, where both begin."""
    return 100 * float(one["curve"][at][figure] - other["curve"][at][figure])


def seeds_of(entries: Entries, task: str, arm: str) -> set[int]:
    return {cell.seed for cell in entries if (cell.task, cell.arm) == (task, arm)}


def standing(entries: Entries, task: str, arm: str, equal: Equal) -> dict[int, Entry]:
    """Seed -> the arm's entry: at equal seconds that of its run of as many, where its steps cost other than `BASE`'s."""
    name = timed(arm) if equal == "seconds" else arm
    return {seed: entries[Cell(task, name, seed)] for seed in sorted(seeds_of(entries, task, name))}


def same_start(one: Entry, other: Entry) -> bool:
    """Did both go on from the same warm student? Another processor rounds otherwise, and makes another one of a seed.

    Entries that do not say which it was are told apart by their processors, and by its figures on the held-out problems.
    """
    if "start" in one and "start" in other:
        return bool(one["start"] == other["start"])
    mine, its = (_first_seen(entry) for entry in (one, other))
    return mine == its


def _first_seen(entry: Entry) -> dict[str, Any]:
    """What is known of where a run began, its seconds apart."""
    figures = {name: value for name, value in entry["curve"][0].items() if name != "cpu_seconds"}
    return figures | {"processor": entry.get("machine", {}).get("processor")}


def paired(entries: Entries, task: str, arm: str, against: str, equal: Equal, stratum: str = "") -> dict[int, float]:
    """Seed -> difference in points, of the seeds that have both from the same warm student."""
    figure = f"of {stratum}" if stratum else "accuracy"
    one, other = (standing(entries, task, name, equal) for name in (arm, against))
    seeds = [seed for seed in one if seed in other and same_start(one[seed], other[seed])]
    return {seed: difference(one[seed], other[seed], figure, 0 if equal == "start" else -1) for seed in seeds}


def contrast(entries: Entries, wanted: Contrast) -> dict[int, float]:
    """Seed -> mean difference over the contrast's tasks, of the seeds that have all of them."""
    each = [paired(entries, task, wanted.arm, wanted.against, wanted.equal, wanted.stratum) for task in wanted.tasks]
    return {seed: statistics.fmean(one[seed] for one in each) for seed in sorted(set.intersection(*map(set, each)))}


def fate_of(entries: Entries, hypothesis: Hypothesis) -> tuple[Mean | None, str]:
    """The difference that decides, and the hypothesis's fate: supported, refuted, open, or not run."""
    values = contrast(entries, hypothesis.first)
    if hypothesis.second is not None:
        others = contrast(entries, hypothesis.second)
        values = {seed: values[seed] - others[seed] for seed in values.keys() & others.keys()}
    if not values:
        return None, "not run"
    mean = Mean.of(list(values.values()))
    if mean.half is None:
        return mean, "open"
    if mean.value - mean.half > hypothesis.above:
        return mean, "supported"
    return mean, "refuted" if mean.value + mean.half < hypothesis.above else "open"


def over_seeds(entries: Entries, task: str, arm: str, figure: Callable[[Entry], float | None]) -> Mean | None:
    values = [figure(entries[Cell(task, arm, seed)]) for seed in sorted(seeds_of(entries, task, arm))]
    known = [value for value in values if value is not None]
    return Mean.of(known) if known else None
