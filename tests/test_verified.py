"""Responses that are verified: hostile text, verifiers that fail, the column reward, and what selection makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import npd
from npd import verifying
from npd.config import SelectionConfig, load_config
from npd.demo.tokenizer import build_tokenizer
from npd.errors import RunError, UserError
from npd.generations.reselect import reselect
from npd.observe.display import Display
from npd.preflight import prepare
from npd.prompts import ENTRY
from npd.records import INCORRECT, PROXIMAL, UNANIMOUS, UNVERIFIED
from npd.report.facts import gather
from npd.report.verified import reward_histogram, reward_table
from npd.selection import Summary, check_some_kept
from npd.selection.reward import rewarded
from npd.store import Store, sha256
from npd.verifiers import Verifier, extract_answer
from npd.verifying import Judge, Unjudged

# -- verifiers of others

FAKE = """
import os, signal

class Dataset:
    def score_answer(self, said, entry):
        print("1.0")
        if said == "raise": raise ValueError("no " + "x" * 999)
        if said == "exit": os._exit(0)
        if said == "nan": return float("nan")
        if said == "word": return "right"
        if said == "memory": return float(len("x" * (1 << 40)))
        while said == "hang": pass
        while said == "swallow":
            try:
                while True: pass
            except Exception: pass
        if said == "stuck":
            signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
            while True: pass
        return entry["score"]

def create_dataset(name, **options):
    if name == "none": raise KeyError(name)
    return Dataset()
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "reasoning_gym.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(npd.__file__).parent.parent}")
    monkeypatch.setattr(verifying, "SECONDS", 0.2)
    judge = Judge()
    yield judge
    judge.close()


def test_a_verifier_that_fails_costs_one_response(judge, monkeypatch):
    entry = {"answer": "7", "score": 0.5}
    for said, why in [
        ("raise", r"ValueError: no x+… \(\d+ characters\)"),
        ("nan", "it gives no number"),
        ("word", "ValueError"),
        ("memory", "MemoryError"),
        ("hang", "it takes more than 0.2 s"),
        ("swallow", "it takes more than 0.2 s"),
        ("exit", "it ended its process"),
    ]:
        with pytest.raises(Unjudged, match=why):
            judge("task", {}, said, entry)
        assert judge("task", {}, "7", entry) == 0.5
    with pytest.raises(Unjudged, match="KeyError"):
        judge("none", {}, "7", entry)
    with pytest.raises(Unjudged, match="can't be handed on"):
        judge("task", {}, "7", {"answer": lambda: 7})
    monkeypatch.setattr(verifying, "PATIENCE", 1.0)
    with pytest.raises(Unjudged, match="it takes too long"):
        judge("task", {}, "stuck", entry)
    assert judge("task", {}, "7", entry) == 0.5


def test_failures_are_counted_and_part_marks_are_no_solution(judge):
    verifier = Verifier()
    verifier.judge = judge

    def cell(score: Any) -> str:
        return ENTRY + json.dumps({"answer": "7", "score": score, "metadata": {"source_dataset": "task"}})

    texts = ["#7", "#7", "#7", "#raise", "#hang"]
    rewards = [verifier(text, cell(score)) for text, score in zip(texts, (1.0, 0.99, 0, 1.0, 1.0), strict=True)]
    assert rewards == [1.0, 0.0, 0.0, None, None]
    assert (verifier.failed, verifier.why[:33]) == (2, "reasoning-gym's task: ValueError:")
    assert verifier("#7", None) is None


def test_entries_of_reasoning_gym_judge_as_they_do_there():
    import reasoning_gym

    verifier = Verifier()
    for name in ("chain_sum", "countdown", "mini_sudoku", "letter_counting"):
        entry = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        right = entry["metadata"]["expression"] if name == "countdown" else entry["answer"]
        cell = ENTRY + json.dumps(entry, default=str)
        said = right if "\n" in right else f"so <answer>{right}</answer>"
        assert (verifier(said, cell), verifier("<answer>no</answer>", cell)) == (1.0, 0.0), name


# -- verdicts

VERDICTS = st.sampled_from([PROXIMAL, "degenerate"])
ROWS = st.lists(st.tuples(st.integers(0, 4), VERDICTS, st.sampled_from([None, 0.0, 0.5, 1.0])), max_size=24)


def by_hand(rows: list[tuple[int, str, float | None]], reward: str) -> list[str]:
    words = []
    for prompt, verdict, mine in rows:
        theirs = [other for p, _, other in rows if p == prompt and other is not None]
        if verdict != PROXIMAL or reward == "any":
            words.append(verdict)
        elif mine is None:
            words.append(UNVERIFIED)
        elif reward == "correct":
            words.append(PROXIMAL if mine >= 1 else INCORRECT)
        else:
            words.append(PROXIMAL if any(r >= 1 for r in theirs) and any(r < 1 for r in theirs) else UNANIMOUS)
    return words


@given(ROWS, st.sampled_from(["any", "correct", "contrast"]))
def test_verdicts_of_rewards(rows, reward):
    prompts, verdicts, rewards = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {"prompt_id": pa.array(map(str, prompts), pa.string()), "reward": pa.array(rewards, pa.float32())}
    table = pa.table(columns)
    assert rewarded(np.array(verdicts, dtype=str), table, reward).tolist() == by_hand(rows, reward)


def test_a_summary_counts_them_and_a_generation_without_any_left_says_why():
    table = pa.table(
        {
            "source": ["a", "a", "b"],
            "verdict": [INCORRECT, UNANIMOUS, UNVERIFIED],
            "delta_ifd": pa.nulls(3, pa.float32()),
            "reward": pa.array([0.0, 1.0, None], pa.float32()),
        }
    )
    config = SelectionConfig(rule="none", reward="correct")
    summary = Summary(config)
    summary.add(table)
    result = summary.result()
    assert (result.verified, result.correct) == (2, 1)
    assert (result.sources["b"].verified, result.sources["b"].correct) == (None, None)
    with pytest.raises(RunError, match=r"1 wrong by their verifiers.*none\. Choose selection\.reward any, or warm"):
        check_some_kept(result, config)


# -- runs


@pytest.fixture(scope="module")
def answered(tmp_path_factory, data_file, student_dir, teacher_dir) -> dict[str, Any]:
    """A configuration whose rollouts are right here and wrong there: its answers are what some of them said.

    Half are of the first generation's and half of the second's. The student hardly learns: it says the same whatever is kept.
    """
    folder = tmp_path_factory.mktemp("answered")
    tree: dict[str, Any] = {
        "run_dir": str(folder / "any"),
        "student": {"model": str(student_dir)},
        "teacher": {"model": str(teacher_dir)},
        "data": {"train": str(data_file), "max_prompt_tokens": 32},
        "schedule": {"generations": 2, "passes": 1, "lead": 0.0},
        "rollout": {"max_new_tokens": 8, "part_size": 5, "samples_per_prompt": 4},
        "scoring": {"top_k": 4, "free": "always"},
        "selection": {"rule": "none"},
        "packing": {"length": 64},
        "training": {"batch_tokens": 256, "learning_rate": 1e-9},
        "tracking": {"trackers": []},
        "evaluation": {"kl_prompts": 0},
    }
    npd.distill(tree | {"run_dir": str(folder / "first"), "scoring": tree["scoring"] | {"verify": False}})
    store, tokenizer = Store(folder / "first"), build_tokenizer()
    said: list[dict[str, str]] = [{}, {}]
    for generation in (0, 1):
        parts = [store.read_part(generation, part) for part in range(3)]
        assert "reward" not in parts[0].column_names
        for row in pa.concat_tables(parts).to_pylist():
            prompt, response = (
                str(tokenizer.decode(row[n], skip_special_tokens=True)) for n in ("prompt_ids", "response_ids")
            )
            said[generation].setdefault(prompt, extract_answer(response))
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["answer"] = said[i // 3 % 2][row["prompt"]] if i % 3 else "wrong" if i % 2 else None
    tree["data"]["train"] = str(write_jsonl(folder / "answered.jsonl", rows))
    npd.refresh(tree)
    return tree


def verdicts_of(run_dir: Path) -> list[tuple[str, float | None, str]]:
    store = Store(run_dir)
    table = pa.concat_tables([store.read_part(0, part) for part in range(3)])
    return list(zip(*(table[name].to_pylist() for name in ("prompt_id", "reward", "verdict")), strict=True))


@pytest.mark.parametrize("reward", ["correct", "contrast"])
def test_a_run_selects_by_its_rewards_at_once_or_later(answered, tmp_path, reward):
    base = verdicts_of(Path(answered["run_dir"]))
    rewards = {mine for _, mine, _ in base}
    assert rewards == {None, 0.0, 1.0}
    expected = by_hand([(prompt, PROXIMAL, mine) for prompt, mine, _ in base], reward)  # type: ignore[misc]
    assert {PROXIMAL, UNVERIFIED} < set(expected)
    changed = {"selection": {"rule": "none", "reward": reward}}
    straight = answered | changed | {"run_dir": str(tmp_path / "straight")}
    npd.refresh(straight)
    assert [verdict for *_, verdict in verdicts_of(tmp_path / "straight")] == expected
    later = answered | {"run_dir": str(tmp_path / "later")}
    npd.refresh(later)
    reselect(load_config(later | changed), Store(tmp_path / "later"), 0, Display(quiet=True))
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "manifest.json"):
        files = [tmp_path / which / "generations/g000" / name for which in ("straight", "later")]
        assert sha256(files[0]) == sha256(files[1])
    manifest = Store(tmp_path / "straight").manifest(0)
    assert manifest is not None
    assert manifest.selection.verdicts == {word: expected.count(word) for word in sorted(set(expected))}
    judged = [mine for _, mine, _ in base if mine is not None]
    assert (manifest.selection.verified, manifest.selection.correct) == (len(judged), sum(judged))
    # The run goes on from there, and what is lost of it is made again as it was.
    part = tmp_path / "straight/generations/g000/part-00001.parquet"
    digest = sha256(part)
    part.unlink()
    result = npd.distill(straight)
    assert sha256(part) == digest
    lines = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    shares = [line["selection/accuracy"] for line in lines if "selection/accuracy" in line]
    assert shares[0] == pytest.approx(sum(judged) / len(judged))
    facts = gather(result.run_dir)
    table = reward_table(facts)
    assert table is not None
    assert [row[:2] for row in table.rows] == [["g0", str(len(judged))], ["g1", str(len(judged))]]
    assert reward_histogram(facts) is not None
    assert "Right and wrong responses" in (result.run_dir / "report.html").read_text()


def test_a_run_without_rewards_cannot_be_judged_by_them(make_tree, tmp_path):
    tree = make_tree(rollout={"samples_per_prompt": 2}, scoring={"verify": False})
    npd.refresh(tree)
    config = load_config(tree | {"scoring": tree["scoring"] | {"verify": False}})
    with_reward = config.model_copy(update={"selection": SelectionConfig(rule="none", reward="contrast")})
    with pytest.raises(UserError, match="does not have"):
        reselect(with_reward, Store(tree["run_dir"]), 0, Display(quiet=True))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"selection": {"reward": "contrast"}}, "samples_per_prompt is 1"),
        ({"selection": {"reward": "correct"}, "scoring": {"verify": False}}, "needs scoring.verify: true"),
        ({"selection": {"reward": "correct"}, "data": {"train": "bare.jsonl"}}, "no row of data.train has an `answer`"),
        ({"selection": {"reward": "correct"}, "data": {"train": "blank.jsonl"}}, "entry (2 of their answers are empty)"),
        ({"evaluation": {"tasks": ["answer"]}, "data": {"eval": "blank.jsonl"}}, "line 1 has no answer"),
        ({"data": {"train": "odd.jsonl"}}, 'task "no_task", which the installed reasoning-gym does not know'),
        ({"data": {"train": "shape.jsonl"}}, "line 1: `reasoning_gym` must be an entry of reasoning-gym"),
    ],
)
def test_what_cannot_be_verified_is_refused_at_the_start(make_tree, tmp_path, monkeypatch, sections, words):
    monkeypatch.chdir(tmp_path)
    entry = {"question": "q", "answer": "7", "metadata": {"source_dataset": "no_task"}}
    write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "1+1="}])
    write_jsonl(tmp_path / "blank.jsonl", [{"prompt": f"{i}+1=", "answer": a} for i, a in enumerate((" ", ["", " "], None))])
    write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "1+1=", "reasoning_gym": entry}])
    write_jsonl(tmp_path / "shape.jsonl", [{"prompt": "1+1=", "reasoning_gym": {"answer": "7"}}])
    with pytest.raises(UserError, match=re.escape(words)):
        npd.distill(make_tree(**sections))


def test_rows_that_nothing_verifies_are_counted_at_the_start(make_tree, tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": answer} for i, answer in enumerate(("1", "", None, [" ", "4"]))]
    tree = make_tree(selection={"reward": "correct"}, data={"train": str(write_jsonl(tmp_path / "some.jsonl", rows))})
    notes = prepare(load_config(tree), "distill").notes
    assert any("2 of 4 prompts have no answer: selection.reward correct drops" in note for note in notes)


@pytest.mark.slow
def test_the_example_runs(answered, tmp_path):
    """As it stands, but for its models and its size; and no response of such a model is lost on Δ."""
    small = {
        "rollout.max_new_tokens": 8,
        "schedule.passes": 1,
        "training.learning_rate": 1e-9,
        "tracking.trackers": [],
        "scoring.top_k": 4,
    }
    own = {"run_dir": str(tmp_path / "run"), "selection.rule": "none"}
    theirs = {"student.model": answered["student"]["model"], "teacher.model": answered["teacher"]["model"]}
    file = Path(__file__).parent.parent / "examples/verified.yaml"
    config = load_config(file, small | own | theirs | {"data.train": answered["data"]["train"]})
    assert (config.selection.reward, config.rollout.samples_per_prompt) == ("contrast", 4)
    result = npd.distill(config)
    table = Store(result.run_dir).read_part(0, 0)
    assert {PROXIMAL, UNVERIFIED} <= set(table["verdict"].to_pylist())
