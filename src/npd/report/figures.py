"""Curves of one run or of several, as data for plotly.js: plain dictionaries, each with a summary in words.

Colours are names behind "@", which the page turns into those of its light or dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from npd.records import for_people
from npd.report.facts import MOST_FIGURE, RunFacts
from npd.report.reduce import bucket_means, few_digits, m4, smoothed_kl
from npd.report.text import plot_text
from npd.schedule import SMOOTHING

VERDICTS = ("proximal", "degenerate", "disconnect", "undefined", "reference")
RUNS = [f"@run{i}" for i in range(8)]
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_BORDERS = 40  # generations whose borders are drawn

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    id: str
    title: str
    summary: str
    """What it shows, with figures, for whoever does not see it."""
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 300
    wide: bool = False
    note: str = ""
    """A caption."""


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def number(value: float | None, digits: int = 4) -> str:
    """A figure for a sentence or a table; "–" where there is none."""
    if value is None or not abs(value) < MOST_FIGURE:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}g}"


def colour(runs: Sequence[RunFacts], i: int, single: str) -> dict[str, Any]:
    """A line's colour, and for several runs a dash of its own beside it."""
    return {"color": single} if len(runs) == 1 else {"color": RUNS[i % len(RUNS)], "dash": DASHES[(i // len(RUNS)) % 4]}


def named(runs: Sequence[RunFacts], i: int, name: str) -> str:
    return plot_text(name if len(runs) == 1 else f"{label(runs, i)} {name}".strip())


def label(runs: Sequence[RunFacts], i: int) -> str:
    """A run's name, with as many of its parents' as tell it from the others; one that is there twice gets a number."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, len(parts[i])):
        if sum(other[-depth:] == parts[i][-depth:] for other in parts) == 1:
            return "/".join(parts[i][-depth:])
    return f"{runs[i].name} ({i + 1})"


# -- over optimiser steps


def line_traces(runs: Sequence[RunFacts], i: int, key: str, name: str, single: str) -> list[Trace]:
    """A metric over steps: all it does faintly, and its mean over stretches of steps where there are many."""
    run = runs[i]
    x, y = run.series("step"), run.series(key)
    index = m4(y)
    if not len(index):
        return []
    many = len(index) > 240
    line = colour(runs, i, single)
    faint = {**line, "color": f"{line['color']}/0.3"} if many else line
    raw: Trace = {
        "type": "scatter",
        "mode": "lines" if len(index) > 1 else "markers",
        "x": x[index].astype(int).tolist(),
        "y": few_digits(y[index]),
        "name": named(runs, i, name),
        "line": {**faint, "width": 1 if many else 1.8},
        "hoverinfo": "skip" if many else "x+y+name",
        "showlegend": not many,
    }
    if not many:
        return [raw]
    xs, ys = bucket_means(x, y)
    smooth = {
        **raw,
        "mode": "lines",
        "x": few_digits(xs, 6),
        "y": few_digits(ys),
        "line": {**line, "width": 2},
        "hoverinfo": "x+y+name",
        "showlegend": True,
    }
    return [raw, smooth]


def borders(runs: Sequence[RunFacts]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines where a generation begins, and their labels; of one run only."""
    if len(runs) > 1:
        return [], []
    generation, step = runs[0].series("generation"), runs[0].series("step")
    starts = [i for i in range(1, len(step)) if generation[i] != generation[i - 1]]
    if not 0 < len(starts) <= MOST_BORDERS:
        return [], []
    style = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "@muted", "width": 1, "dash": "dot"}}
    shapes = [{**style, "x0": float(step[i]) - 0.5, "x1": float(step[i]) - 0.5} for i in starts]
    tag = {"yref": "paper", "y": 1, "yanchor": "bottom", "xanchor": "left", "showarrow": False, "font": {"size": 10}}
    return shapes, [{**tag, "x": float(step[i]) - 0.5, "text": f"g{generation[i]:.0f}"} for i in starts]


def extent(run: RunFacts, key: str, what: str, digits: int = 4) -> str:
    y = run.series(key)
    steps = run.series("step")[np.isfinite(y)]
    y = y[np.isfinite(y)]
    if not len(y):
        return f"{what}: no figures"
    low, high = int(y.argmin()), int(y.argmax())
    return (
        f"{what} from {number(y[0], digits)} (step {steps[0]:.0f}) to {number(y[-1], digits)} (step {steps[-1]:.0f}); lowest "
        f"{number(y[low], digits)} at step {steps[low]:.0f}, highest {number(y[high], digits)} at step {steps[high]:.0f}"
    )


def over_steps(
    runs: Sequence[RunFacts],
    id: str,
    title: str,
    keys: dict[str, tuple[str, str]],
    unit: str,
    *,
    log: bool = False,
    note: str = "",
) -> Figure | None:
    """Metrics {key: (name, colour)} over steps; None where no run has any."""
    traces, said = [], []
    for i, run in enumerate(runs):
        for key, (name, single) in keys.items():
            found = line_traces(runs, i, key, name if len(keys) > 1 else "" if len(runs) > 1 else name, single)
            traces += found
            if found:
                said.append(extent(run, key, f"{label(runs, i)}, {name}" if len(runs) > 1 else name))
    if not traces:
        return None
    shapes, tags = borders(runs)
    y = axis(unit, **({"type": "log", "dtick": "D2"} if log else {}))
    layout = {"xaxis": axis("optimiser step"), "yaxis": y, "shapes": shapes, "annotations": tags}
    return Figure(id, title, ". ".join(said) + ".", traces, layout, note=note)


def curves(runs: Sequence[RunFacts]) -> list[Figure]:
    """Loss and its terms, near-policy KL, learning rate, gradient norm, speed."""
    terms = {"loss": ("loss", "@accent"), "ce": ("CE", "@orange"), "kd": ("KD", "@green")}
    if len(runs) > 1:
        figures = [
            over_steps(
                runs,
                key,
                {"loss": "Loss", "ce": "Cross-entropy", "kd": "KD to the teacher"}[key],
                {key: terms[key]},
                "nats a token",
            )
            for key in terms
        ]
    elif np.nansum(np.abs(runs[0].series("kd"))) == 0:  # nothing but cross-entropy
        figures = [over_steps(runs, "loss", "Loss", {"loss": terms["loss"]}, "nats a response token")]
    else:
        figures = [over_steps(runs, "loss", "Loss and its two terms", terms, "nats a response token")]
    figures.append(near_policy(runs))
    figures.append(over_steps(runs, "lr", "Learning rate", {"lr": ("learning rate", "@accent")}, "rate"))
    figures.append(
        over_steps(runs, "grad", "Gradient norm", {"grad_norm": ("norm before clipping", "@accent")}, "norm", log=True)
    )
    speed = {"tokens_per_second": ("tokens/s", "@accent")}
    figures.append(over_steps(runs, "speed", "Training speed", speed, "response tokens a second"))
    figures.append(over_steps(runs, "fill", "Packing: fill of the rows", {"fill": ("fill", "@accent")}, "share"))
    return [figure for figure in figures if figure is not None]


def has_interval(figures: Mapping[str, float], key: str) -> bool:
    """Is there a figure with both ends of its interval?"""
    return all(name in figures for name in (key, f"{key}_low", f"{key}_high"))


def interval_bars(runs: Sequence[RunFacts], key: str) -> str:
    """What the bars of an evaluation figure are."""
    harness = any(f"{key}_stderr" in line.figures for run in runs for line in run.evaluations)
    return "Bars: 1.96 standard errors, as lm-eval gives them." if harness else "Bars: 95% Wilson intervals."


def verdicts_of(runs: Sequence[RunFacts]) -> list[str]:
    """The verdicts that npd's own rules give, and whatever others responses or manifests have."""
    found = {str(v) for run in runs for v in {*run.column("verdict")} if v}
    found |= {v for run in runs for manifest in run.manifests.values() for v in manifest.selection.verdicts}
    return [*VERDICTS, *sorted(found - {*VERDICTS})]


def verdict_colour(verdict: str) -> str:
    return f"@{verdict}" if verdict in VERDICTS else "@muted"


def evaluated(runs: Sequence[RunFacts]) -> list[str]:
    """Names of the figures that evaluations gave, but interval ends and counts."""
    keys = dict.fromkeys(key for run in runs for line in run.evaluations for key in line.figures)
    return [key for key in keys if for_people(key)]


def measured_tokens(run: RunFacts) -> np.ndarray:
    """[steps] response tokens of each step that a snapshot of the student wrote."""
    references = np.nan_to_num(run.series("reference_tokens"))
    return np.diff(run.series("tokens"), prepend=0.0) - references


def smooth_near_policy(run: RunFacts) -> np.ndarray:
    """[steps] the near-policy KL as schedule.kl_budget is held against."""
    return smoothed_kl(run.series("near_policy_kl"), measured_tokens(run), run.series("generation"), SMOOTHING)


def near_policy(runs: Sequence[RunFacts]) -> Figure | None:
    figure = over_steps(
        runs,
        "near-policy",
        "Near-policy KL",
        {"near_policy_kl": ("near-policy KL", "@accent")},
        "nats a token",
    )
    if figure is None:
        return None
    traces = [trace | ({} if len(runs) > 1 else {"line": {"color": "@accent/0.35", "width": 1}}) for trace in figure.traces]
    shapes = list(figure.layout["shapes"])
    said = [figure.summary]
    options = (run.option("schedule.kl_budget") for run in runs)
    budgets = {b for b in options if isinstance(b, int | float) and np.isfinite(b)}
    for i, run in enumerate(runs):
        y = smooth_near_policy(run)
        index = m4(y)
        if len(runs) == 1 and len(index):
            traces = traces[:1]
            line = {"color": "@accent", "width": 2.2}
            x = run.series("step")[index].astype(int).tolist()
            traces.append(
                {"type": "scatter", "mode": "lines", "x": x, "y": few_digits(y[index]), "name": "smoothed", "line": line}
            )
            said.append(f"Smoothed it ends at {number(float(y[index[-1]]))}")
        if any(line.near_policy_kl_is_proxy for line in run.steps):
            said.append(f"In {label(runs, i)} sampling was tempered or truncated: there it is a proxy")
    for budget in sorted(budgets):
        style = {"color": "@red", "width": 1.5, "dash": "dash"}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": budget, "y1": budget, "line": style})
        said.append(f"The budget is {budget:g}")
    note = "D_KL(student now ‖ snapshot that wrote the responses), estimated at every step." + (
        " Dashed: schedule.kl_budget." if budgets else " No schedule.kl_budget is set."
    )
    layout = figure.layout | {"shapes": shapes, "yaxis": axis("nats a token", rangemode="tozero")}
    return Figure("near-policy", "Near-policy KL", " ".join(s.rstrip(".") + "." for s in said), traces, layout, note=note)


def evaluation_curves(runs: Sequence[RunFacts]) -> list[Figure]:
    """Accuracy of each task with its interval, and the distance to the teacher, over steps."""
    figures: list[Figure] = []
    for key in evaluated(runs):
        traces: list[Trace] = []
        said: list[str] = []
        shapes: list[dict[str, Any]] = []
        for i, run in enumerate(runs):
            lines = [line for line in run.evaluations if key in line.figures]
            if not lines:
                continue
            y = [line.figures[key] for line in lines]
            trace: Trace = {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [line.step for line in lines],
                "y": few_digits(y),
                "name": named(runs, i, "student" if len(runs) == 1 else ""),
                "line": colour(runs, i, "@accent"),
            }
            if all(has_interval(line.figures, key) for line in lines):
                above = [line.figures[f"{key}_high"] - line.figures[key] for line in lines]
                below = [line.figures[key] - line.figures[f"{key}_low"] for line in lines]
                trace["error_y"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": few_digits(above),
                    "arrayminus": few_digits(below),
                    "thickness": 1,
                }
            traces.append(trace)
            ends = f"from {number(y[0])} at step {lines[0].step} to {number(y[-1])} at step {lines[-1].step}"
            said.append(f"{label(runs, i)}: {ends}")
            ceiling = run.teacher.get(key.replace("eval/", "teacher/", 1))
            if ceiling is not None:
                style = {"color": colour(runs, i, "@green")["color"], "width": 1.5, "dash": "dash"}
                shapes.append(
                    {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": ceiling, "y1": ceiling, "line": style}
                )
                said.append(f"The teacher has {number(ceiling)}")
        name = key.removeprefix("eval/")
        layout = {"xaxis": axis("optimiser step"), "yaxis": axis(plot_text(name)), "shapes": shapes}
        note = interval_bars(runs, key) if any("error_y" in t for t in traces) else ""
        note += " Dashed: the teacher." if shapes else ""
        figures.append(Figure(f"eval-{len(figures)}", name, ". ".join(said) + ".", traces, layout, note=note.strip()))
    return figures


def evaluation_points(runs: Sequence[RunFacts]) -> list[Figure]:
    """Each run's last figure on each task, with its interval, beside those of the others."""
    keys = dict.fromkeys(k for run in runs for line in run.evaluations[-1:] for k in line.figures if k.endswith("_low"))
    figures: list[Figure] = []
    for low in keys:
        key = low.removesuffix("_low")
        have = [
            (label(runs, i), run.evaluations[-1].figures)
            for i, run in enumerate(runs)
            if run.evaluations and has_interval(run.evaluations[-1].figures, key)
        ]
        if not have:
            continue
        y = [line[key] for _, line in have]
        trace: Trace = {
            "type": "scatter",
            "mode": "markers",
            "x": few_digits(y),
            "y": [plot_text(name) for name, _ in have],
            "showlegend": False,
            "marker": {"color": "@accent", "size": 9},
            "name": "",
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": few_digits([line[f"{key}_high"] - line[key] for _, line in have]),
                "arrayminus": few_digits([line[key] - line[low] for _, line in have]),
                "color": "@accent",
            },
        }
        name = key.removeprefix("eval/")
        said = "; ".join(f"{who} {line[key]:.3f} [{line[low]:.3f}, {line[f'{key}_high']:.3f}]" for who, line in have)
        layout = {"xaxis": axis(plot_text(name)), "yaxis": {"type": "category", "autorange": "reversed"}}
        height = 110 + 34 * len(have)
        figures.append(
            Figure(
                f"points-{len(figures)}",
                f"{name} at the end",
                said + ".",
                [trace],
                layout,
                height,
                note=interval_bars(runs, key),
            )
        )
    return figures


def retitled(figure: Figure, title: str) -> Figure:
    return replace(figure, title=title)
