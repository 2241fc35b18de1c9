"""What verifiers said of responses, and what a run was warned of."""

from __future__ import annotations

from typing import Any

import numpy as np

from npd.intervals import wilson_interval
from npd.observe.events import SpanName
from npd.records import KEPT, number_of
from npd.report.facts import RunFacts, clock
from npd.report.figures import Figure, Trace, axis, number
from npd.report.pictures import left_out
from npd.report.reduce import edges_for, few_digits, histogram
from npd.report.tables import MOST_ROWS, Table, middle_left_out, percent
from npd.store import REFERENCE

MOST_WARNINGS = 8
ROLLOUTS = (
    "Right and wrong are what the verifiers of the rows' answers say, those that evaluation uses. The accuracy is that of "
    "sampled rollouts, so it is not the evaluation's where that decodes greedily."
)


def reward_table(run: RunFacts) -> Table | None:
    """One row a generation: accuracy of the responses, Δ of right and wrong ones, how many of each were kept."""
    of, reward, verdict = run.column("generation"), run.column("reward").astype(float), run.column("verdict")
    delta = run.column("delta_ifd").astype(float)
    counted = {g: m.selection for g, m in run.manifests.items() if m.selection.verified}
    numbers = sorted({*counted, *np.unique(of[np.isfinite(reward)]).tolist()})
    rows = []
    for g in middle_left_out(numbers):
        if g is None:
            rows.append(["…", *[""] * 6])
            continue
        mine = of == g
        right, wrong = mine & (reward >= 1), mine & (reward < 1)
        n, correct = int((right | wrong).sum()), int(right.sum())
        if g in counted:
            n, correct = counted[g].verified or 0, counted[g].correct or 0
        low, high = wilson_interval(correct / n, n)
        rows.append(
            [
                "references" if g == REFERENCE else f"g{g}",
                f"{n:,}",
                f"{percent(correct / n)} [{100 * low:.1f}, {100 * high:.1f}]",
                *(_median(delta[which]) for which in (right, wrong)),
                *(_share(np.isin(verdict[which], KEPT)) for which in (right, wrong)),
            ]
        )
    columns = ["generation", "verified", "right [95%]", "median Δ of right", "of wrong", "kept of right", "of wrong"]
    note = f"The newest and the oldest of {len(numbers):,} generations." if len(numbers) > MOST_ROWS else ""
    return Table("Right and wrong responses", columns, rows, note) if rows else None


def _median(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return number(float(np.median(finite)), 3) if len(finite) else "–"


def _share(kept: np.ndarray) -> str:
    return percent(float(kept.mean())) if len(kept) else "–"


def reward_histogram(run: RunFacts, id: str = "rewards") -> Figure | None:
    """Δ-IFD of right and of wrong responses, as shares of each."""
    reward, delta = run.column("reward").astype(float), run.column("delta_ifd").astype(float)
    sides = {"right": delta[(reward >= 1) & np.isfinite(delta)], "wrong": delta[(reward < 1) & np.isfinite(delta)]}
    if not all(map(len, sides.values())):
        return None
    edges = edges_for(np.concatenate(list(sides.values())), 60, 0.0)
    traces: list[Trace] = []
    said, below, above = [], 0, 0
    for (name, values), colour in zip(sides.items(), ("@accent", "@orange"), strict=True):
        counts, under, over = histogram(values, edges)
        below, above = below + under, above + over
        line: dict[str, Any] = {"color": colour, "shape": "hvh", "width": 1.8}
        x, y = few_digits((edges[:-1] + edges[1:]) / 2), few_digits(counts / len(values))
        traces.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": line})
        said.append(f"{len(values):,} {name} responses with a median Δ of {np.median(values):.3f}")
    layout = {"xaxis": axis("Δ = IFD of the teacher − IFD of the student"), "yaxis": axis("share of right, of wrong ones")}
    title = "Δ-IFD of right and wrong responses"
    return Figure(id, title, "; ".join(said) + ".", traces, layout, note=left_out(below, above).strip())


def warnings(run: RunFacts) -> list[str]:
    """What was warned of, each once about a generation, the newest last."""
    found: dict[tuple[Any, Any], str] = {}
    for event in run.events:
        text = event.facts.get("text")
        if event.name == SpanName.WARNING and isinstance(text, str):
            generation = number_of(event.facts.get("generation"))
            whose = "references" if generation == REFERENCE else f"generation {generation:.0f}"
            where = "" if np.isnan(generation) else f", {whose}"
            found[str(event.facts.get("about")), generation] = f"Warning at {clock(event.start)}{where}: {text}"
    return list(found.values())[-MOST_WARNINGS:]
