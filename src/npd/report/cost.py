"""What an evaluation figure cost: against seconds, and against the tokens that models wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from npd.observe.events import MARKS, SpanName
from npd.report.arms import Arm, Mean, by_seed
from npd.report.facts import RunFacts
from npd.report.figures import DASHES, RUNS, Figure, Trace, axis, evaluated, number
from npd.report.reduce import few_digits
from npd.report.text import plot_text
from npd.store import REFERENCE
from npd.store.schema import NO_POLICY

T_BARS = "Bars: 95% t intervals over seeds."


def seconds_at(run: RunFacts) -> dict[int, float]:
    """Step of each evaluation -> seconds of the trainer's wall-clock before it, without evaluations and without time in which
    nothing worked on the run; steps that were lost and done again count as often as they were done."""
    mine = [e for e in run.events if e.role == "trainer" and e.thread == "MainThread"]
    mine.sort(key=lambda e: (e.start, e.name != SpanName.STARTED))
    extents: list[list[float]] = []
    for event in mine:
        if event.name == SpanName.STARTED or not extents:
            extents.append([event.start, event.start])
        if event.name not in MARKS:
            extents[-1][1] = max(extents[-1][1], event.end)
    evaluations = [e for e in mine if e.name == SpanName.EVALUATE]
    found: dict[int, float] = {}
    for event in evaluations:
        step = event.facts.get("step")
        if type(step) is not int:
            continue
        worked = sum(max(0.0, min(end, event.start) - start) for start, end in extents)
        before = sum(other.seconds for other in evaluations if other.start < event.start)
        found[step] = max(0.0, worked - before)  # of several at one step the last: those before it were lost with the step
    return found


def tokens_at(run: RunFacts) -> dict[int, float]:
    """Step of each evaluation -> response tokens that models had written for what was trained on until then: the student's,
    and the teacher's references; those that were given cost nothing."""
    by_teacher = run.option("data.references") == "teacher"
    written = {
        generation: float(manifest.response_tokens or 0)
        for generation, manifest in run.manifests.items()
        if manifest.policy_version != NO_POLICY or by_teacher
    }
    steps, generations = run.series("step"), run.series("generation")
    found = {}
    for line in run.evaluations:
        before = generations[steps <= line.step]
        before = before[np.isfinite(before)]
        newest = before.max() if len(before) else None
        taken = [] if newest is None else [g for g in written if g == REFERENCE or g <= newest]
        found[line.step] = sum(written[g] for g in taken)
    return found


def arm_style(number_of_arm: int) -> dict[str, Any]:
    return {"color": RUNS[number_of_arm % len(RUNS)], "dash": DASHES[(number_of_arm // len(RUNS)) % len(DASHES)]}


def points_of(run: RunFacts, key: str, at: Mapping[int, float]) -> dict[int, tuple[float, float]]:
    """Step -> (cost, figure), where both are known; of a step's evaluations the last one."""
    return {
        line.step: (at[line.step], line.figures[key]) for line in run.evaluations if key in line.figures and line.step in at
    }


def cost_figures(runs: Sequence[RunFacts], arms: Sequence[Arm]) -> list[Figure]:
    """Each figure that was measured more than once, against seconds and against tokens."""
    axes: tuple[tuple[str, str, Callable[[RunFacts], dict[int, float]], str], ...] = (
        (
            "seconds",
            "seconds of training",
            seconds_at,
            "The trainer's wall-clock without evaluations: waiting for generations is in it, time when nothing ran is not.",
        ),
        (
            "tokens",
            "response tokens written",
            tokens_at,
            "Tokens that the student wrote, or the teacher as references, for the generations trained on until then.",
        ),
    )
    figures: list[Figure] = []
    for key in evaluated(runs):
        for id, unit, cost, note in axes:
            figure = _against(runs, arms, key, f"{id}-{len(figures)}", unit, [cost(run) for run in runs], note)
            figures += [figure] if figure is not None else []
    return figures


def _against(
    runs: Sequence[RunFacts],
    arms: Sequence[Arm],
    key: str,
    id: str,
    unit: str,
    costs: Sequence[Mapping[int, float]],
    note: str,
) -> Figure | None:
    traces: list[Trace] = []
    said = []
    bars = False
    for a, arm in enumerate(arms):
        points = {i: found for i in arm.runs if (found := points_of(runs[i], key, costs[i]))}
        if not points:
            continue
        style, name = arm_style(a), plot_text(arm.name)
        shared = set.intersection(*(set(found) for found in points.values()))
        steps = sorted(shared if len(points) > 1 else next(iter(points.values())))
        if len(points) > 1:
            for found in points.values():
                traces.append(
                    _line(list(found.values()), name, {**style, "color": f"{style['color']}/0.35", "width": 1}, False)
                )
        means = [Mean.of([found[step][1] for found in points.values()]) for step in steps]
        xs = [float(np.mean([found[step][0] for found in points.values()])) for step in steps]
        if not means:
            continue
        trace = _line([(x, mean.value) for x, mean in zip(xs, means, strict=True)], name, {**style, "width": 2}, True)
        if all(mean.ends is not None for mean in means):
            half = few_digits([mean.ends[1] - mean.value for mean in means if mean.ends is not None])
            trace["error_y"] = {"type": "data", "array": half, "thickness": 1}
            bars = True
        traces.append(trace)
        said.append(
            f"{arm.name}: from {number(means[0].value)} at {number(xs[0])} to {number(means[-1].value)} at {number(xs[-1])}"
        )
    if not any(len(trace["x"]) > 1 and len(set(trace["x"])) > 1 for trace in traces):
        return None
    name = key.removeprefix("eval/")
    layout = {"xaxis": axis(unit, rangemode="tozero"), "yaxis": axis(plot_text(name))}
    several = " Thin: each seed; thick: their mean." if any(len(arm.runs) > 1 for arm in arms) else ""
    note += several + (f" {T_BARS}" if bars else "")
    return Figure(id, f"{name} against {unit}", f"By {unit}. " + ". ".join(said) + ".", traces, layout, note=note)


def _line(points: Sequence[tuple[float, float]], name: str, line: dict[str, Any], legend: bool) -> Trace:
    x, y = [list(values) for values in zip(*points, strict=True)]
    trace: Trace = {"type": "scatter", "mode": "lines+markers" if legend else "lines", "x": few_digits(x, 6)}
    return trace | {"y": few_digits(y), "name": name, "line": line, "showlegend": legend}


def arm_points(runs: Sequence[RunFacts], arms: Sequence[Arm]) -> list[Figure]:
    """Each arm's mean at the end with its interval, and every seed's value; of arms that are single runs there is none."""
    figures: list[Figure] = []
    for key in evaluated(runs) if any(len(arm.runs) > 1 for arm in arms) else ():
        have = [(arm.name, values) for arm in arms if (values := list(by_seed(runs, arm, key).values()))]
        if not have:
            continue
        means = [(name, Mean.of(values)) for name, values in have]
        names = [plot_text(name) for name, _ in have]
        seeds: Trace = {
            "type": "scatter",
            "mode": "markers",
            "x": few_digits([value for _, values in have for value in values]),
            "y": [shown for shown, (_, values) in zip(names, have, strict=True) for _ in values],
            "name": "seeds",
            "showlegend": False,
            "marker": {"color": "@muted", "size": 6, "symbol": "line-ns-open"},
        }
        half = [0.0 if mean.ends is None else mean.ends[1] - mean.value for _, mean in means]
        mean_points: Trace = {
            "type": "scatter",
            "mode": "markers",
            "x": few_digits([mean.value for _, mean in means]),
            "y": names,
            "name": "mean",
            "showlegend": False,
            "marker": {"color": "@accent", "size": 9},
            "error_x": {"type": "data", "array": few_digits(half), "color": "@accent"},
        }
        name = key.removeprefix("eval/")
        said = "; ".join(
            f"{who} {mean.value:.3f}" + ("" if mean.ends is None else f" [{mean.ends[0]:.3f}, {mean.ends[1]:.3f}]")
            for who, mean in means
        )
        layout = {"xaxis": axis(plot_text(name)), "yaxis": {"type": "category", "autorange": "reversed"}}
        height = 110 + 34 * len(have)
        note = f"{T_BARS} Strokes: the seeds."
        figures.append(
            Figure(f"arms-{len(figures)}", f"{name} by arm", f"{said}.", [seeds, mean_points], layout, height, note=note)
        )
    return figures
