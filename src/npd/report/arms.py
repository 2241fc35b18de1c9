"""Runs that differ only in their seed are one arm: means with intervals, and differences paired by seed.

An interval is the 95% t interval of a mean over seeds: how far another few seeds might be from these. It is no interval over
problems, which the Evaluation table has for each run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix, dirname
from typing import Any

from npd.intervals import t_interval
from npd.report.facts import RunFacts
from npd.report.figures import evaluated, label, number
from npd.report.shares import is_share, percent
from npd.report.tables import Table

APART = ("run_dir", "seed", "tracking")  # options that tell no arms from each other


@dataclass(frozen=True)
class Arm:
    name: str
    runs: list[int]
    """Which of the runs compared."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    seeds: int
    ends: tuple[float, float] | None
    """Of its 95% t interval; None of one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        ends = t_interval(values) if len(values) > 1 else None
        return cls(math.fsum(values) / len(values), len(values), ends)


def arms_of(runs: Sequence[RunFacts]) -> list[Arm]:
    """The runs by arm, in the order in which arms first come."""
    grouped: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        grouped.setdefault(_identity(run) or f"run {i}", []).append(i)
    arms: list[Arm] = []
    for members in grouped.values():
        name = _name(runs, members)
        taken = {arm.name for arm in arms}
        if name in taken:
            name = next(f"{name} ({k})" for k in range(2, len(runs) + 2) if f"{name} ({k})" not in taken)
        arms.append(Arm(name, members))
    return arms


def _identity(run: RunFacts) -> str:
    """What runs of one arm have in common: options, command and versions; paths beside the run's own count from there."""
    if not run.config:
        return ""
    here = dirname(str(run.config.get("run_dir", "")).rstrip("/"))

    def relative(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): relative(item) for key, item in value.items()}
        if isinstance(value, list):
            return [relative(item) for item in value]
        inside = isinstance(value, str) and here and value.startswith(f"{here}/")
        return f"…{value[len(here) :]}" if inside else value

    tree = {key: relative(value) for key, value in run.config.items() if key not in APART}
    return json.dumps([tree, run.command, run.versions], sort_keys=True, default=str)


def _name(runs: Sequence[RunFacts], members: list[int]) -> str:
    """What the names of an arm's runs have in common, without a seed at the end."""
    if len(members) == 1:
        return label(runs, members[0])
    names = [runs[i].name for i in members]
    shared = commonprefix(names)  # noqa: RUF071 - of characters, not of a path's parts
    if set(names) != {shared}:
        shared = re.sub(r"([-_. ]+(seed|s)?|seed)?[-_. ]*\d*$", "", shared, flags=re.IGNORECASE)
    return shared or runs[members[0]].name


def by_seed(runs: Sequence[RunFacts], arm: Arm, key: str) -> dict[str, float]:
    """An arm's last value of an evaluation figure by seed; the mean of runs that share one."""
    found: dict[str, list[float]] = {}
    for i in arm.runs:
        values = [line.figures[key] for line in runs[i].evaluations if key in line.figures]
        if values:
            found.setdefault(str(runs[i].option("seed", 0)), []).append(values[-1])
    return {seed: math.fsum(values) / len(values) for seed, values in found.items()}


def paired(arm: Mapping[str, float], other: Mapping[str, float]) -> Mean | None:
    """The mean of an arm's differences from another one, seed by seed; None where they share none."""
    seeds = [seed for seed in arm if seed in other]
    return Mean.of([arm[seed] - other[seed] for seed in seeds]) if seeds else None


def told(mean: Mean | None, *, share: bool, signed: bool = False) -> str:
    """A mean and its interval for a table: percent of a share, percentage points of a difference of shares."""
    if mean is None:
        return "–"

    def one(value: float) -> str:
        text = f"{100 * value:.1f}" if share else number(value, 3)
        return f"+{text}" if signed and value > 0 else text

    head = one(mean.value) if signed or not share else percent(mean.value)
    return head if mean.ends is None else f"{head} [{one(mean.ends[0])}, {one(mean.ends[1])}]"


def arm_table(runs: Sequence[RunFacts], arms: Sequence[Arm]) -> Table | None:
    """Each arm's figures at the end, and their difference from the first arm's; None where every arm is one run."""
    if all(len(arm.runs) == 1 for arm in arms):
        return None
    first = arms[0]
    rows = []
    for key in evaluated(runs):
        share = is_share(runs, key)
        base = by_seed(runs, first, key)
        for arm in arms:
            values = by_seed(runs, arm, key)
            if not values:
                continue
            spread = [told(Mean.of([end]), share=share) for end in (min(values.values()), max(values.values()))]
            difference = None if arm is first else paired(values, base)
            pairs = "" if difference is None else f"{difference.seeds} pair{'s' * (difference.seeds > 1)}"
            rows.append(
                [
                    key.removeprefix("eval/"),
                    arm.name,
                    str(len(values)),
                    told(Mean.of(list(values.values())), share=share),
                    " to ".join(spread) if len(values) > 1 else "–",
                    told(difference, share=share, signed=True),
                    pairs or "–",
                ]
            )
    if not rows:
        return None
    note = (
        "Runs that differ only in their seed are one arm. In brackets: 95% t intervals of the mean over seeds. Differences "
        f"from {first.name} are taken seed by seed, in percentage points where the figure is a share."
    )
    columns = ["figure", "arm", "seeds", "mean at the end [95%]", "lowest to highest", f"difference from {first.name} [95%]"]
    return Table("Arms", [*columns, "by"], rows, note)
