"""The benchmark of docs/objectives.md: its arms are runs that npd takes, and its table says what the cells do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import objectives, peers
from benchmarks.evidence.cells import Cell, Results

TASKS = {name: replace(peers.DEMO, teacher=name) for name in (objectives.CHARACTERS, objectives.PAIRS)}


@pytest.mark.parametrize("name", [name for name, arm in objectives.ARMS.items() if arm.command])
def test_arms_take_equal_steps_from_equal_data(name, tmp_path):
    arm = objectives.ARMS[name]
    config = objectives.configured(arm, TASKS, tmp_path, "run", 0)
    assert (config.training.max_steps, config.training.batch_tokens) == (objectives.STEPS, objectives.BATCH_TOKENS)
    if arm.command == "distill":
        assert config.schedule.prompts * config.rollout.samples_per_prompt == objectives.RESPONSES
    assert arm.against in objectives.ARMS


def test_the_second_teacher_is_aligned_where_its_tokens_are_not_the_students(tmp_path):
    configs = {
        name: objectives.configured(arm, TASKS, tmp_path, "run", 0) for name, arm in objectives.ARMS.items() if arm.command
    }
    teachers = {name: config.teacher for name, config in configs.items()}
    assert {n for n, t in teachers.items() if t is not None and t.align} == {
        "aligned teacher, longer tokens",
        "student with longer tokens, aligned teacher",
    }


def test_hints_are_the_teachers_alone(tmp_path):
    objectives.write_data(tmp_path, 0)
    rows = (tmp_path / "hinted.jsonl").read_text().splitlines()
    assert len(rows) == len((tmp_path / "prompts.jsonl").read_text().splitlines())
    problem = objectives.make_problems(1, 3)[0]
    assert objectives.hint(problem) == f"{problem.completion};{problem.prompt}"
    copied = objectives.made_up(objectives.Problem("47+8*3-9=", "", ""))
    assert re.fullmatch(r"47\+8=(\d+);\1\*3=(\d+);\2-9=(\d+);#\3", copied.completion)
    assert copied.completion.endswith(f"#{copied.answer}")


def entry(arm: str, seed: int, accuracy: float) -> dict[str, object]:
    machine = {"processor": "one", "cores": 1, "versions": {"torch": "2"}, "load": 0.0}
    return {"task": "demo", "arm": arm, "seed": seed, "accuracy": accuracy, "date": "2026-01-01", "machine": machine}


def test_differences_are_paired_by_seed(tmp_path):
    results = Results(tmp_path)
    base, other = [0.4, 0.5, 0.3], [0.45, 0.57, 0.36]
    for seed in range(3):
        results.write(entry(objectives.BASELINE, seed, base[seed]))
        results.write(entry("more SFT", seed, other[seed]))
    found = objectives.paired(results.read(), "more SFT", objectives.BASELINE)
    assert found is not None
    assert (found.value, found.seeds) == (pytest.approx(6.0), 3)
    assert found.half == pytest.approx(4.303 * 1.0 / 3**0.5, rel=1e-3)
    page = tmp_path / "page.md"
    blocks = "".join(f"<!-- objectives{name} -->\nold\n<!-- end -->\n" for name in ("", ", machine", ", reading"))
    page.write_text(f"a\n{blocks}z\n")
    objectives.main(["table", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| more SFT | 3 | 46.0 | +6.0 ± 2.5 | the baseline |" in text
    assert "- Better, with an interval above 0: *more SFT* to *forward KL* (+6.0 ± 2.5)." in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("z\n")


def test_a_cell_that_another_process_has_is_left_to_it(tmp_path, monkeypatch):
    shelf, results, asked = objectives.Shelf(tmp_path), Results(tmp_path / "results"), []
    cells = [Cell("demo", arm, 0) for arm in (objectives.BASELINE, "more SFT", objectives.START)]
    results.write(entry("more SFT", 0, 0.1) | {"wall_seconds": 1.0})

    def measure(cell: Cell, shelf: objectives.Shelf) -> dict[str, object]:
        asked.append(cell.arm)
        return entry(cell.arm, cell.seed, 0.2) | {"wall_seconds": 1.0}

    monkeypatch.setattr(objectives, "measure", measure)
    with objectives.claimed(objectives.lock_of(tmp_path, cells[0])):
        objectives.work(cells, results, shelf, float("inf"))
    assert asked == [objectives.START]
    objectives.work(cells, results, shelf, 0.0)  # no time is left
    assert asked == [objectives.START]
    objectives.work(cells, results, shelf, float("inf"))
    assert asked == [objectives.START, objectives.BASELINE]


def test_the_page_has_the_blocks():
    text = Path(objectives.__file__).parents[1].joinpath(objectives.PAGE).read_text()
    assert [text.count(f"<!-- objectives{name} -->") for name in ("", ", machine", ", reading")] == [1, 1, 1]
