"""The page's plots, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.analysis import Entries, Mean, over_seeds, paired, seeds_of
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.cells import TEACHER, Cell
from benchmarks.evidence.hypotheses import ALL
from benchmarks.evidence.tasks import TASKS

COLOURS = dict(
    zip(ARMS, ["#777777", "#e69f00", "#b8860b", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#d55e00"], strict=True)
)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "npd", "font.size": 8}  # the same file from the same entries
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
    file.write_text("".join(line.rstrip() + "\n" for line in file.read_text().splitlines()))
    _pyplot().close(figure)


def curves(entries: Entries, file: Path) -> None:
    """Accuracy against processor's seconds (left) and steps (right), a task a row; means over the seeds of an arm."""
    names = [name for name in TASKS if any(cell.task == name for cell in entries)]
    figure, axes = _pyplot().subplots(max(1, len(names)), 2, figsize=(9, 2.4 * max(1, len(names))), squeeze=False)
    for row, name in zip(axes, names, strict=False):
        teacher = over_seeds(entries, name, TEACHER, lambda e: 100 * e["curve"][0]["accuracy"])
        for axis, along in zip(row, ("cpu_seconds", "step"), strict=True):
            for arm in ARMS:
                runs = [entries[Cell(name, arm, seed)]["curve"] for seed in sorted(seeds_of(entries, name, arm))]
                if runs:
                    at = np.linspace(0, min(run[-1][along] for run in runs), 30)
                    each = [np.interp(at, [p[along] for p in r], [100 * p["accuracy"] for p in r]) for r in runs]
                    axis.plot(at, np.mean(each, 0), color=COLOURS[arm], label=ARMS[arm].title, linewidth=1.2)
            if teacher is not None:
                axis.axhline(teacher.value, color="#bbbbbb", linestyle=":", linewidth=1)
            axis.set_xlabel("CPU seconds" if along == "cpu_seconds" else "steps")
            axis.grid(alpha=0.2)
        row[0].set_ylabel(f"{name}: accuracy %")
    named = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    if named:
        figure.legend(named.values(), named.keys(), fontsize=7, loc="upper center", ncols=4)
    _save(figure, file)


def differences(entries: Entries, file: Path) -> None:
    """Each arm against NPD without a filter at equal steps and at equal seconds, a task a panel; 95% intervals over seeds."""
    names = [name for name in ALL if any(cell.task == name for cell in entries)]
    arms = [arm for arm in ARMS if arm != "npd-none"]
    figure, axes = _pyplot().subplots(1, max(1, len(names)), figsize=(11, 2.8), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        for equal, colour, offset in (("steps", "#0072b2", -0.15), ("seconds", "#d55e00", 0.15)):
            for place, arm in enumerate(arms):
                values = list(paired(entries, name, arm, "npd-none", equal).values())  # type: ignore[arg-type]
                if values:
                    mean = Mean.of(values)
                    axis.errorbar(mean.value, place + offset, xerr=mean.half or 0, fmt="o", markersize=3, color=colour)
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlim(-25, 25)
        axis.grid(alpha=0.2)
    axes[0][0].set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms])
    axes[0][0].invert_yaxis()
    figure.supxlabel("points against NPD without a filter; blue at equal steps, orange at equal seconds", fontsize=8)
    figure.tight_layout()
    _save(figure, file)
