"""The comparison of benchmarks/smollm2 on the demo's models; its plans and prompts; models' texts on a page."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common, smollm2, smollm2_prompts, tables
from benchmarks.smollm2 import ARMS, CLOSE, LEAST, RUNS, Arm, Plan, Rates, planned
from npd.demo.demo import TEACHER
from npd.demo.task import make_problems
from npd.errors import UserError
from npd.observe.display import Display
from npd.store import append_line


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The comparison's arguments for the demo's teacher, and its directory."""

    def prompts(seed, count):
        return [problem.prompt for problem in make_problems(count, seed=seed)]

    def problems(each):
        return [{"task": "sum", "prompt": p.prompt, "answer": p.answer} for p in make_problems(each, seed=77)]

    def write(file, texts):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    monkeypatch.setattr(smollm2_prompts, "trained_on", prompts)
    monkeypatch.setattr(smollm2_prompts, "instructions", lambda held_out: prompts(78, 12))
    monkeypatch.setattr(smollm2_prompts, "held_out_problems", problems)
    monkeypatch.setattr(smollm2, "write_prompts", write)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    size = {"prompts": 24, "new-tokens": 24, "batch-tokens": 512, "at-once": 8, "held-out": 6, "problems": 5, "minutes": 0.02}
    where = ["--device", "cpu", "--teacher", TEACHER, "--layers", "3", "--out", str(tmp_path / "out")]
    return [*where, *(text for key, value in size.items() for text in (f"--{key}", str(value)))], tmp_path


def test_the_whole_of_it_on_toy_models(toy, monkeypatch, capsys):
    arguments, place = toy
    monkeypatch.setattr(smollm2, "LEAST", -1e9)  # seconds of a loaded machine decide nothing here
    monkeypatch.setattr(smollm2, "CLOSE", 1e9)
    monkeypatch.setattr(smollm2, "planned", lambda *given: smollm2.Plan(900, 20, 3))
    smollm2.main([*arguments, "--only", "sft"])
    first = json.loads((place / "results/smollm2.json").read_text())["runs"]
    assert [run["arm"] for run in first] == ["teacher", "start", "sft"]
    smollm2.main(arguments)
    results = json.loads((place / "results/smollm2.json").read_text())
    runs = {run["arm"]: run for run in results["runs"]}
    assert list(runs) == ["teacher", "start", *ARMS]
    assert results["runs"][:3] == first  # what stood was not run again
    teacher, start = runs["teacher"]["figures"], runs["start"]["figures"]
    assert teacher["kl_to_teacher"] == teacher["reverse_kl_to_teacher"] == pytest.approx(0, abs=1e-4)
    assert teacher["kl on the teacher's text"] == pytest.approx(0, abs=1e-4)
    assert teacher["top1_agreement"] == 1.0
    assert start["kl_to_teacher"] > 0.1
    assert start["kl on the teacher's text"] > 0.1
    assert start["reverse_kl_to_teacher"] > 0.1
    for name in ARMS:
        assert runs[name]["tokens"] >= 900
        assert 0 < runs[name]["training_seconds"] < runs[name]["seconds"]
        assert runs[name]["losses"][1] < runs[name]["losses"][0]
        assert len(runs[name]["samples"]) == smollm2.SAMPLES
        assert runs[name]["figures"]["problems"] == 5
        assert runs[name]["figures"]["kl on the teacher's text"] < start["kl on the teacher's text"]
    assert runs["sft"]["generations"] == 1
    assert not list((place / "out").glob("npd*"))  # runs are large, and gone
    text = tables.filled("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in tables.BLOCKS if name.startswith("smollm2")))
    assert text  # with the repository's own results, or none
    for make in (tables.smollm2, tables.smollm2_problems, tables.smollm2_samples, tables.machine):
        shown = make(results)
        assert len({line.count(" | ") for line in shown.splitlines()}) == 1
        assert make is tables.machine or all(arm.title in shown for arm in ARMS.values())
    assert results["options"]["minutes"] == 0.02
    with pytest.raises(UserError, match=r"results of other options \(prompts 24\)"):
        smollm2.main([*arguments, "--prompts", "25"])


RATES = Rates(
    teacher_writes=0.4,
    teacher_reads_own=0.08,
    writes=0.3,
    reads=0.1,
    reads_free=0.15,
    trains=0.01,
    tokens=100.0,
    kept=0.5,
    other=3.0,
    apart=0.0,
)
PROMPTS = 100


def takes(arm: Arm, plan: Plan, rates: Rates = RATES) -> dict[str, Any]:
    """An entry of a run on a machine that has these rates."""
    answered = plan.answered * arm.generations
    before = rates.other
    if "data" in arm.sections:
        before += PROMPTS * (rates.teacher_writes + (rates.teacher_reads_own if arm.command == "distill" else 0))
    before += answered * (rates.writes + rates.reads + (rates.reads_free if arm is ARMS["npd"] else 0))
    tokens = float(plan.tokens)
    if arm.command == "distill":
        share = 0.7 if arm is ARMS["npd-mixed"] else 1.0
        of_pass = rates.tokens * (rates.kept if arm is ARMS["npd"] else 1) / share
        tokens = min(tokens, plan.passes * answered * of_pass)
    training = tokens * rates.trains
    passes = tokens / of_pass / plan.answered if arm.command == "distill" else 1.0
    entry = {"seconds": before + training, "training_seconds": training, "tokens": tokens, "passes": passes}
    return entry | {"answered": plan.answered}


@pytest.mark.parametrize("name", list(ARMS))
@given(
    seconds=st.floats(200, 5000),
    believed=st.lists(st.floats(0.5, 2), min_size=8, max_size=8),
)
def test_a_plan_takes_the_seconds_it_is_given(name, seconds, believed):
    arm = ARMS[name]
    plan = planned(arm, RATES, seconds, PROMPTS, [])
    entry = takes(arm, plan)
    assert entry["seconds"] == pytest.approx(seconds, rel=0.03)  # whole prompts
    if arm.command == "distill":
        assert LEAST * PROMPTS <= plan.answered <= PROMPTS
        assert entry["tokens"] == pytest.approx(plan.tokens, abs=1)  # every generation is trained on, the last one to its end
    # what a wrong trial said is mended by a run of the arm itself
    fields = ("teacher_writes", "teacher_reads_own", "writes", "reads", "reads_free", "trains", "tokens", "kept")
    wrong = replace(RATES, **{field: getattr(RATES, field) * by for field, by in zip(fields, believed, strict=True)})
    entry = takes(arm, planned(arm, wrong, seconds, PROMPTS, []))
    for _ in range(RUNS - 1):
        entry = takes(arm, planned(arm, wrong, seconds, PROMPTS, [entry]))
    assert entry["seconds"] == pytest.approx(seconds, rel=CLOSE)


@pytest.mark.parametrize("name", list(ARMS))
def test_seconds_that_are_too_few_are_refused(name):
    with pytest.raises(UserError, match=r"Give it more \(--minutes\)"):
        planned(ARMS[name], RATES, 5.0, PROMPTS, [])


def test_an_arm_that_missed_its_seconds_is_run_again(tmp_path, monkeypatch, capsys):
    comparison = smollm2.Comparison(
        tmp_path, "cpu", replace(smollm2.SIZES["cpu"], minutes=10, prompts=PROMPTS), 3, 1e-3, TEACHER, Display(quiet=True)
    )
    plans = []

    def ran(arm, slug, seed, plan):
        plans.append(plan)
        run_dir = tmp_path / f"run-{len(plans)}"
        run_dir.mkdir()
        return SimpleNamespace(run_dir=run_dir, student=run_dir), takes(arm, plan, replace(RATES, trains=0.02, writes=0.5))

    monkeypatch.setattr(comparison, "ran", ran)
    monkeypatch.setattr(comparison, "evaluated", lambda slug, student: {"of": student.name})
    entry = comparison.arm("npd-none", 0, RATES)
    assert entry["runs"] == len(plans) == 2
    assert entry["of"] == "run-2"
    assert entry["seconds"] == pytest.approx(600, rel=CLOSE)
    assert "run 1 of 3" in capsys.readouterr().out


def test_held_out_prompts_are_not_trained_on():
    held_out = {row["prompt"] for row in smollm2_prompts.held_out_problems(64)}
    language = smollm2_prompts.instructions(held_out=True)
    for seed in (0, 1):
        trained = smollm2_prompts.trained_on(seed, 1024)
        assert len(trained) == len(set(trained)) == 1024
        assert not {*trained} & {*language, *held_out}
        assert sum(text not in smollm2_prompts.instructions(held_out=False) for text in trained) > 100
        few = smollm2_prompts.trained_on(seed, 40)
        assert len({*few} - {*smollm2_prompts.instructions(held_out=False)}) == 10
    assert len(held_out) == 64 * len(smollm2_prompts.PROBLEMS)


@given(st.text(max_size=400) | st.text("<>|*_`[]()#&!\\~@/:.-w\n\r\u2028 ", max_size=400))
def test_a_models_text_is_no_markup(text):
    shown = tables.quoted(text)
    assert "\n" not in shown
    assert len(shown.splitlines()) <= 1
    bare = re.sub(r"&#\d+;", "", shown)
    assert not set(bare) & set("<>|*_`[]()#&!\\~@/")
    assert "www." not in bare
    told = html.unescape(shown)
    whole = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert told == whole or (told.endswith(" …") and whole.startswith(told[:-2]))
    assert len(told) <= tables.LONGEST_QUOTE + 2


def test_what_is_left_is_shared_among_the_arms_once(tmp_path):
    comparison = smollm2.Comparison(tmp_path, "cpu", smollm2.SIZES["cpu"], 3, 1e-3, TEACHER, Display(quiet=True))
    append_line(tmp_path / "results.jsonl", {"arm": "start", "evaluation_seconds": 5.0})
    assert 60 * comparison.within(100, 4, 3.0) == pytest.approx(100 / 4 - 5 - 3)
    assert 60 * comparison.within(1000, 2, 0.0) == pytest.approx(17)  # an interrupted comparison goes on as it began
