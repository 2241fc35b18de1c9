"""The study of benchmarks/evidence: its verifiers, how figures are read from curves, and the whole of it, short."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evidence import page
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.analysis import Mean, contrast, fate_of, paired
from benchmarks.evidence.arms import timed
from benchmarks.evidence.cells import Cell, Results
from benchmarks.evidence.hypotheses import ABLATED, ALL, HYPOTHESES, TUNING, Contrast, Hypothesis
from benchmarks.evidence.plan import FEW, cells
from benchmarks.evidence.problems import FAMILIES, SKILLS, problems, verified
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.verified import WeighedByDelta
from npd.config import SelectionConfig
from npd.losses import check_divergence
from npd.records import PROXIMAL
from npd.registry import DIVERGENCES


@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_right_and_fit_and_a_seed_gives_them_again(family):
    kind, made = FAMILIES[family], problems(family, 300, "test")
    assert made == problems(family, 300, "test") != problems(family, 300, "another")
    assert len({problem.prompt for problem in made}) == 300
    for problem in made:
        assert len(problem.prompt) + 2 <= kind.prompt_tokens + 1  # a start token beside it
        assert set(problem.prompt + (problem.completion or "")) <= set(kind.characters)
        if problem.completion is None:
            assert not problem.check
        else:
            assert len(problem.completion) < kind.new_tokens
            assert verified(family, problem.check, problem.completion)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_is_spoilt_is_wrong_or_another_right_answer(family):
    rng = random.Random(0)
    for problem in problems(family, 200, "spoilt"):
        if problem.completion is None:
            assert not any(verified(family, problem.check, text) for text in ("", "0", problem.prompt))
            continue
        right = problem.completion
        for wrong in ("", right[:-1], right + right, right[::-1] + "x", problem.prompt, " ", "\x00", "#", "[]", "nan", "١٢"):
            if wrong and family == "palindromes" and wrong == right:
                continue
            assert not verified(family, problem.check, wrong), (problem, wrong)
        place = rng.randrange(len(right))
        changed = right[:place] + rng.choice(FAMILIES[family].characters) + right[place + 1 :]
        if family in ("sorting", "mixed", "palindromes") and changed != right:  # every character counts
            assert not verified(family, problem.check, changed), (problem, changed)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 20), st.text(max_size=60))
def test_a_verifier_never_raises(family, number, text):
    assert verified(family, problems(family, 21, "any")[number].check, text) in (True, False)


def test_any_way_to_pay_is_right_and_no_other():
    assert verified("coins", "20:479", "20-9=11;11-7=4;4-4=0;")
    assert verified("coins", "20:479", "20-4=16;16-9=7;7-7=0;")
    assert verified("coins", "20:479", "20-4=16;16-4=12;12-4=8;8-4=4;4-4=0;")
    for wrong in (
        "20-9=11;11-7=4;4-4=0",  # not ended
        "20-9=11;11-7=4;",  # not paid
        "20-9=11;11-7=5;5-5=0;",  # no such coin
        "20-9=12;12-4=8;8-4=4;4-4=0;",  # wrong difference
        "20-9=11;12-4=8;8-4=4;4-4=0;",  # goes on from elsewhere
        "20-9=11;11-7=4;4-4=0;0-4=-4;",
        "20-9=11;11-7=4;4-4=0;0-0=0;",
        "7-7=0;",  # starts elsewhere
        "20-20=0;",
        "020-9=11;11-7=4;4-4=0;",
        "20-9=11; 11-7=4;4-4=0;",
    ):
        assert not verified("coins", "20:479", wrong), wrong


def test_palindromes_and_skills_by_their_definitions():
    problem = next(p for p in problems("palindromes", 50, "many") if len(set(p.prompt)) > 3)
    letters = sorted(problem.prompt[:-1])
    half = letters[::2][: len(letters) // 2]
    odd = "".join(c for c in set(letters) if letters.count(c) % 2)
    for order in (half, half[::-1]):
        assert verified("palindromes", problem.check, "".join(order) + odd + "".join(reversed(order))) or not odd
    assert {name: act("4829") for name, act in SKILLS.values()} == {
        "reverse": "9284", "sort": "2489", "double": "8648", "running sum": "4243"
    }  # fmt: skip


def test_sorting_takes_no_number_that_is_off_by_one():
    problem = problems("sorting", 1, "near")[0]
    assert problem.completion is not None
    numbers = problem.completion.split()
    moved = [*numbers[:-1], str(int(numbers[-1]) + (1 if problem.prompt[0] == "<" else -1))]
    assert not verified("sorting", problem.check, " ".join(moved))
    assert not verified("sorting", problem.check, " ".join(reversed(numbers)))


# -- rules and divergences that are compared


def test_responses_with_a_higher_delta_are_kept_more_often():
    rng = np.random.default_rng(0)
    deltas = rng.permutation(4000) / 1000
    table = pa.table({"delta_ifd": deltas, "response_ids": [[int(n) for n in rng.integers(0, 50, 12)] for _ in deltas]})
    kept = WeighedByDelta()(table, SelectionConfig()).verdicts == PROXIMAL
    shares = [kept[(deltas >= at) & (deltas < at + 1)].mean() for at in range(4)]
    assert shares == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.05)
    assert (WeighedByDelta()(table, SelectionConfig()).verdicts == PROXIMAL).tolist() == kept.tolist()


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**31))
def test_divergences_that_weigh_tokens(tokens, symbols, seed):
    rng = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(tokens, symbols, generator=rng, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    teacher[:, -1] = -torch.inf  # the mass is raw
    each = [
        sum(math.exp(t) * (t - s) for t, s in zip(a[:-1], b[:-1], strict=True))
        for a, b in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    half = DIVERGENCES["furthest_tokens"](teacher, student).sum(-1).tolist()
    middle = sorted(each)[(tokens - 1) // 2]
    assert half == pytest.approx([one if one >= middle else 0 for one in each])
    far = [max(one, 0) for one in each]
    mean = sum(far) / tokens
    weighed = DIVERGENCES["weighed_tokens"](teacher, student).sum(-1).tolist()
    assert weighed == pytest.approx([one * f / max(f + mean, 1e-9) for one, f in zip(each, far, strict=True)])


def test_divergences_of_the_study_can_be_trained_with():
    for name in ("furthest_tokens", "weighed_tokens"):
        check_divergence(name, "raw")


# -- what is read from curves


def entry(task: str, arm: str, seed: int, points: list[tuple[int, float, float]], budget: int = 10) -> dict:
    curve = [{"step": step, "cpu_seconds": seconds, "accuracy": accuracy} for step, seconds, accuracy in points]
    return {"task": task, "arm": arm, "seed": seed, "budget": budget, "curve": curve}


def test_runs_are_compared_where_they_end_and_at_equal_seconds_by_their_twins():
    made = {
        Cell("t", "sft", 0): entry("t", "sft", 0, [(0, 1.0, 0.2), (10, 4.0, 0.6)]),
        Cell("t", "sft@seconds", 0): entry("t", "sft@seconds", 0, [(0, 1.0, 0.2), (14, 5.6, 0.65)], budget=14),
        Cell("t", "npd-none", 0): entry("t", "npd-none", 0, [(0, 2.0, 0.3), (10, 6.0, 0.5)]),
        Cell("t", "npd", 0): entry("t", "npd", 0, [(0, 2.0, 0.3), (10, 6.0, 0.4)]),
    }
    made = {cell: one | {"start": "a"} for cell, one in made.items()}
    found = {equal: paired(made, "t", "sft", "npd-none", equal)[0] for equal in ("steps", "seconds", "start")}
    assert found == pytest.approx({"steps": 10.0, "seconds": 15.0, "start": -10.0})
    assert paired(made, "t", "npd", "npd-none", "seconds") == pytest.approx({0: -10.0})
    assert paired(made, "t", "strict", "npd-none", "steps") == {}


def test_cells_are_paired_only_where_they_go_on_from_the_same_warm_student():
    base, arm = Cell("t", "npd-none", 0), Cell("t", "npd", 0)
    made = {cell: entry("t", cell.arm, 0, [(0, 1.0, 0.2), (10, 4.0, 0.6)]) for cell in (base, arm)}
    here, there = {"machine": {"processor": "here"}}, {"machine": {"processor": "there"}}
    for mine, its, together in (
        ({"start": "a"} | here, {"start": "a"} | there, True),
        ({"start": "a"} | here, {"start": "b"} | here, False),
        (here, here, True),
        (here, there, False),
        ({"start": "a"} | here, here, True),
        ({"start": "a"} | here, there, False),
        (here, here | entry("t", "npd", 0, [(0, 2.0, 0.2), (10, 4.0, 0.6)]), True),
        (here, here | entry("t", "npd", 0, [(0, 1.0, 0.3), (10, 4.0, 0.6)]), False),
    ):
        entries = {base: made[base] | mine, arm: made[arm] | its}
        assert (paired(entries, "t", "npd", "npd-none", "steps") != {}) == together, (mine, its)


def test_contrasts_are_paired_by_seed_and_tasks_weigh_alike():
    made = {}
    for task, lead in (("t", 0.1), ("u", 0.3)):
        for seed in range(3):
            base = 0.1 * seed
            for arm, accuracy in (("a", base + lead + 0.01 * seed), ("b", base)):
                made[Cell(task, arm, seed)] = entry(task, arm, seed, [(0, 0.0, 0.0), (10, 1.0, accuracy)])
    del made[Cell("u", "b", 2)]  # a seed that lacks a cell has no part
    found = contrast(made, Contrast(("t", "u"), "a", "b"))
    assert found == pytest.approx({0: 20.0, 1: 21.0})
    mean = Mean.of([20.0, 21.0, 25.0])
    assert (mean.value, mean.half) == pytest.approx((22.0, 4.30 * statistics.stdev([20, 21, 25]) / math.sqrt(3)))
    assert f"{mean:+.1f}" == "+22.0 ± 6.6"


@pytest.mark.parametrize(
    ("leads", "above", "fate"),
    [
        ([0.10, 0.11, 0.12], 0.0, "supported"),
        ([-0.10, -0.11, -0.12], 0.0, "refuted"),
        ([-0.1, 0.1, 0.0], 0.0, "open"),
        ([0.1], 0.0, "open"),
        ([-0.010, -0.011, -0.009], -2.0, "supported"),
        ([-0.030, -0.031, -0.029], -2.0, "refuted"),
        ([], 0.0, "not run"),
    ],
)
def test_fates(leads, above, fate):
    made = {}
    for seed, lead in enumerate(leads):
        for arm, accuracy in (("a", 0.5 + lead), ("b", 0.5)):
            made[Cell("t", arm, seed)] = entry("t", arm, seed, [(0, 0.0, 0.0), (10, 1.0, accuracy)])
    assert fate_of(made, Hypothesis("", "", "", Contrast(("t",), "a", "b"), above=above))[1] == fate


# -- the plan


def test_the_plan_has_what_the_hypotheses_ask_and_ablates_tuning_tasks_alone():
    planned = cells(5)
    assert len(planned) == len(set(planned))
    assert set(cells(2)) < set(cells(3)) < set(planned)
    for hypothesis in HYPOTHESES:
        for one in filter(None, (hypothesis.first, hypothesis.second)):
            arms = {arm if one.equal != "seconds" else timed(arm) for arm in (one.arm, one.against)}
            assert {Cell(task, arm, FEW - 1) for task in one.tasks for arm in arms} <= set(planned)
    assert not any(TASKS[task].held_out for task in (*ABLATED, *TUNING))
    assert sum(TASKS[task].held_out for task in ALL) == len(ALL) / 2


def test_the_whole_study_short(tmp_path: Path, capsys):
    def study(*options: str) -> str:
        main(["--short", "--seeds", "1", "--cache", str(tmp_path), *options])
        return capsys.readouterr().out

    said = study("--only", "^mixed/(teacher|sft@seconds|kd-sequence|kd-topk|npd-adaptive|npd-none|npd-mixed|strict)/")
    assert len(said.splitlines()) == 8
    study("--only", "^sums/(teacher|wrong|npd)/")
    entries = Results(tmp_path / "results").read()
    assert {cell.task for cell in entries} == {"mixed", "sums"}
    for cell, found in entries.items():
        if cell.arm == "teacher":
            continue
        steps = [point["step"] for point in found["curve"]]
        assert steps[0] == 0
        assert steps[-1] == found["steps"] == found["budget"]
        assert [point["cpu_seconds"] for point in found["curve"]] == sorted(p["cpu_seconds"] for p in found["curve"])
        assert sum("pass@8" in point for point in found["curve"]) == 1
    own, text = entries[Cell("mixed", "npd-none", 0)], entries[Cell("mixed", "kd-topk", 0)]
    assert own["generated"]["student"]
    assert not own["generated"]["references"]
    assert text["generated"]["references"] > 10 * text["generated"]["student"]
    assert own["filter"]["kept"] == own["filter"]["rows"]
    assert "| mixed | held out |" in (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "evidence-curves.svg").exists()
    before = (tmp_path / "results/mixed.jsonl").read_text()
    assert not study("--only", "^mixed/strict/")  # what stands is not run again
    assert "mixed/npd-none/0 was: " in study("--cell", "mixed/npd-none/0")
    again = [json.loads(line) for line in (tmp_path / "results/mixed.jsonl").read_text().splitlines()]
    old = [json.loads(line) for line in before.splitlines()]
    assert [one["curve"][-1]["accuracy"] for one in again] == [one["curve"][-1]["accuracy"] for one in old]


def test_the_page_says_what_stands():
    """docs/evidence.md is what the results in the repository give."""
    entries = Results(Path("benchmarks/results/evidence")).read()
    text = Path("docs/evidence.md").read_text()
    for name, make in page.BLOCKS.items():
        assert f"<!-- {name} -->\n{make(entries)}\n<!-- end -->" in text
