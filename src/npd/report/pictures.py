"""Pictures of a run's responses and of its processes, as data for plotly.js."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from npd.observe.events import SpanName
from npd.records import number_of
from npd.report.facts import RunFacts
from npd.report.figures import RUNS, Figure, Trace, axis, label, named, verdict_colour, verdicts_of
from npd.report.reduce import edges_for, few_digits, histogram, spread
from npd.report.text import plot_text
from npd.report.timeline import coarser, innermost, lanes

SYMBOLS = {"proximal": "circle", "degenerate": "triangle-down", "disconnect": "diamond", "undefined": "x"}
MOST_POINTS = 1500  # of a scatter
MOST_BOXES = 60
LANE_STRETCHES = 400  # a lane of the timeline is this many stretches long at most


# -- Δ-IFD


def bounds(run: RunFacts) -> tuple[float, float] | None:
    """The widest band that a manifest says was kept; None where none says so.

    Manifests that have no bounds may be of a rule without any, or older than their being kept there: the configured band
    then counts if every verdict read is what it gives.
    """
    pairs = [pair for manifest in run.manifests.values() if (pair := manifest.selection.bounds) is not None]
    if pairs:
        return min(low for low, _ in pairs), max(high for _, high in pairs)
    low, high = (number_of(run.option(f"selection.{end}")) for end in ("lower", "upper"))
    delta, verdict = run.column("delta_ifd").astype(float), run.column("verdict")
    judged = np.isfinite(delta)
    given = np.where(delta < low, "degenerate", np.where(delta > high, "disconnect", "proximal"))
    return (low, high) if low <= high and judged.any() and (given[judged] == verdict[judged]).all() else None


def delta_histogram(run: RunFacts, id: str = "delta") -> Figure | None:
    """Δ-IFD of all responses read, stacked by verdict, with the borders of the bands."""
    delta, verdict = run.column("delta_ifd").astype(float), run.column("verdict")
    if not np.isfinite(delta).any():
        return None
    band = bounds(run)
    low, high = np.quantile(delta[np.isfinite(delta)], (0.005, 0.995))
    reach = max(1.0, high - low)  # a border farther away is not drawn: it would leave no room for the responses
    inside = [b for b in band or () if low - reach <= b <= high + reach]
    edges = edges_for(delta, 70, *inside)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    traces, below, above = [], 0, 0
    for name in verdicts_of([run]):
        counts, under, over = histogram(delta[verdict == name], edges)
        below, above = below + under, above + over
        if counts.sum():
            style = {"color": verdict_colour(name), "line": {"width": 0}}
            traces.append(
                {
                    "type": "bar",
                    "x": few_digits(centres),
                    "y": counts.tolist(),
                    "width": float(width),
                    "name": plot_text(name),
                    "marker": style,
                }
            )
    shapes: list[dict[str, Any]] = []
    if band:
        ends = [float(edges[0]), *np.clip(band, edges[0], edges[-1]).tolist(), float(edges[-1])]
        for name, low, high in zip(("degenerate", "proximal", "disconnect"), ends, ends[1:], strict=False):
            if high > low:
                band_style = {"fillcolor": f"@{name}/0.07", "line": {"width": 0}, "layer": "below"}
                where = {"yref": "paper", "y0": 0, "y1": 1, "x0": float(low), "x1": float(high)}
                shapes.append({"type": "rect", **where, **band_style})
    for value in inside:
        dashed: dict[str, Any] = {"color": "@muted", "width": 1.5, "dash": "dash"}
        shapes.append({"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": value, "x1": value, "line": dashed})
    finite = delta[np.isfinite(delta)]
    q = np.quantile(finite, (0.05, 0.5, 0.95))
    summary = f"{len(finite):,} responses; Δ at 5%, 50% and 95%: {q[0]:.3f}, {q[1]:.3f}, {q[2]:.3f}. " + ", ".join(
        f"{name} {int((verdict == name).sum()):,}" for name in verdicts_of([run]) if (verdict == name).any()
    )
    if band:
        summary += f". Kept from {band[0]:.3g} to {band[1]:.3g}"
    note = "Shaded: degenerate, proximal, disconnect." if band else ""
    for border in (b for b in band or () if b not in inside):
        note += f" The border at {border:g} lies beyond what is drawn."
    note += left_out(below, above)
    layout = {
        "barmode": "stack",
        "bargap": 0,
        "xaxis": axis("Δ = IFD of the teacher − IFD of the student"),
        "yaxis": axis("responses"),
        "shapes": shapes,
    }
    return Figure(id, "Δ-IFD of every response", summary + ".", traces, layout, height=320, note=note.strip())


def left_out(below: int, above: int) -> str:
    """What a histogram's note says of the responses beyond it."""
    if not below and not above:
        return ""
    return f" {below:,} responses lie to the left of what is drawn and {above:,} to the right."


def delta_overlay(runs: Sequence[RunFacts]) -> Figure | None:
    """Δ of several runs over each other, as shares of each run's responses."""
    deltas = [run.column("delta_ifd").astype(float) for run in runs]
    deltas = [d[np.isfinite(d)] for d in deltas]
    if sum(len(d) > 0 for d in deltas) < 2:
        return None
    edges = edges_for(np.concatenate(deltas), 70, 0.0)
    traces: list[Trace] = []
    said = []
    below = above = 0
    for i, d in enumerate(deltas):
        if len(d):
            counts, under, over = histogram(d, edges)
            below, above = below + under, above + over
            line = {"color": RUNS[i % len(RUNS)], "shape": "hvh", "width": 1.8}
            x, y = few_digits((edges[:-1] + edges[1:]) / 2), few_digits(counts / len(d))
            traces.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "name": named(runs, i, ""), "line": line})
            said.append(f"{label(runs, i)}: median {np.median(d):.3f} of {len(d):,} responses")
    layout = {"xaxis": axis("Δ"), "yaxis": axis("share of the run's responses")}
    note = left_out(below, above).strip()
    return Figure("delta-overlay", "Δ-IFD of every run", "; ".join(said) + ".", traces, layout, wide=True, note=note)


def ifd_scatter(run: RunFacts, id: str = "scatter") -> Figure | None:
    """IFD of the teacher over that of the student, by verdict; the diagonal is Δ = 0."""
    x, y = run.column("ifd_student").astype(float), run.column("ifd_teacher").astype(float)
    verdict = run.column("verdict")
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(finite):
        return None
    shown = finite[spread(verdict[finite].astype(str), MOST_POINTS)]
    low = float(min(0.0, np.quantile(x[finite], 0.005), np.quantile(y[finite], 0.005)))
    high_x, high_y = float(np.quantile(x[finite], 0.995)) * 1.05, float(np.quantile(y[finite], 0.995)) * 1.05
    shapes = []
    for offset in dict.fromkeys([0.0, *(b for b in bounds(run) or () if np.isfinite(b))]):
        style = {"color": "@muted", "width": 1.2, "dash": "dash" if offset else "solid"}
        shapes.append(
            {
                "type": "line",
                "x0": low,
                "x1": high_x,
                "y0": low + offset,
                "y1": high_x + offset,
                "line": style,
                "layer": "below",
            }
        )
    traces = []
    for name in verdicts_of([run]):
        here = shown[verdict[shown] == name]
        if len(here):
            size, symbol = 5 if name == "proximal" else 6, SYMBOLS.get(name, "circle")
            marker = {"color": f"{verdict_colour(name)}/0.65", "size": size, "symbol": symbol}
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": few_digits(x[here], 4),
                    "y": few_digits(y[here], 4),
                    "name": plot_text(name),
                    "marker": marker,
                }
            )
    layout = {
        "xaxis": axis("IFD of the student", range=[low, high_x]),
        "yaxis": axis("IFD of the teacher", range=[low, high_y]),
        "shapes": shapes,
    }
    summary = (
        f"{len(shown):,} of {len(finite):,} responses, as many of each verdict as of another where there are enough. Median "
        f"IFD of the student {np.median(x[finite]):.3f}, of the teacher {np.median(y[finite]):.3f}."
    )
    note = "Solid: Δ = 0. Dashed: the borders of the band." if bounds(run) else "Solid: Δ = 0."
    return Figure(id, "IFD of teacher and student", summary, traces, layout, height=360, note=note)


def boxes(run: RunFacts, by: str) -> Figure | None:
    """Quantiles of Δ (5, 25, 50, 75, 95%) by generation or by source, as the manifests have them."""
    rows: list[tuple[str, dict[str, float]]] = []
    summed = [(g, manifest.selection) for g, manifest in sorted(run.manifests.items())]
    if by == "generation":
        rows = [(f"g{g}" if g >= 0 else "references", s.delta_ifd_quantiles) for g, s in summed]
    elif summed:
        newest = [s for g, s in summed if g >= 0] or [s for _, s in summed]
        rows = [(name or "(none)", s.delta_ifd_quantiles) for name, s in newest[-1].sources.items()]
    rows = [(name, q) for name, q in rows if len(q) == 5]
    if len(rows) < 2:
        return None
    if len(rows) > MOST_BOXES:
        rows = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, MOST_BOXES).round().astype(int))]
    at = {key: [q[key] for _, q in rows] for key in ("0.05", "0.25", "0.5", "0.75", "0.95")}
    trace: Trace = {
        "type": "box",
        "x": [plot_text(name) for name, _ in rows],
        "lowerfence": few_digits(at["0.05"]),
        "q1": few_digits(at["0.25"]),
        "median": few_digits(at["0.5"]),
        "q3": few_digits(at["0.75"]),
        "upperfence": few_digits(at["0.95"]),
        "marker": {"color": "@accent"},
        "line": {"width": 1.2},
        "showlegend": False,
        "name": "",
    }
    title = "Δ-IFD by generation" if by == "generation" else "Δ-IFD by source, newest generation"
    summary = "Median of Δ: " + ", ".join(f"{name} {q['0.5']:.3f}" for name, q in rows) + "."
    layout = {"xaxis": {"type": "category"}, "yaxis": axis("Δ")}
    return Figure(f"by-{by}", title, summary, [trace], layout, note="Boxes: 25 to 75%; whiskers: 5 to 95%.")


# -- responses


def lengths(run: RunFacts, id: str = "lengths") -> Figure | None:
    """Response lengths, those that stopped and those that were cut off."""
    tokens, finish = run.column("tokens").astype(float), run.column("finish_reason")
    if not len(tokens):
        return None
    edges = edges_for(tokens, 50, whole=True)
    centres = (edges[:-1] + edges[1:]) / 2
    traces = []
    for name, said, tint in (("stop", "stopped", "@accent"), ("length", "cut off by max_new_tokens", "@orange")):
        counts, _, _ = histogram(tokens[finish == name], edges)
        if counts.sum():
            traces.append(
                {"type": "bar", "x": few_digits(centres), "y": counts.tolist(), "name": said, "marker": {"color": tint}}
            )
    cut, quantiles = int((finish == "length").sum()), np.quantile(tokens, (0.05, 0.5, 0.95))
    summary = (
        f"{len(tokens):,} responses; tokens at 5%, 50% and 95%: {', '.join(f'{q:.0f}' for q in quantiles)}. "
        f"Cut off: {cut:,} ({cut / len(tokens):.1%})."
    )
    layout = {"barmode": "stack", "bargap": 0.05, "xaxis": axis("response tokens"), "yaxis": axis("responses")}
    return Figure(id, "Response lengths", summary, traces, layout)


# -- time

COLOURS: dict[str, str] = {
    SpanName.TRAIN: "@green",
    SpanName.GENERATE: "@accent",
    SpanName.SCORE: "@purple",
    SpanName.WAIT: "@wait",
    SpanName.LOAD: "@orange",
    SpanName.EVALUATE: "@yellow",
    SpanName.WRITE: "@sky",
    SpanName.PUBLISH: "@red",
    SpanName.CHECKPOINT: "@red",
    SpanName.SAVE: "@red",
    SpanName.STORE: "@sky",
    SpanName.CHECK: "@yellow",
    SpanName.FINISH: "@sky",
    SpanName.MIRROR: "@sky",
}


def timeline(run: RunFacts, id: str = "timeline") -> Figure | None:
    """What every process did when, innermost spans only."""
    found = lanes(run.events)
    if not found:
        return None
    origin = min(s.start for spans in found.values() for s in spans)
    wall = max(s.end for spans in found.values() for s in spans) - origin
    roles: dict[tuple[str, str], list[Any]] = {}
    for (role, _, thread), spans in found.items():  # a process that was started again goes on in its lane
        name = role if thread == "MainThread" else f"{role}, {thread}"
        roles.setdefault((name, role), []).extend(innermost(spans))
    bars: dict[str, list[tuple[str, float, float]]] = {}
    said = []
    for (name, _), stretches in roles.items():
        stretches.sort(key=lambda s: s.start)
        shown = coarser(stretches, max(1e-3, wall / LANE_STRETCHES))
        for s in shown:
            bars.setdefault(s.name, []).append((name, s.start - origin, s.end - s.start))
        busy: dict[str, float] = {}
        for s in stretches:
            busy[s.name] = busy.get(s.name, 0.0) + s.end - s.start
        most = sorted(busy.items(), key=lambda item: -item[1])[:4]
        said.append(f"{name}: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in most))
    names = [name for name, _ in roles]
    traces = []
    for what, entries in sorted(bars.items(), key=lambda item: -sum(e[2] for e in item[1])):
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [plot_text(e[0]) for e in entries],
                "base": [round(e[1], 3) for e in entries],
                "x": [round(e[2], 3) for e in entries],
                "name": plot_text(what),
                "marker": {
                    "color": COLOURS.get(what, "@muted"),
                    "line": {"width": 0},
                    **({"pattern": {"shape": "/"}} if what == SpanName.WAIT else {}),
                },
                "hovertemplate": "%{fullData.name}: %{x:.2f} s from %{base:.1f} s<extra>%{y}</extra>",
            }
        )
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "xaxis": axis("seconds since the start", range=[0, max(wall, 1e-3)]),
        "yaxis": {
            "type": "category",
            "autorange": "reversed",
            "categoryarray": [plot_text(n) for n in names],
            "categoryorder": "array",
        },
    }
    height = 130 + 42 * len(names)
    return Figure(
        id, "What every process did", f"{wall:.1f} s in all. " + "; ".join(said) + ".", traces, layout, height, wide=True
    )
