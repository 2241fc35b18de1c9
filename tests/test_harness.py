"""Benchmarks by lm-eval, on tasks and data that lie here, against slow computations of the same figures."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import write_jsonl
from test_evaluation import greedy, make_evaluator

import npd
from npd import models
from npd.config import load_config
from npd.evaluation import harness, harness_tasks
from npd.evaluation.harness import PAPER, figures_of
from npd.preflight import DISTILL, prepare
from npd.records import EvaluationLine, GenerationEnd
from npd.report.facts import gather
from npd.store import Store

installed = pytest.mark.skipif(
    harness.importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: npd[eval]"
)

CHOICES = ["1", "23", "456"]
PROBLEMS: list[dict[str, Any]] = [{"q": f"{n}+{n % 7}=", "gold": n % 3, "target": str(n)} for n in range(10, 22)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A directory of task files and their data: choices, written answers, a group, a tag, and what must not run."""
    folder = tmp_path_factory.mktemp("tasks")
    data = write_jsonl(folder / "problems.jsonl", PROBLEMS)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choices = common | {
        "task": "choices",
        "tag": "both",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": "gold",
        "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
    }
    written = common | {
        "task": "written",
        "tag": "both",
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["+"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    files = {
        "choices": choices,
        "written": written,
        "shots": choices | {"task": "shots", "tag": [], "fewshot_split": "test", "fewshot_delimiter": "+"},
        "group": {
            "group": "together",
            "task": ["choices", "shots"],
            "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        },
        "unsafe": written | {"task": "runs_code", "tag": [], "unsafe_code": True},
        "inside": {"group": "has_code_inside", "task": ["choices", {"group": "inner", "task": ["runs_code"]}]},
        "hub": choices | {"task": "of_the_hub", "tag": [], "dataset_path": "nobody/nothing-of-npd", "dataset_kwargs": None},
        "broken": choices | {"task": "broken", "tag": [], "doc_to_text": "{{q | no_such_filter}}"},
    }
    for name, options in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture
def harness_tree(make_tree, tasks):
    def make(run_dir: str = "run", *, names: Any = ("choices", "written"), **options: Any) -> dict[str, Any]:
        options = {"include_path": str(tasks), "max_new_tokens": 6, "batch_size": 5, "tasks": list(names)} | options
        return make_tree(run_dir, evaluation={"harness": options})

    return make


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    ids, prompt = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))


def by_hand(model: Any, tokenizer: Any, problems: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric's value for every problem, one sequence at a time in float64."""
    found: dict[str, list[float]] = {"choices/acc": [], "choices/acc_norm": [], "written/exact_match": []}
    for problem in problems:
        likely = [log_likelihood(model, tokenizer, problem["q"], choice) for choice in CHOICES]
        each = [value / len(choice) for value, choice in zip(likely, CHOICES, strict=True)]
        found["choices/acc"].append(float(max(range(3), key=likely.__getitem__) == problem["gold"]))
        found["choices/acc_norm"].append(float(max(range(3), key=each.__getitem__) == problem["gold"]))
        text = tokenizer.decode(greedy(model, tokenizer(problem["q"])["input_ids"], 6), skip_special_tokens=True)
        found["written/exact_match"].append(float(text.split("+")[0] == problem["target"]))
    return found


@installed
@pytest.mark.parametrize("limit", [None, 7])
def test_figures_equal_a_slow_computation(harness_tree, tokenizer, tasks, limit, tmp_path):
    """With targets that the student happens to write for half of the problems, so that some are right and some wrong."""
    tree = harness_tree(limit=limit)
    student: Any = models.load_model(load_config(tree).student).eval()
    problems = [dict(problem) for problem in PROBLEMS]
    for problem in problems[::2]:
        said = tokenizer.decode(greedy(student, tokenizer(problem["q"])["input_ids"], 6), skip_special_tokens=True)
        problem["target"] = said.split("+")[0] or "1"
        likely = [log_likelihood(student, tokenizer, problem["q"], choice) for choice in CHOICES]
        problem["gold"] = max(range(3), key=likely.__getitem__)
    own = tmp_path / "own"
    own.mkdir()
    data = write_jsonl(own / "problems.jsonl", problems)
    for name in ("choices", "written"):
        options = yaml.safe_load((tasks / f"{name}.yaml").read_text()) | {
            "dataset_kwargs": {"data_files": {"test": str(data)}}
        }
        (own / f"{name}.yaml").write_text(yaml.safe_dump(options))
    tree["evaluation"]["harness"]["include_path"] = str(own)
    evaluator, lent = make_evaluator(tree)
    figures = evaluator(lent)
    expected = by_hand(student, tokenizer, problems[:limit])
    names = {name.removeprefix("eval/harness/") for name in figures}
    assert names == {f"{name}{end}" for name in expected for end in ("", "_stderr", "_low", "_high")}
    for name, values in expected.items():
        assert 0 < sum(values) < len(values)
        key = f"eval/harness/{name}"
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert figures[key] == pytest.approx(statistics.fmean(values))
        assert figures[f"{key}_stderr"] == pytest.approx(error)
        ends = figures[f"{key}_low"], figures[f"{key}_high"]
        assert ends == pytest.approx((figures[key] - 1.959964 * error, figures[key] + 1.959964 * error))
    assert evaluator(lent) == figures  # again, as after every pass
    json.dumps(figures)


@installed
def test_shots_limits_groups_and_tags(harness_tree, tokenizer):
    """Each task has its own number of examples and its own limit; a group's figure is its own, a tag's are its tasks'."""
    names = [{"name": "shots", "num_fewshot": 2, "limit": 5}, "both"]
    evaluator, lent = make_evaluator(harness_tree(names=names, limit=4))
    task = evaluator.tasks[0]
    assert isinstance(task, harness.Harness)
    figures = evaluator(lent)
    assert {name for name in figures if name.endswith(("acc", "match"))} == {
        *(f"eval/harness/{name}" for name in ("shots/acc", "choices/acc", "written/exact_match"))
    }
    shots, both = task.asked
    assert len(shots.loaded[0].eval_docs) == len(PROBLEMS)
    asked = [instance.args[0] for instance in shots.loaded[0].instances]
    assert len({*asked}) == 5
    assert all(prompt.count("=") == 3 for prompt in asked)  # two examples and the problem
    assert len({instance.doc_id for one in both.loaded for instance in one.instances}) == 4
    assert task.plan == "shots (5 problems), both (8 problems); at the end"
    evaluator, lent = make_evaluator(harness_tree(names=["together"]))
    assert set(evaluator(lent)) == {f"eval/harness/together/acc{end}" for end in ("", "_stderr", "_low", "_high")}


@installed
def test_training_and_random_numbers_are_as_without_it(harness_tree, make_tree):
    plain = npd.distill(make_tree("plain"))
    watched = npd.distill(harness_tree("watched", every="passes", limit=2))
    assert (plain.student / "model.safetensors").read_bytes() == (watched.student / "model.safetensors").read_bytes()
    lines = [line for line in Store(watched.run_dir).read_metrics() if isinstance(line, EvaluationLine)]
    assert len(lines) == 5  # the start, and after each of 2 x 2 passes
    assert all("eval/harness/choices/acc" in line.figures for line in lines)
    evaluator, lent = make_evaluator(harness_tree(limit=3))
    model = lent.weights.model().train()
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()
    evaluator(lent)
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[1]
    assert random.getstate() == states[2]
    assert "DISABLE_MULTIPROC" not in os.environ


@installed
def test_at_the_end_alone_beside_what_is_asked_always(harness_tree, data_file):
    tree = harness_tree(limit=3)
    tree["data"]["eval"] = str(data_file)
    tree["evaluation"] |= {"kl_prompts": 3, "teacher": True}
    result = npd.distill(tree)
    store = Store(result.run_dir)
    lines = [line for line in store.read_metrics() if isinstance(line, EvaluationLine)]
    assert ["eval/harness/choices/acc" in line.figures for line in lines] == [False] * 5 + [True]
    assert lines[-1].step == lines[-2].step == result.steps
    assert "eval/kl_to_teacher" in lines[-1].figures  # a step's last line holds all
    assert result.after["eval/harness/choices/acc"] == lines[-1].figures["eval/harness/choices/acc"]
    assert "eval/harness/choices/acc" not in result.before
    run = gather(result.run_dir)
    assert len(run.evaluations) == 5
    assert "teacher/harness/choices/acc" in run.teacher
    name, figures = npd.evaluate(tree)
    assert name == str(result.student)
    assert figures == pytest.approx(lines[-1].figures)


class Killed(BaseException):
    """What nothing in npd catches."""


@installed
def test_a_kill_in_the_evaluation_repeats_it_alone(harness_tree, make_tree, monkeypatch):
    tree = harness_tree(limit=2, names=["choices"])
    tree["checkpoint"] = {"every_steps": 1000}  # the only checkpoint is the one before the evaluation

    def killed(self: Any, student: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(harness.Harness, "__call__", killed)
        with pytest.raises(Killed):
            npd.distill(tree)
    store = Store(tree["run_dir"])
    before = [line for line in store.metrics.read_text().splitlines() if "generation_ended" not in line]
    assert not any(isinstance(line, EvaluationLine) for line in store.read_metrics())
    (step,) = store.checkpoints()
    result = npd.distill(tree)
    assert result.steps == step
    after = store.metrics.read_text().splitlines()
    assert [line for line in after if "generation_ended" not in line][: len(before)] == before  # no step was trained again
    ended = [line for line in store.read_metrics() if isinstance(line, GenerationEnd)]
    assert [line.generation for line in ended] == [0, 1]
    assert "eval/harness/choices/acc" in result.after
    whole = npd.distill(make_tree("whole"))
    assert (whole.student / "model.safetensors").read_bytes() == (result.student / "model.safetensors").read_bytes()
    assert npd.distill(tree).after == result.after  # it is finished


# -- what is refused, in one paragraph


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(npd.UserError) as caught:
        prepare(load_config(tree), DISTILL)
    assert "\n" not in str(caught.value)
    assert not Path(tree["run_dir"]).exists()
    return str(caught.value)


def test_without_the_package_it_says_how_to_install_it(harness_tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert refusal(harness_tree()) == "evaluation.harness needs lm-eval, which is not installed. pip install 'npd[eval]'"


@installed
def test_a_task_of_the_hub_without_network_is_refused_within_seconds(harness_tree, monkeypatch):
    """HF_HUB_OFFLINE, as in these tests, and a network that is not there: a closed port of this machine."""
    assert "which cannot be reached (HF_HUB_OFFLINE is set)" in refusal(harness_tree(names=["of_the_hub"]))
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    said = refusal(harness_tree(names=["of_the_hub"]))
    assert time.monotonic() - began < 30
    assert "reads its data from the Hub, which cannot be reached (ConnectError" in said
    assert "HF_HOME" in said
    assert "include_path" in said
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(harness_tasks, "why_unreachable", lambda: pytest.fail("data that lie here need no network"))
    prepare(load_config(harness_tree()), DISTILL)


@installed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["runs_code"]}, r"'runs_code', which runs code that the model writes .*unsafe_code: true"),
        ({"names": ["has_code_inside"]}, r"'has_code_inside', which runs code that the model writes \(runs_code\)"),
        ({"names": ["broken"]}, r"task 'broken' cannot be loaded \(.*No filter named 'no_such_filter'"),
        ({"include_path": "/no/such/directory"}, r"include_path is /no/such/directory, which is no directory"),
        ({"options": {"pretrained": "x"}}, r"options has pretrained, which is not open: it is the model under evaluation"),
        ({"names": ["choices", "choices"]}, r"tasks has a name twice"),
    ],
)
def test_what_is_refused_before_anything_starts(harness_tree, options, message):
    tree = harness_tree(**options)
    with pytest.raises(npd.UserError, match=message):
        prepare(load_config(tree), DISTILL)


@installed
def test_what_fails_while_it_is_asked_is_one_paragraph(harness_tree):
    evaluator, lent = make_evaluator(harness_tree(names=["written"], max_new_tokens=200))  # of a context of 128
    with pytest.raises(
        npd.RunError, match=r"lm-eval fails on 'written' \(AssertionError: .*evaluation.harness.max_new_tokens"
    ):
        evaluator(lent)


@installed
def test_code_runs_where_that_is_asked_for(harness_tree):
    evaluator, lent = make_evaluator(harness_tree(names=["runs_code"], unsafe_code=True, limit=2))
    assert "eval/harness/runs_code/exact_match" in evaluator(lent)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@installed
def test_vllm_gets_the_students_files(harness_tree, monkeypatch):
    """With lm-eval's HFLM in the place of its VLLM: what it is given are the weights as they are at that step."""
    from lm_eval.models.huggingface import HFLM

    given: list[tuple[Path, dict[str, Any]]] = []
    ended: list[str] = []

    def start(path: str, **options: Any) -> Any:
        given.append((Path(path), options))
        assert (Path(path) / "config.json").is_file()
        lm = HFLM(path, device="cpu", batch_size=5)
        core = SimpleNamespace(shutdown=lambda: ended.append("engine"))
        object.__setattr__(lm.model, "llm_engine", SimpleNamespace(engine_core=core))
        return lm

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=start))
    monkeypatch.setitem(
        sys.modules, "vllm.distributed", SimpleNamespace(cleanup_dist_env_and_memory=lambda: ended.append("devices"))
    )
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: find("json") if name == "vllm" else find(name))
    result = npd.distill(harness_tree(backend="vllm", limit=5, options={"max_model_len": 64}))
    ((path, options),) = given
    assert not path.exists()
    assert options == {"batch_size": "auto", "trust_remote_code": False, "max_model_len": 64}
    assert ended == ["engine", "devices"]
    _, figures = npd.evaluate(harness_tree(limit=5), str(result.student))
    assert figures == pytest.approx(result.after)


def test_vllm_stands_in_no_process_of_several(harness_tree, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(npd.UserError, match="one of several that train together"):
        harness.check_placed(load_config(harness_tree(backend="vllm")))


def test_vllm_takes_no_adapters(harness_tree, monkeypatch):
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(
        harness.importlib.util, "find_spec", lambda name: find("json") if name in ("lm_eval", "vllm") else find(name)
    )
    tree = harness_tree(backend="vllm")
    tree["student"]["lora"] = {"r": 2}
    assert "takes whole weights, but the student is trained by adapters" in refusal(tree)


def test_task_names_may_be_one_text(harness_tree):
    config = load_config(harness_tree(), {"evaluation.harness.tasks": "choices, written,", "evaluation.harness.limit": 3})
    assert [task.name for task in config.evaluation.harness.tasks] == ["choices", "written"]
    assert config.evaluation.harness.limit == 3


# -- figures


def test_figures_out_of_results():
    results = {
        "alias": "t", "name": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,none": np.float64(0.125),
        "f1_stderr,none": "N/A", "exact_match,strict": 1, "exact_match_stderr,strict": 0.0, "odd,none": float("nan"),
    }  # fmt: skip
    assert figures_of("t", results) == {
        "t/acc": 0.5, "t/acc_stderr": 0.25, "t/acc_low": pytest.approx(0.010009), "t/acc_high": pytest.approx(0.989991),
        "t/f1": 0.125,
        "t/exact_match,strict": 1.0, "t/exact_match,strict_stderr": 0.0, "t/exact_match,strict_low": 1.0,
        "t/exact_match,strict_high": 1.0,
    }  # fmt: skip


@installed
def test_the_papers_suite_is_lm_evals(harness_tree, monkeypatch):
    """Every one of the eleven is a name that lm-eval knows; those that run code are left out, and that is said."""
    import lm_eval.tasks

    asked, whole, folder = [], lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent
    rooms = ("mmlu", "cmmlu", "ceval", "ifeval", "xwinograd", "gsm8k", "minerva_math", "drop", "gpqa", "mbpp", "humaneval")
    some = [folder / room for room in rooms]  # all of lm-eval's thousands of files take ten seconds
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path=None, **_: whole(include_path=some, include_defaults=False)
    )

    def load(self: Any, one: Any, length: Any) -> Any:
        asked.append(one.name)
        return harness_tasks.Asked(one, [], [one.name], 1)

    monkeypatch.setattr(harness_tasks.TaskIndex, "load", load)
    setup = prepare(load_config(harness_tree(names=[], suite="paper", include_path=None)), DISTILL)
    assert asked == [one.task for one in PAPER if one.benchmark not in ("MBPP", "HumanEval")]
    notes = " ".join(setup.notes)
    assert "CLUEWSC xwinograd_zh (lm-eval lacks it" in notes
    assert "mbpp and humaneval run code that the model writes, and are left out" in notes
    assert len(PAPER) == 11
    said = {"MMLU", "CMMLU", "C-Eval", "IF-Eval", "CLUEWSC", "GSM8K", "MATH-500", "DROP", "GPQA-Diamond", "MBPP", "HumanEval"}
    assert {one.benchmark for one in PAPER} == said
