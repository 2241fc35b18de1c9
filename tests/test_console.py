"""What commands say on a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from npd.observe import console
from npd.observe.display import Display
from npd.records import EngineCheck, GenerationEnd, Manifest, SelectionSummary
from npd.run import DistillResult
from npd.store import REFERENCE


def said(show: Any, *args: Any) -> str:
    file = io.StringIO()
    show(*args, Display(Console(file=file, width=160)))
    return " ".join(file.getvalue().replace("┃", " ").replace("│", " ").split())


QUANTILES = {"0.05": -0.25, "0.5": 0.125, "0.95": 0.5}


def manifest(bounds: tuple[float, float] | None = None, generation: int = 1) -> Manifest:
    one = SelectionSummary(4, {"proximal": 3, "too_short": 1}, QUANTILES, bounds)
    sources = {"a": one, "": SelectionSummary(2, {"proximal": 2}, {})}
    selection = SelectionSummary(6, {"proximal": 5, "too_short": 1}, QUANTILES, bounds, sources=sources)
    return Manifest(generation, 6, (), 1, selection, response_tokens=1234, length_stops=2)


def test_a_generation_as_a_table():
    shown = said(console.show_generation, manifest())
    assert "Generation 1: 1,234 response tokens, 2 stopped by length" in shown
    assert "source responses proximal too_short delta 5/50/95%" in shown
    assert "all 6 5 1 -0.25 0.12 0.50" in shown
    assert "a 4 3 1 -0.25 0.12 0.50" in shown
    assert "(none) 2 2 0 -" in shown
    assert "kept from, to" not in shown
    assert "References: 1,234 response tokens" in said(console.show_generation, manifest(generation=REFERENCE))


def test_bounds_are_shown_where_the_manifest_has_them():
    shown = said(console.show_generation, manifest((-0.05, 0.75)))
    assert "delta 5/50/95% kept from, to" in shown
    assert "a 4 3 1 -0.25 0.12 0.50 -0.05 0.75" in shown
    assert "(none) 2 2 0 - -" in shown


def test_generations_inside_a_task_are_not_shown():
    file = io.StringIO()
    display = Display(Console(file=file))
    with display.task("distill", 100, "%"):
        console.show_generation(manifest(), display)
    assert file.getvalue() == ""


def test_an_engine_that_is_far_off_is_a_warning():
    check = EngineCheck(4, 250, -0.02, 0.0456)
    assert said(console.warn_of_engine, check, 0.05) == ""
    warning = said(console.warn_of_engine, check, 0.03)
    assert "by 0.0456 nats per token on average (rollout.check_bound 0.03, 250 tokens of 4 responses)" in warning
    assert said(console.warn_of_engine, EngineCheck(1, 1, 0.0, float("nan")), 1.0).startswith("Warning")


def result(**changes: Any) -> DistillResult:
    facts: dict[str, Any] = {
        "run_dir": Path("runs/x"),
        "student": Path("runs/x/student"),
        "steps": 12,
        "tokens": 3000,
        "before": {"eval/sums/accuracy": 0.25, "eval/sums/accuracy_low": 0.125, "eval/sums/accuracy_high": 0.5},
        "after": {"eval/kl_to_teacher": 0.5, "eval/kl_tokens": 80.0},
        "seconds": {"train": 4.0},
        "by_role": {"trainer": {"train": 4.0, "wait": 0.04, "wall": 10.0}, "trainer-1": {"wall": 1.0}},
        "publications": {"count": 2.0, "blocked": 0.5, "written": 1.5},
    }
    return DistillResult(**facts | changes)


def test_the_end_of_a_run():
    shown = said(console.show_result, result())
    assert "figure before after" in shown
    assert "sums/accuracy 25.0% [12.5%, 50.0%] -" in shown
    assert "kl_to_teacher - 0.5000" in shown
    assert "kl_tokens" not in shown
    assert "12 optimiser steps on 3,000 response tokens, 750 tokens/s while training." in shown
    assert "trainer: trained 40%, waited 0.4% of 10 s." in shown
    assert "trainer-1" not in shown
    assert "2 snapshots published: training stood still for 0.50 s, they took 1.50 s to write." in shown
    assert "Generations" not in shown


@pytest.mark.parametrize("proxy", [False, True])
def test_how_generations_ended(proxy):
    ends = [
        GenerationEnd(
            g,
            generation=g,
            reason="kl_budget",
            passes=1.5,
            near_policy_kl_is_proxy=proxy,
            near_policy_kl_smoothed=0.125 if g else None,
        )
        for g in range(25)
    ]
    shown = said(console.show_result, result(generations=[end.to_json() for end in ends]))
    assert "Generations (the last 20)" in shown
    assert "24 1.50 kl_budget 0.1250" in shown
    assert " 4 1.50" not in shown
    assert ("near-policy KL (proxy)" in shown) == proxy


def test_an_evaluation_in_a_line():
    figures = {"eval/sums/accuracy": 0.5, "eval/sums/accuracy_low": 0.4, "eval/kl_to_teacher": 0.12345}
    assert said(console.show_evaluation, "step 3", figures) == "step 3: sums/accuracy 0.5, kl_to_teacher 0.1235"
    assert said(console.show_evaluation, "teacher", {"teacher/sums/accuracy": 1.0}) == "teacher: sums/accuracy 1"


def test_a_plan_and_its_notes():
    shown = said(console.show_plan, "sft", "runs/x", [["prompts", "3"]], ["A note.", "Nothing was run."])
    assert "npd sft: the plan for runs/x" in shown
    assert shown.index("prompts 3") < shown.index("A note.") < shown.index("Nothing was run.")
