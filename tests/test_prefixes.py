"""`loss.first_tokens`: responses end where the loss does, and nothing behind is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

import npd
from npd.config import load_config
from npd.demo.tokenizer import build_tokenizer
from npd.evaluation import BenchmarkSetting
from npd.prompts import Chat
from npd.store import REFERENCE, Store

FIRST = 5


def read(run_dir: Path, generation: int) -> list[dict[str, Any]]:
    store = Store(run_dir)
    parts = [store.read_part(generation, part) for part in sorted(store.parts(generation))]
    return pa.concat_tables(parts).to_pylist()


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def prefix_loss(model: Any, rows: list[tuple[list[int], list[int]]], first: int) -> float:
    """Mean of -log p over the first tokens of responses that are read whole, one at a time, in float64."""
    nats: list[float] = []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        nats += (-logp[range(len(response)), response]).tolist()[:first]
    return sum(nats) / len(nats)


def test_tuning_on_references_learns_from_their_first_tokens(make_tree, student_dir, data_file):
    options = {"schedule": {"passes": 1}, "rollout": {"max_new_tokens": 80, "part_size": 5}, "packing": {"length": 128}}
    training = {"training": {"batch_tokens": 1 << 20, "max_steps": 1}, "loss": {"first_tokens": FIRST}}
    result = npd.sft(make_tree(**options, **training))
    tokenizer = build_tokenizer()
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    whole = [(tokenizer(r["prompt"])["input_ids"], [*tokenizer(r["completion"])["input_ids"], 2]) for r in rows]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(student_dir).double()
        expected = prefix_loss(model, whole, FIRST)
        other = prefix_loss(model, whole, FIRST + 1)
    assert losses(result.run_dir) == [pytest.approx(expected, rel=1e-5)]
    assert abs(other - expected) > 1e-3
    for row in read(result.run_dir, 0):
        assert len(row["response_ids"]) == FIRST
        assert row["finish_reason"] == "length"
        assert 2 not in row["response_ids"]


@pytest.mark.parametrize("references", ["given", "teacher"])
def test_rollouts_and_references_end_there(make_tree, references):
    tree = make_tree(
        data={"references": references},
        schedule={"generations": 1, "passes": 1, "references": 0.3},
        rollout={"max_new_tokens": 80, "part_size": 5},
        packing={"length": 128},
        loss={"first_tokens": FIRST},
    )
    result = npd.distill(tree)
    for generation in (0, REFERENCE):
        rows = read(result.run_dir, generation)
        assert max(len(row["response_ids"]) for row in rows) == FIRST
        for row in rows:
            ended = row["response_ids"][-1] == 2
            assert row["finish_reason"] == ("stop" if ended else "length")
            assert ended or len(row["response_ids"]) == FIRST
            assert len(row["topk_ids"]) == 4 * len(row["response_ids"])


@pytest.mark.parametrize("first", [None, 80, 1000])
def test_longer_than_responses_changes_nothing(make_tree, first):
    assert load_config(make_tree(loss={"first_tokens": first}, rollout={"max_new_tokens": 30})).response_tokens == 30


def test_evaluation_is_not_cut(make_tree, tokenizer):
    config = load_config(make_tree(loss={"first_tokens": FIRST}))
    assert config.sampling.max_new_tokens == FIRST
    assert BenchmarkSetting(config, Chat(tokenizer)).sampling.max_new_tokens == 12


@pytest.mark.slow
def test_the_example_runs(make_tree, tmp_path):
    """As it stands, but for its models and its size."""
    tree = make_tree()
    small = {"rollout.max_new_tokens": 24, "loss.first_tokens": 3, "schedule.passes": 1, "tracking.trackers": []}
    theirs = {"run_dir": str(tmp_path / "run"), "data.train": tree["data"]["train"], "selection.rule": "none"}
    theirs |= {f"{who}.model": tree[who]["model"] for who in ("student", "teacher")}
    file = Path(__file__).parent.parent / "examples/prefixes.yaml"
    assert load_config(file).response_tokens == 256
    result = npd.distill(load_config(file, small | theirs))
    assert {len(row["response_ids"]) for row in read(result.run_dir, 0)} <= {1, 2, 3}
