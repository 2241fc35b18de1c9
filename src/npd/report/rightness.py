"""What selection kept and dropped, and how right it was, where a verifier gave rewards.

A response is right as far as its reward says so: 1 is right, 0 wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npd.intervals import wilson_interval
from npd.records import KEPT
from npd.report.facts import RunFacts
from npd.report.figures import Figure, Trace, axis, label, number
from npd.report.reduce import few_digits
from npd.report.shares import percent
from npd.report.tables import MOST_ROWS, Table
from npd.store import REFERENCE

TITLE = "What was kept, and how right it was"
BINS = 12  # of Δ, of as many responses each
FEWEST = 10  # responses in one


class Judged(NamedTuple):
    """Responses of the student that have a reward within 0..1."""

    reward: npt.NDArray[np.float64]
    verdict: npt.NDArray[Any]
    delta: npt.NDArray[np.float64]
    source: npt.NDArray[Any]
    tokens: npt.NDArray[Any]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        return np.isin(self.verdict.astype(str), KEPT)

    def of(self, chosen: npt.NDArray[np.bool_]) -> Judged:
        return Judged(*(column[chosen] for column in self))


def judged(run: RunFacts) -> Judged | None:
    """None where no response has a reward, or rewards are no shares of being right."""
    reward = run.column("reward").astype(np.float64)
    mine = np.isfinite(reward) & (run.column("generation") != REFERENCE) if len(reward) else np.zeros(0, bool)
    if not mine.any() or reward[mine].min() < 0 or reward[mine].max() > 1:
        return None
    columns = (run.column(name) for name in ("verdict", "delta_ifd", "source", "tokens"))
    verdict, delta, source, tokens = columns
    return Judged(reward, verdict, delta.astype(np.float64), source, tokens).of(mine)


def right(some: Judged) -> str:
    """How many are right, with the 95% Wilson interval."""
    n = len(some.reward)
    if not n:
        return "–"
    share = float(some.reward.mean())
    low, high = wilson_interval(share, n)
    return f"{percent(share)} [{100 * low:.1f}, {100 * high:.1f}]"


def difference(some: Judged) -> str:
    """How much more often kept ones are right than dropped ones, in percentage points, with a 95% interval (Newcombe, 1998,
    method 10: of two Wilson intervals)."""
    kept, dropped = (some.of(which).reward for which in (some.kept, ~some.kept))
    if not len(kept) or not len(dropped):
        return "–"
    a, b = float(kept.mean()), float(dropped.mean())
    (a_low, a_high), (b_low, b_high) = wilson_interval(a, len(kept)), wilson_interval(b, len(dropped))
    low = a - b - np.hypot(a - a_low, b_high - b)
    high = a - b + np.hypot(a_high - a, b - b_low)
    return f"{100 * (a - b):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def right_table(run: RunFacts) -> Table | None:
    """One row a verdict, and for several sources what was kept and dropped of each."""
    found = judged(run)
    if found is None:
        return None
    n = len(found.reward)

    def row(name: str, some: Judged) -> list[str]:
        length = number(float(np.median(some.tokens))) if len(some.tokens) else "–"
        return [name, f"{len(some.reward):,}", percent(len(some.reward) / n), right(some), length]

    rows = [row("kept", found.of(found.kept)), row("dropped", found.of(~found.kept))]
    dropped = sorted({str(v) for v in found.verdict[~found.kept]})
    rows += [row(f"dropped as {verdict}", found.of(found.verdict == verdict)) for verdict in dropped if len(dropped) > 1]
    sources = sorted({str(s) for s in found.source})
    for source in sources[: MOST_ROWS // 2] if len(sources) > 1 else ():
        mine = found.of(found.source == source)
        named = source or "(none)"
        rows += [row(f"{named}: kept", mine.of(mine.kept)), row(f"{named}: dropped", mine.of(~mine.kept))]
    rows.append(row("all", found))
    more = len(sources) - MOST_ROWS // 2
    note = (
        "Right: mean reward of the verifier, with its 95% Wilson interval. Kept ones minus dropped ones: "
        f"{difference(found)} percentage points (Newcombe's 95% interval)."
        + (f" {more} more sources are not shown." if more > 0 else "")
    )
    columns = ["responses", "count", "share", "right [95%]", "median length"]
    return Table(TITLE, columns, rows, note)


def right_comparison(runs: Sequence[RunFacts]) -> Table | None:
    """One row a run: how right what it kept and what it dropped was."""
    rows = []
    for i, run in enumerate(runs):
        found = judged(run)
        if found is not None:
            share = percent(float(found.kept.mean()))
            parts = (found, found.of(found.kept), found.of(~found.kept))
            rows.append([label(runs, i), f"{len(found.reward):,}", share, *map(right, parts), difference(found)])
    if not rows:
        return None
    note = (
        "Right: mean reward of the verifier, with 95% Wilson intervals. The difference is in percentage points, with "
        "Newcombe's 95% interval. Of responses that are still on disk."
    )
    columns = ["run", "responses", "kept", "right: all", "right: kept", "right: dropped", "kept − dropped"]
    return Table(TITLE, columns, rows, note)


def right_by_delta(run: RunFacts) -> Figure | None:
    """How often responses are right, by their Δ-IFD: what a band of Δ would keep."""
    found = judged(run)
    if found is None:
        return None
    found = found.of(np.isfinite(found.delta))
    if len(found.reward) < 2 * FEWEST:
        return None
    order = np.argsort(found.delta, kind="stable")
    parts = [part for part in np.array_split(order, min(BINS, len(order) // FEWEST)) if len(part)]
    x = [float(found.delta[part].mean()) for part in parts]
    y = [float(found.reward[part].mean()) for part in parts]
    ends = [wilson_interval(value, len(part)) for value, part in zip(y, parts, strict=True)]
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": few_digits(x),
        "y": few_digits(y),
        "name": "right",
        "line": {"color": "@accent"},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": few_digits([high - value for value, (_, high) in zip(y, ends, strict=True)]),
            "arrayminus": few_digits([value - low for value, (low, _) in zip(y, ends, strict=True)]),
            "thickness": 1,
        },
    }
    said = "; ".join(f"at Δ {number(a, 3)} {percent(b)}" for a, b in zip(x, y, strict=True))
    layout = {"xaxis": axis("Δ-IFD, mean of each group"), "yaxis": axis("right", rangemode="tozero")}
    note = f"Groups of as many responses each, by Δ. Bars: 95% Wilson intervals. Kept − dropped: {difference(found)} points."
    return Figure("right-by-delta", "How right responses are, by Δ-IFD", f"Share right {said}.", [trace], layout, note=note)
