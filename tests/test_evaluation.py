"""Tasks with verifiers, and the distance to the teacher, against counting and dense computations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Held, save_model, write_jsonl

import npd
import npd.scoring.prefill
from npd import models
from npd.config import load_config
from npd.evaluation import BenchmarkSetting, Evaluator, VerifiedTask, benchmarks
from npd.generations.evaluated import Evaluated
from npd.generations.models import Models, load_tokenizers
from npd.observe.display import Display
from npd.placement import resolve_placement
from npd.prompts import Chat, load_prompts
from npd.records import EvaluationLine
from npd.rollout.transformers import TransformersEngine
from npd.scoring.local import LocalTeacher
from npd.store import Store

QUIET = Display(quiet=True)


def make_evaluator(tree: dict) -> tuple[Evaluator, Evaluated]:
    """An evaluator on the tree's options, and its student as it starts."""
    config = load_config(tree)
    tokens = load_tokenizers(config)
    held_out = load_prompts(config.data.eval, tokens.tokenizer, max_prompt_tokens=64) if config.data.eval else None
    setting = BenchmarkSetting(config, Chat(tokens.tokenizer), held_out)
    tasks = benchmarks(setting)
    placed, pad_id = resolve_placement(config, take_turns=True), tokens.tokenizer.pad_token_id
    kept = Models(config, Store(config.run_dir), tokens.vocabulary, pad_id, 64, QUIET, placed)
    return Evaluator(setting, tasks), Evaluated(kept, Held(models.load_model(config.student)), nullcontext)


def verified(evaluator: Evaluator) -> VerifiedTask:
    """The first of its tasks."""
    task = evaluator.tasks[0]
    assert isinstance(task, VerifiedTask)
    return task


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and ids[-1:] != [2]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# -- verifier tasks


def test_accuracy_of_the_answer_task_equals_counting(make_tree, tmp_path, student_dir, tokenizer):
    """Half of the problems get the answer that the student happens to give, so that the right count is known."""
    config = load_config(make_tree())
    student: Any = models.load_model(config.student)
    rows, said = [], 0
    for n in range(10, 22):
        prompt = f"{n}+{n % 5}="
        text = tokenizer.decode(greedy(student, tokenizer(prompt)["input_ids"], 12), skip_special_tokens=True)
        own = text.split("#")[-1].strip()
        right = n % 2 == 0 and bool(own)
        said += right
        rows.append({"prompt": prompt, "answer": own if right else "no such answer"})
    assert 0 < said < len(rows)
    data = write_jsonl(tmp_path / "eval.jsonl", rows)
    tree = make_tree(data={"eval": str(data)}, evaluation={"tasks": ["answer"], "kl_prompts": 0})
    evaluator, student = make_evaluator(tree)
    figures = evaluator(student)
    assert set(figures) == {"eval/answer/accuracy", "eval/answer/accuracy_low", "eval/answer/accuracy_high"}
    assert figures["eval/answer/accuracy"] == pytest.approx(said / len(rows))
    assert 0 < figures["eval/answer/accuracy_low"] < said / len(rows) < figures["eval/answer/accuracy_high"] < 1
    assert evaluator(student) == figures


def test_pass_at_k_counts_problems_that_some_sample_solves(make_tree, tmp_path, monkeypatch):
    """A verifier that says yes to chosen samples makes every figure computable by hand."""
    data = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"{n}=", "answer": "1"} for n in range(4)])
    tree = make_tree(data={"eval": str(data)}, evaluation={"tasks": ["answer"], "samples": 4, "temperature": 1.0})
    evaluator, student = make_evaluator(tree)
    right = {0: 4, 1: 1, 2: 0, 3: 2}  # of four samples each
    asked: dict[int, int] = {}

    def score(problem: int, text: str) -> float:
        asked[problem] = asked.get(problem, 0) + 1
        return float(asked[problem] <= right[problem])

    monkeypatch.setattr(verified(evaluator), "score", score)
    figures = evaluator(student)
    assert asked == dict.fromkeys(range(4), 4)
    assert figures["eval/answer/accuracy"] == pytest.approx(7 / 16)
    either = [1 - math.comb(4 - c, 2) / math.comb(4, 2) for c in right.values()]
    assert figures["eval/answer/pass@2"] == pytest.approx(sum(either) / 4)
    assert figures["eval/answer/pass@4"] == pytest.approx(3 / 4)
    assert {name for name in figures if "pass@" in name} == {"eval/answer/pass@2", "eval/answer/pass@4"}


def test_a_reasoning_gym_task_by_name(make_tree):
    task = {"name": "chain_sum", "size": 6, "options": {"min_terms": 2, "max_terms": 2}}
    tree = make_tree(evaluation={"tasks": [task, {"name": "basic_arithmetic", "size": 3}], "max_new_tokens": 3})
    evaluator, student = make_evaluator(tree)
    figures = evaluator(student)
    for name in ("chain_sum", "basic_arithmetic"):
        low, accuracy, high = (figures[f"eval/{name}/accuracy{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= accuracy <= high <= 1
    assert len(verified(evaluator).prompts) == 6
    assert not any("kl" in name for name in figures)  # no data.eval


def test_reasoning_gyms_verifier_tells_right_from_wrong(make_tree):
    import reasoning_gym

    evaluator, _ = make_evaluator(make_tree(evaluation={"tasks": [{"name": "chain_sum", "size": 5, "seed": 3}]}))
    dataset = reasoning_gym.create_dataset("chain_sum", size=5, seed=3)
    score = verified(evaluator).score
    assert score(0, "no number at all [[1,2],[3]]") == 0.0
    for i in range(5):
        answer = dataset[i]["answer"]
        assert score(i, answer) == score(i, f"Let me see. <answer>{answer}</answer>") == 1.0
        assert score(i, f"First, 3 + 4 = 7. So the answer is {answer}.") == score(i, f"\\boxed{{{answer}}}") == 1.0
        assert score(i, str(int(answer) + 1)) == score(i, "") == score(i, f"<answer>{int(answer) + 1}</answer>") == 0.0


def test_the_answer_task_asks_every_row_unless_told_otherwise(make_tree, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", ({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(150)))
    for task, expected in (("answer", 150), ({"name": "answer", "size": 7}, 7)):
        evaluator, _ = make_evaluator(make_tree(data={"eval": str(held_out)}, evaluation={"tasks": [task]}))
        assert len(verified(evaluator).prompts) == expected
        assert verified(evaluator).score(6, "7") == 1.0


def test_a_verifier_that_fails_on_what_a_model_wrote_counts_it_as_wrong(make_tree):
    evaluator, _ = make_evaluator(make_tree(evaluation={"tasks": [{"name": "prime_factorization", "size": 2}]}))
    assert verified(evaluator).score(0, "abc") == 0.0


def test_an_answer_of_several_lines_is_compared_whole(make_tree):
    import reasoning_gym

    evaluator, _ = make_evaluator(make_tree(evaluation={"tasks": [{"name": "rotate_matrix", "size": 2}]}))
    answer = reasoning_gym.create_dataset("rotate_matrix", size=2, seed=0)[0]["answer"]
    assert "\n" in answer
    assert verified(evaluator).score(0, answer) == 1.0
    assert verified(evaluator).score(0, answer.splitlines()[-1]) == 0.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "'no_such_task' with options {} is no task.*Give a reasoning-gym task or `answer`"),
        ({"name": "chain_sum", "options": {"wrong": 1}}, r"'chain_sum' with options {'wrong': 1} is no task"),
        ("answer", "compares with data.eval's answer column; set data.eval"),
    ],
)
def test_an_unknown_task_is_refused_before_the_run_starts(make_tree, task, message):
    tree = make_tree(evaluation={"tasks": [task]})
    with pytest.raises(npd.UserError, match=message):
        npd.distill(tree)
    assert not (Path(tree["run_dir"]) / "policy").exists()


def test_a_missing_answer_is_named(make_tree, tmp_path):
    data = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "1=", "answer": "1"}, {"prompt": "2="}])
    with pytest.raises(npd.UserError, match=r"1 of 2 rows of data.eval have none, such as row 2"):
        make_evaluator(make_tree(data={"eval": str(data)}, evaluation={"tasks": ["answer"]}))


def test_nothing_to_evaluate(make_tree):
    with pytest.raises(npd.UserError, match=r"nothing to evaluate: set evaluation.tasks, or data.eval"):
        npd.evaluate(make_tree())


# -- distance to the teacher


def test_a_model_is_no_distance_from_itself(make_tree, teacher_dir, data_file):
    evaluator, student = make_evaluator(make_tree(student={"model": str(teacher_dir)}, data={"eval": str(data_file)}))
    figures = evaluator(student)
    assert figures["eval/kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert figures["eval/reverse_kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert figures["eval/top1_agreement"] == 1.0
    assert figures["eval/kl_tokens"] > 12


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 480])
def test_distance_equals_a_dense_computation_per_sample(make_tree, tmp_path, data_file, monkeypatch, padded, chunk_elements):
    """Also where the two vocabularies are padded differently, and the head runs in several chunks."""
    monkeypatch.setattr(npd.losses.linear, "CHUNK_ELEMENTS", chunk_elements)
    sections = {"data": {"eval": str(data_file)}, "evaluation": {"kl_prompts": 7}}
    if padded:
        sections["student"] = {"model": str(save_model(tmp_path / "padded", seed=8, vocabulary=24))}
    evaluator, student = make_evaluator(make_tree(**sections))
    written = []
    real = TransformersEngine.answer

    def record(self, *args, **kwargs):
        written.append(real(self, *args, **kwargs))
        return written[-1]

    monkeypatch.setattr(TransformersEngine, "answer", record)
    figures = evaluator(student)
    teacher = student.models.teacher(None)
    assert isinstance(teacher, LocalTeacher)
    kl, reverse, agreed, tokens = 0.0, 0.0, 0, 0
    assert len(written) == 1
    assert len(written[0]) == 7
    for row in written[0].to_pylist():
        prompt, response = row["prompt_ids"], row["response_ids"]
        with torch.no_grad():
            log_s, log_t = (
                m(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :20].double().log_softmax(-1)
                for m in (student.weights.model(), teacher.model())
            )
        kl += float((log_t.exp() * (log_t - log_s)).sum())
        reverse += float((log_s.exp() * (log_s - log_t)).sum())
        agreed += int((log_s.argmax(-1) == log_t.argmax(-1)).sum())
        tokens += len(response)
    assert tokens > 24
    assert figures["eval/kl_tokens"] == tokens
    assert figures["eval/kl_to_teacher"] == pytest.approx(kl / tokens, rel=1e-4)
    assert figures["eval/reverse_kl_to_teacher"] == pytest.approx(reverse / tokens, rel=1e-4)
    assert abs(reverse - kl) > 0.001 * kl
    assert figures["eval/top1_agreement"] == pytest.approx(agreed / tokens)
    assert figures["eval/kl_to_teacher"] > 0.1


def test_evaluation_leaves_the_model_and_the_generator_as_they_were(make_tree, data_file):
    evaluator, student = make_evaluator(make_tree(data={"eval": str(data_file)}, evaluation={"kl_prompts": 3}))
    student.weights.model().train()
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    evaluator(student)
    assert torch.equal(torch.rand(2), expected)
    assert student.weights.model().training


def test_evaluating_does_not_change_the_training(make_tree, data_file):
    plain = npd.distill(make_tree("plain"))
    watched = npd.distill(make_tree("watched", data={"eval": str(data_file)}, evaluation={"tasks": ["answer"]}))
    assert (plain.student / "model.safetensors").read_bytes() == (watched.student / "model.safetensors").read_bytes()
    assert watched.before
    assert not plain.before


def test_evaluate_takes_a_named_model(make_tree, teacher_dir, data_file, tmp_path):
    tree = make_tree(data={"eval": str(data_file)}, evaluation={"kl_prompts": 4})
    name, figures = npd.evaluate(tree, str(teacher_dir))
    assert name == str(teacher_dir)
    assert figures["eval/kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    name, start = npd.evaluate(tree)
    assert name == tree["student"]["model"]
    assert start["eval/kl_to_teacher"] > 0.1
    assert not Path(tree["run_dir"]).exists()
    json.dumps(start)  # plain numbers


@pytest.mark.slow
def test_where_several_processes_train_the_default_engine_writes(make_tree, data_file, tmp_path):
    """Each process would need an engine of its own: vLLM, which may not even be installed, is asked for nothing."""
    script = tmp_path / "tune.py"
    script.write_text(
        "import sys, npd, npd.rollout.vllm as vllm\n"
        "def refuse(*args): raise AssertionError('vLLM was asked')\n"
        "vllm.VllmEngine.__init__ = vllm.VllmEngine.check = refuse\n"
        "npd.sft(sys.argv[1])\n"
    )
    rollout = {"engine": "vllm", "temperature": 0.0}
    data, evaluation = {"eval": str(data_file), "references": "teacher"}, {"tasks": ["answer"], "kl_prompts": 0}
    tree = make_tree(rollout=rollout, data=data, evaluation=evaluation)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(config)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    alone = npd.sft(make_tree("alone", rollout={"temperature": 0.0}, data=data, evaluation=evaluation))
    together, other = Store(tree["run_dir"]), Store(alone.run_dir)
    for part in range(3):
        assert together.read_part(0, part)["response_ids"] == other.read_part(0, part)["response_ids"]
    evaluated = [line.figures for line in together.read_metrics() if isinstance(line, EvaluationLine)]
    assert evaluated[0]["eval/answer/accuracy"] == alone.before["eval/answer/accuracy"]
    assert len(evaluated) == 3
