"""Every family of docs/models.md through a whole run, against plain transformers that reads one sample at a time.

`NPD_WRITE_MATRIX=1 pytest -m "families or not families" tests/test_families.py` writes the table of docs/models.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_jsonl
from families import FAMILIES, model_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

import npd
from npd.config import LoraConfig, ModelConfig, StudentConfig
from npd.demo.tokenizer import build_tokenizer
from npd.errors import UserError
from npd.models import (
    add_lora,
    check_saved,
    cut_student,
    expected_mode,
    layout_of,
    load_model,
    save_model,
)

PAGE = Path(__file__).parents[1] / "docs/models.md"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOP_K = 4
# One of each way to be read or to differ; all others are marked, for they take minutes.
ALWAYS = {"llama", "gemma2", "gpt_oss", "qwen3_next", "phi3", "qwen3_vl", "mixtral", "gpt2"}


def save(path: Path, family: str, seed: int) -> Path:
    model_of(family, seed=seed).save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Lengths from 2 to 40, so that a batch never has one length."""
    texts = ["1+", "12+34=", "7*(8-3)=", "1+2=3;4+5=9;6+7=", "9-8;" * 5, "11+22+33+44=;" * 3, "5=", "8*8-1="]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", [{"prompt": text} for text in texts])


def plain(path: Path) -> PreTrainedModel:
    """transformers' own model in float32, as it loads it."""
    config = json.loads((path / "config.json").read_text())
    multimodal = "ForConditionalGeneration" in config["architectures"][0]
    kind: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[L - 1, V] of one sample alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)


def of_tokens(table: Tensor, ids: list[int], responses: int) -> Tensor:
    return table[-responses:].gather(1, torch.tensor(ids[-responses:])[:, None])[:, 0]


def step_by_step(model: PreTrainedModel, ids: list[int], responses: int) -> Tensor:
    """As generation reads: each token from a prefix that ends before it, which is not the same for longrope."""
    rows = []
    for end in range(len(ids) - responses, len(ids)):
        z = model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        rows.append(z[ids[end]])
    return torch.stack(rows)


@torch.no_grad()
def check_columns(table: pa.Table, student: PreTrainedModel, teacher: PreTrainedModel, *, by_prefix: bool) -> None:
    assert len({len(ids) for ids in table["prompt_ids"].to_pylist()}) > 4
    for row in table.to_pylist():
        prompt, response = row["prompt_ids"], row["response_ids"]
        ids, free = [*prompt, *response], [1, *response]
        R = len(response)
        table_T = logprobs(teacher, ids)
        expected = {
            "teacher_nll": -of_tokens(table_T, ids, R).mean(),
            "teacher_nll_free": -of_tokens(logprobs(teacher, free), free, R).mean(),
            "student_nll_free": -of_tokens(logprobs(student, free), free, R).mean(),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), abs=1e-4), name
        best = table_T[-R:].topk(TOP_K).values
        stored = torch.tensor(row["topk_logprobs"]).view(R, TOP_K)
        assert ((stored - best).abs() < 1e-4 + 5e-4 * best.abs()).all()  # float16 rounds what is stored
        chosen = table_T[-R:].gather(1, torch.tensor(row["topk_ids"]).view(R, TOP_K).long())
        assert (chosen - best).abs().max() < 1e-4
        written = step_by_step(student, ids, R) if by_prefix else of_tokens(logprobs(student, ids), ids, R)
        assert np.abs(np.array(row["behavior_logprobs"]) - written.numpy()).max() < 1e-4


def expected_step(table: pa.Table, student: PreTrainedModel, kd_weight: float = 0.9) -> tuple[float, float]:
    """Loss and gradient norm of one step over a whole generation, by autograd through plain logits."""
    total, tokens = torch.zeros(()), 0
    for row in table.to_pylist():
        ids, R = [*row["prompt_ids"], *row["response_ids"]], len(row["response_ids"])
        log_s = logprobs(student, ids)[-R:]
        top = torch.tensor(row["topk_ids"]).view(R, TOP_K).long()
        log_t = torch.tensor(row["topk_logprobs"]).view(R, TOP_K)
        ce = -of_tokens(log_s, ids, R).sum()
        total = total + (1 - kd_weight) * ce + kd_weight * (log_t.exp() * (log_t - log_s.gather(1, top))).sum()
        tokens += R
    (total / tokens).backward()
    squares = [p.grad.double().square().sum() for p in student.parameters() if p.grad is not None]
    return float(total) / tokens, float(torch.stack(squares).sum().sqrt())


def lora_of(path: Path, tmp_path: Path) -> str:
    """Do adapters on every linear layer reach what is saved?"""
    config = StudentConfig(model=str(path), lora=LoraConfig(r=2))
    try:
        student = add_lora(load_model(config, trained=True), config).eval()
    except UserError:
        return "not `all-linear`"
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    save_model(student, build_tokenizer(), tmp_path / "merged")
    ids = [4 + i % 15 for i in range(1, 14)]
    with torch.no_grad():
        mine = student(input_ids=torch.tensor([ids]), use_cache=False).logits
        theirs = plain(tmp_path / "merged")(input_ids=torch.tensor([ids]), use_cache=False).logits
        base = plain(path)(input_ids=torch.tensor([ids]), use_cache=False).logits
    assert (mine - base).abs().mean() > 1e-3, "the adapters change nothing"
    assert (mine - theirs).abs().mean() < 1e-4 * float(base.std())
    return "yes"


def cut_of(path: Path, tmp_path: Path) -> str:
    """Which of its two layers may be cut away?"""
    kept = []
    for layer in (0, 1):
        model = load_model(ModelConfig(model=str(path)), trained=True)
        try:
            student = cut_student(model, [layer])
            save_model(student, build_tokenizer(), tmp_path / f"cut{layer}")
            check_saved(student, tmp_path / f"cut{layer}")
        except UserError:
            continue
        kept.append(layer)
    return {(): "no", (0,): "the first layers", (1,): "the last layers"}.get(tuple(kept), "yes")


@pytest.fixture(scope="module")
def matrix() -> Iterator[dict[str, str]]:
    rows: dict[str, str] = {}
    yield rows
    if os.environ.get("NPD_WRITE_MATRIX"):
        head, _, _ = PAGE.read_text().partition("| family |")
        lines = ["| family | how it is read | LoRA | `init-student` |", "|---|---|---|---|", *(rows[n] for n in sorted(rows))]
        PAGE.write_text(head + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.families) for n in sorted(FAMILIES)]
)
def test_a_family_reads_learns_and_is_saved_as_transformers_does(family, tmp_path, prompts, matrix):
    student_dir, teacher_dir = save(tmp_path / "student", family, 1), save(tmp_path / "teacher", family, 2)
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": str(student_dir)},
        "teacher": {"model": str(teacher_dir)},
        "data": {"train": str(prompts), "max_prompt_tokens": 48},
        "schedule": {"generations": 2, "passes": 1, "lead": 0.0},
        "rollout": {"max_new_tokens": 10, "batch_size": 5, "part_size": 8},
        "scoring": {"top_k": TOP_K, "batch_tokens": 128, "free": "always"},
        "selection": {"rule": "none"},
        "packing": {"length": 64},
        "training": {"batch_tokens": 4096, "learning_rate": 1e-3},
        "tracking": {"trackers": [], "report": False},
    }
    result = npd.distill(tree)
    student, teacher = plain(student_dir), plain(teacher_dir)
    [part] = sorted(result.run_dir.glob("generations/g000/part-*.parquet"))
    table = pq.read_table(part)
    check_columns(table, student, teacher, by_prefix=family == "phi3")

    first = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    loss, norm = expected_step(table, student)
    assert first["loss"] == pytest.approx(loss, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    if family != "phi3":  # whose responses were read with other factors where they pass the switch
        assert first["near_policy_kl"] == pytest.approx(0, abs=1e-6)

    finished = plain(result.student)
    assert type(finished) is type(student)
    assert finished.config.tie_word_embeddings == student.config.tie_word_embeddings
    before, after = student.state_dict(), finished.state_dict()
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    assert any(not torch.equal(v, after[n]) for n, v in before.items())
    assert json.loads((result.student / "config.json").read_text())["dtype"] == "float32"
    assert finished.generation_config.eos_token_id == student.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(result.student).chat_template == TEMPLATE

    loaded = load_model(ModelConfig(model=str(result.student)))
    mode = layout_of(loaded).mode
    assert mode == expected_mode(loaded.config)
    row = f"| {family} | {mode} | {lora_of(student_dir, tmp_path)} | {cut_of(student_dir, tmp_path)} |"
    matrix[family] = row
    if not os.environ.get("NPD_WRITE_MATRIX"):
        assert row in PAGE.read_text(), "NPD_WRITE_MATRIX=1 writes the table anew"
