"""Rewards for TRL's GRPOTrainer, and, where TRL is installed, two real steps of it."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import npd
from npd import rewards
from npd.errors import UserError


def test_verified_takes_strings_messages_and_rows_of_every_kind():
    completions = ["so #7", [{"role": "assistant", "content": "The answer is 8."}], "#7", "#7", "#9", "b"]
    answers = ["7", 8, "8", None, ["7", "9"], "a"]
    assert rewards.verified(None, completions, answer=answers, trainer_state=object()) == [1.0, 1.0, 0.0, None, 1.0, 0.0]
    assert rewards.verified(None, completions, answer=[None] * 6) == [None] * 6
    with pytest.raises(UserError, match="neither a column `answer` nor a column `reasoning_gym`, but solution"):
        rewards.verified(None, completions, solution=answers)


def test_rows_that_say_nothing_are_left_out():
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": list("abcd"), "answer": [["7"], [" ", ""], None, []]})
    assert list(rewards.verifiable(data)["prompt"]) == ["a"]
    with pytest.raises(UserError, match="None of 3 rows has"):
        rewards.verifiable(data.select([1, 2, 3]))


def test_an_empty_answer_is_none():
    assert rewards.verified(None, ["", "x", ""], answer=["", ["", "x"], [" ", "x"]]) == [None, 1.0, 0.0]


TEXTS = st.one_of(st.text("ab7 ", max_size=3), st.integers(-9, 9), st.none(), st.just(float("nan")))


@given(
    st.one_of(TEXTS, st.lists(TEXTS, max_size=3)), st.sampled_from([None, "", " ", {}, {"question": None, "metadata": None}])
)
def test_any_member_that_says_something_is_right_and_others_are_nothing(answer, nothing):
    members = answer if isinstance(answer, list) else [answer]
    said = [str(one) for one in members if one is not None and one == one and str(one).strip()]
    for right in said:
        assert rewards.verified(None, [f"<answer>{right}</answer>"], answer=[answer], reasoning_gym=[nothing]) == [1.0]
    other = rewards.verified(None, ["#none of them"], answer=[answer], reasoning_gym=[nothing])
    assert other == ([0.0] if said else [None])


ENTRIES = [5, [], [1], "{bad", "[1]", {"answer": "7"}, {"answer": "7", "metadata": {"source_dataset": "no-such-task"}}]


@pytest.mark.parametrize(
    "columns",
    [
        *(
            {"answer": [answer]}
            for answer in ({"a": 1}, [["7"]], [{"a": 1}], b"7", ["7", b"7"], ["7\x1f9"], "a\x1eb", ["\x1f"])
        ),
        *({"answer": ["7"], "reasoning_gym": [entry]} for entry in ENTRIES),
        {"answer": "7"},
        {"answer": ["7", "8"]},
        {"reasoning_gym": {"answer": "7"}},
    ],
)
def test_what_no_row_may_say_is_refused(columns):
    with pytest.raises(UserError, match=r"npd\.rewards"):
        rewards.verified(None, ["#7"], **columns)


CONTENTS = st.sampled_from(
    ["#7", "#8", "", None, [{"type": "text", "text": "#"}, {"type": "text", "text": "7"}], ["#", "7"], []]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["assistant", "tool", "user"]), "content": CONTENTS}), max_size=4
)


@given(MESSAGES)
def test_the_assistants_last_message_counts(messages):
    own = [message["content"] for message in messages if message["role"] == "assistant"]
    right = bool(own) and own[-1] not in ("#8", "", None, [])
    assert rewards.verified(None, [messages], answer=["7"]) == [float(right)]


def test_columns_of_numpy_and_arrow_are_read():
    for column in (
        np.array(["7", "8"]),
        pa.array(["7", "8"]),
        [np.array(["1", "7"]), np.int64(8)],
        [pa.scalar(["7"]), pa.scalar(8)],
    ):
        assert rewards.verified(None, ["#7", "#7"], answer=column) == [1.0, 0.0]


def test_solutions_as_they_stand_in_data_are_references():
    answers = [
        "He has 9.\n9 + 9 = <<9+9=18>>18\n#### 18",
        "so $x = \\boxed{18}$.",
        ["\\boxed{17}", "\\boxed{18}"],
        "#### 18",
        "18\n####",
    ]
    assert rewards.verified(None, ["#18"] * 5, answer=answers) == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert rewards.verified(None, ["#9"] * 3, answer=answers[:3]) == [0.0] * 3


@pytest.mark.parametrize("completion", [7, ["#7"], [None], 7.0, [["#7"]]])
def test_completions_of_other_types_are_refused(completion):
    for reward in (rewards.verified, rewards.marked):
        with pytest.raises(UserError, match="a completion must be a text or messages"):
            reward(None, [completion], answer=["7"])
    assert rewards.verified(None, [None, {"role": "assistant", "content": "#7"}], answer=["7", 7]) == [0.0, 1.0]


def test_verified_asks_the_verifiers_of_reasoning_gym():
    import reasoning_gym

    entries = list(reasoning_gym.create_dataset("countdown", size=2, seed=3))
    expression = entries[0]["metadata"]["expression"]
    said = [f"<answer>{expression}</answer>", "<answer>1+</answer>"]
    assert rewards.verified(None, said, reasoning_gym=entries) == [1.0, 0.0]


def test_marked():
    texts = ["#7", r"\boxed{3}", "<answer>x</answer>", "answer: 4", "<answer>x", "seven"]
    assert rewards.marked(None, texts) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_rewards_need_no_trl():
    code = "import sys, npd.rewards; sys.exit(any(name in sys.modules for name in ('trl', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, student_dir, teacher_dir, data_file) -> Path:
    path = tmp_path_factory.mktemp("grpo") / "run"
    npd.sft(
        {
            "run_dir": str(path),
            "student": {"model": str(student_dir)},
            "data": {"train": str(data_file), "max_prompt_tokens": 32},
            "schedule": {"passes": 1},
            "rollout": {"max_new_tokens": 100},
            "packing": {"length": 160},
            "tracking": {"trackers": [], "report": False},
        }
    )
    return path


def test_the_data_of_a_run_is_read_as_the_run_read_it(run_dir):
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student")
    data = rewards.dataset(run_dir, tokenizer)
    table = npd.store.Store(run_dir).prompts().table
    assert tokenizer(list(data["prompt"]))["input_ids"] == table["prompt_ids"].to_pylist()
    assert list(data["answer"]) == table["answer"].to_pylist()


def test_a_run_without_answers_has_nothing_to_reward(make_tree, run_dir, tmp_path):
    from npd.store import Store

    prompts = Store(run_dir).prompts()
    at = prompts.table.column_names.index("answer")
    prompts.table = prompts.table.set_column(at, "answer", pa.nulls(len(prompts), pa.string()))
    prompts.save(tmp_path / "prompts.arrow")
    with pytest.raises(UserError, match="have no answer"):
        rewards.dataset(tmp_path, AutoTokenizer.from_pretrained(run_dir / "student"))


def test_grpo_goes_on_from_a_finished_run(run_dir, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    file = Path(__file__).parent.parent / "examples/grpo.py"
    spec = importlib.util.spec_from_file_location("grpo", file)
    assert spec is not None
    assert spec.loader is not None
    grpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grpo)
    monkeypatch.setattr(sys, "argv", ["grpo.py", str(run_dir), "--out", str(tmp_path / "out"), "--steps", "2"])
    options: argparse.Namespace = grpo.parse()
    options.prompts, options.samples, options.max_new_tokens = 2, 2, 6
    log = [line for line in grpo.train(options) if "reward" in line]
    assert len(log) == 2
    assert all(0 <= line["rewards/verified/mean"] <= 1 for line in log)
    assert (tmp_path / "out/model.safetensors").exists()
