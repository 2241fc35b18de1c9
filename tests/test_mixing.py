"""Reference responses, mixed into passes: what they count as, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import npd


def lines_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(tree["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("whose", ["given", "teacher"])
def test_a_share_of_each_pass_is_references(make_tree, whose):
    tree = make_tree(
        data={"references": whose},
        schedule={"lead": 0.0, "references": 0.4},
        rollout={"max_new_tokens": 72, "part_size": 6},
        packing={"length": 110},
        training={"batch_tokens": 110},
    )
    npd.distill(tree)
    files = sorted((Path(tree["run_dir"]) / "generations/references").glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert {(row["policy_version"], row["verdict"]) for row in rows} == {(-1, "reference")}
    longest = max(len(row["response_ids"]) for row in rows)
    done = 0
    for generation in (0, 1):
        for passes in (0, 1):
            mine = [line for line in lines_of(tree) if (line["generation"], line["pass"]) == (generation, passes)]
            tokens, done = mine[-1]["tokens"] - done, mine[-1]["tokens"]
            references = sum(line.get("reference_tokens", 0) for line in mine)
            assert abs(references - 0.4 * tokens) <= longest


@pytest.mark.parametrize("whose", ["given", "teacher"])
def test_references_have_no_part_in_the_near_policy_kl(make_tree, whose):
    """No snapshot wrote them, so at the first step, where student and snapshot are one, the KL is zero."""
    tree = make_tree(
        data={"references": whose},
        schedule={"lead": 0.0, "references": 0.5, "kl_budget": 0.5},
        rollout={"max_new_tokens": 72},
        packing={"length": 110},
        training={"max_steps": 1, "batch_tokens": 10_000},
    )
    npd.distill(tree)
    (line,) = lines_of(tree)
    assert line["reference_tokens"] > 0
    assert 0 <= line["near_policy_kl"] < 1e-6


def test_references_carry_the_teachers_top_k(make_tree, teacher_dir):
    tree = make_tree(schedule={"lead": 0.0, "references": 0.2}, rollout={"max_new_tokens": 72}, packing={"length": 110})
    npd.distill(tree)
    row = pq.read_table(Path(tree["run_dir"]) / "generations/references/part-00000.parquet").to_pylist()[0]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).double()
    ids, count = row["prompt_ids"] + row["response_ids"], len(row["response_ids"])
    with torch.no_grad():
        logp = teacher(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -count - 1 : -1].log_softmax(-1)
    best = logp.topk(4)
    nll = -logp.gather(1, torch.tensor(row["response_ids"])[:, None]).mean()
    assert torch.tensor(row["topk_logprobs"]).view(count, 4).double() == pytest.approx(best.values, abs=1e-4, rel=2**-11)
    assert row["teacher_nll"] == pytest.approx(float(nll), abs=1e-4)


def test_references_that_do_not_exist_are_asked_for_at_the_start(make_tree, tmp_path):
    data = tmp_path / "bare.jsonl"
    data.write_text('{"prompt": "1+2="}\n')
    with pytest.raises(npd.UserError, match=r"no row of data\.train has a completion"):
        npd.distill(make_tree(data={"train": str(data)}, schedule={"lead": 0.0, "references": 0.2}))


def test_sft_on_the_teachers_answers_knows_no_budget(make_tree):
    """One YAML may serve both commands; placement and budget are those of `npd distill`."""
    tree = make_tree(
        data={"references": "teacher"},
        schedule={"kl_budget": 1e-6, "lead": 1.0},
        placement={"rollout": "external"},
    )
    result = npd.sft(tree)
    assert result.generations[-1].reason == "passes"
    assert all(line["near_policy_kl"] is None for line in lines_of(tree))
