from __future__ import annotations

import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from npd import run
from npd.config import load_config
from npd.demo import demo
from npd.demo.task import make_problems, solve
from npd.errors import UserError
from npd.observe.display import Display


def test_solutions_follow_the_rules_of_the_task():
    assert solve(47, [("+", 8), ("*", 3), ("-", 9)]) == ("47+8=55;55*3=65;65-9=56;#56", 56)
    for problem in make_problems(200, seed=3):
        value, *steps = re.findall(r"(\d+|[-+*]\d)", problem.prompt)
        result = int(value)
        for step in steps:
            operand = int(step[1:])
            result = {"+": result + operand, "-": result - operand, "*": result * operand}[step[0]] % 100
        assert problem.answer == str(result)
        assert problem.completion.endswith(f"#{result}")


def test_problems_are_different_and_a_function_of_the_seed():
    problems = make_problems(300, seed=1)
    assert len({p.prompt for p in problems}) == 300
    assert problems == make_problems(300, seed=1)
    assert problems != make_problems(300, seed=2)


def test_the_shipped_teacher_masters_the_task(tmp_path):
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in make_problems(64, seed=123)]
    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        {
            "run_dir": str(tmp_path / "run"),
            "student": {"model": demo.TEACHER},
            "data": {"train": str(data), "eval": str(data), "max_prompt_tokens": 32},
            "rollout": {"max_new_tokens": 72},
            "evaluation": {"tasks": ["answer"]},
        }
    )
    _, figures = run.evaluate(config)
    assert figures["eval/answer/accuracy"] >= 0.95


def test_the_demo_runs_every_arm_from_one_checkpoint(tmp_path, monkeypatch, capsys):
    for name, value in {
        "REFERENCES": 24,
        "PROMPTS": 16,
        "HELD_OUT": 12,
        "WARM_UP_STEPS": 3,
        "HIDDEN": 32,
        "LAYERS": 1,
    }.items():
        monkeypatch.setattr(demo, name, value)
    arms = {arm.name: arm for arm in demo.run_demo(tmp_path / "demo", 0, Display())}
    assert list(arms) == ["warm-up", "more SFT", "sequence-level KD", "NPD", "NPD, mixed", "strict on-policy"]
    assert arms["warm-up"].steps == 3
    assert {arms[name].steps for name in ("more SFT", "sequence-level KD", "NPD, mixed")} == {arms["NPD"].steps}
    assert arms["strict on-policy"].tokens >= arms["NPD"].tokens
    start = str(tmp_path / "demo/warm-up/student")
    for arm in list(arms.values())[1:]:
        assert load_config(arm.run_dir / "config.yaml").student.model == start
        AutoModelForCausalLM.from_pretrained(arm.run_dir / "student")
        AutoTokenizer.from_pretrained(arm.run_dir / "student")
    table = {row["name"]: row for row in json.loads((tmp_path / "demo/demo.json").read_text())}
    assert table["teacher"]["eval/answer/accuracy"] > 0.8
    assert set(table) == {"teacher", *arms}
    printed = capsys.readouterr().out
    assert "Greedy accuracy on 12 held-out problems" in printed
    for name in arms:
        assert name in printed
    after = table["NPD"]["eval/answer/accuracy"]
    before = table["warm-up"]["eval/answer/accuracy"]
    assert f"{100 * before:.1f}% → {100 * after:.1f}%" in (arms["NPD"].run_dir / "report.html").read_text()
    assert "What differs" in (tmp_path / "demo/compare.html").read_text()


def test_the_demo_does_not_overwrite(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        demo.run_demo(tmp_path, 0, Display(quiet=True))
