"""Evaluation figures as people read them: shares in percent with their intervals, lm-eval's with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npd.report.facts import RunFacts
from npd.report.figures import has_interval, number


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def interval(figures: Mapping[str, float], key: str) -> str:
    """An evaluation figure, an accuracy with its 95% interval, one of lm-eval's with its standard error."""
    value = figures.get(key)
    if value is None:
        return "–"
    error = figures.get(f"{key}_stderr")
    if error is not None:
        return f"{point(figures, key)} ± {number(error, 2)}"
    if has_interval(figures, key):
        return f"{percent(value)} [{100 * figures[f'{key}_low']:.1f}, {100 * figures[f'{key}_high']:.1f}]"
    return point(figures, key)


def point(figures: Mapping[str, float], key: str) -> str:
    """An evaluation figure without its interval."""
    value = figures.get(key)
    if value is None:
        return "–"
    return percent(value) if _is_share(figures, key) else number(value, 4 if f"{key}_stderr" in figures else 3)


def _is_share(figures: Mapping[str, float], key: str) -> bool:
    """Is it a share, for people to read in percent? lm-eval's figures stand as it shows them."""
    if f"{key}_stderr" in figures:
        return False
    return has_interval(figures, key) or "accuracy" in key or "pass@" in key or key.endswith("agreement")


def is_share(runs: Sequence[RunFacts], key: str) -> bool:
    """Do all evaluations that have a figure have it as a share?"""
    return all(_is_share(line.figures, key) for run in runs for line in run.evaluations if key in line.figures)


def interval_note(runs: Sequence[RunFacts]) -> str:
    """What intervals and errors of evaluation figures are."""
    keys = {key for run in runs for line in run.evaluations for key in line.figures}
    of_harness = {key.removesuffix("_stderr") for key in keys if key.endswith("_stderr")}
    wilson = {key.removesuffix("_low") for key in keys if key.endswith("_low")} - of_harness
    notes = ["In brackets: 95% Wilson intervals."] if wilson else []
    return " ".join([*notes, *(["Behind ±: lm-eval's standard errors."] if of_harness else [])])
