"""Whole runs: what they leave on disk, and that nothing that interrupts them changes it."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import HANG, killed_from_outside, save_model, write_jsonl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import npd
import npd.preflight
import npd.run
import npd.store
import npd.train.trainer
import npd.train.work
from npd.config import load_config
from npd.observe.display import Display
from npd.store import SCHEMA, Store

WEIGHTS = Path("student/model.safetensors")


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps_of(run_dir: Path) -> list[dict]:
    return [line for line in metrics_of(run_dir) if "loss" in line]


def parts_of(run_dir: Path, generation: int) -> pa.Table:
    files = sorted((run_dir / "generations" / f"g{generation:03d}").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def write_yaml(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


# -- what a run leaves behind


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_dir, student_dir, data_file):
    """A finished run with evaluation before, between and after."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    tree = {
        "run_dir": str(run_dir),
        "student": {"model": str(student_dir)},
        "teacher": {"model": str(teacher_dir)},
        "data": {"train": str(data_file), "eval": str(data_file), "max_prompt_tokens": 32},
        "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
        "rollout": {"max_new_tokens": 12, "batch_size": 4, "part_size": 5, "samples_per_prompt": 2},
        "scoring": {"top_k": 4, "batch_tokens": 128},
        "selection": {"rule": "delta_ifd", "lower": -1.0, "upper": 1.0},
        "packing": {"length": 64},
        "training": {"batch_tokens": 128, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"tasks": ["answer"], "kl_prompts": 6},
        "tracking": {"trackers": ["tensorboard"]},
    }
    return tree, run_dir, npd.distill(tree)


def test_directory_is_laid_out_as_the_contract_says(whole):
    _, run_dir, result = whole
    assert result.run_dir == run_dir
    assert result.student == run_dir / "student"
    top = {path.name for path in run_dir.iterdir()}
    files = {"config.yaml", "prompts.arrow", "metrics.jsonl", "events.jsonl", "report.html", ".lock"}
    assert top == files | {"policy", "generations", "checkpoints", "student", "trackers"}
    assert {p.name for p in (run_dir / "policy").iterdir()} == {"v000000", "v000001", "LATEST"}
    assert (run_dir / "policy/LATEST").read_text().strip() == "v000001"
    for generation in ("g000", "g001"):
        names = sorted(p.name for p in (run_dir / "generations" / generation).iterdir())
        assert names == ["manifest.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    checkpoints = sorted(p.name for p in (run_dir / "checkpoints").glob("step-*"))
    assert 1 <= len(checkpoints) <= 2
    assert (run_dir / "checkpoints/LATEST").read_text().strip() == checkpoints[-1]
    assert not list(run_dir.rglob("*.tmp"))
    assert list((run_dir / "trackers").rglob("events.out.tfevents*")), "tensorboard heard nothing"

    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert resolved["loss"].items() >= {"kd_weight": 0.9, "top_k_mass": "raw"}.items()  # defaults are written out
    assert resolved["provenance"]["command"] == "distill"
    assert resolved["provenance"]["versions"]["torch"] == torch.__version__


def test_columns_of_a_part(whole):
    tree, run_dir, _ = whole
    tokenizer = AutoTokenizer.from_pretrained(tree["student"]["model"])
    for generation in (0, 1):
        table = parts_of(run_dir, generation)
        assert table.select(SCHEMA.names).schema.equals(SCHEMA)
        assert {*table.column_names} - {*SCHEMA.names} <= {"reward"}
        for row in table.to_pylist():
            tokens = len(row["response_ids"])
            assert 1 <= tokens <= 12
            assert len(row["behavior_logprobs"]) == tokens
            assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == 4 * tokens
            assert row["policy_version"] == generation
            stopped = row["response_ids"][-1] == tokenizer.eos_token_id
            assert row["finish_reason"] == ("stop" if stopped else "length")
            assert stopped or tokens == 12
            assert row["student_nll"] == pytest.approx(-np.mean(row["behavior_logprobs"]), rel=1e-5)
            assert row["ifd_student"] == pytest.approx(row["student_nll"] / row["student_nll_free"], rel=1e-5)
            assert row["ifd_teacher"] == pytest.approx(row["teacher_nll"] / row["teacher_nll_free"], rel=1e-5)
            assert row["delta_ifd"] == pytest.approx(row["ifd_teacher"] - row["ifd_student"], rel=1e-4, abs=1e-6)
            delta = row["delta_ifd"]
            assert row["verdict"] == ("degenerate" if delta < -1 else "disconnect" if delta > 1 else "proximal")
        assert len(set(table["sample_id"].to_pylist())) == 24
        assert set(Counter(table["prompt_id"].to_pylist()).values()) == {2}  # samples_per_prompt


def test_the_manifest_counts_what_is_there(whole):
    _, run_dir, _ = whole
    for generation in (0, 1):
        table = parts_of(run_dir, generation)
        manifest = json.loads((run_dir / f"generations/g{generation:03d}/manifest.json").read_text())
        assert manifest["rows"] == len(table) == sum(part["rows"] for part in manifest["parts"])
        assert manifest["policy_version"] == generation
        assert manifest["selection"]["verdicts"] == dict(Counter(table["verdict"].to_pylist()))
        for source in "ab":
            verdicts = [row["verdict"] for row in table.to_pylist() if row["source"] == source]
            assert manifest["selection"]["sources"][source]["verdicts"] == dict(Counter(verdicts))
        deltas = table["delta_ifd"].to_numpy().astype(np.float64)
        assert manifest["selection"]["delta_ifd_quantiles"]["0.5"] == pytest.approx(np.median(deltas))
        assert manifest["response_tokens"] == sum(map(len, table["response_ids"].to_pylist()))
        assert manifest["length_stops"] == table["finish_reason"].to_pylist().count("length")


def test_metrics_follow_every_step(whole):
    _, run_dir, result = whole
    lines = steps_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, result.steps + 1))
    kept = []
    for generation in (0, 1):
        rows = parts_of(run_dir, generation).to_pylist()
        kept.append(sum(len(row["response_ids"]) for row in rows if row["verdict"] == "proximal"))
    assert result.tokens == lines[-1]["tokens"] == 2 * sum(kept)  # two passes over each generation's kept responses
    names = {"step", "tokens", "loss", "ce", "kd", "near_policy_kl", "lr", "grad_norm", "tokens_per_second"}
    for line in lines:
        assert names <= line.keys()
        assert line["loss"] == pytest.approx(0.1 * line["ce"] + 0.9 * line["kd"], rel=1e-5)
        assert 0 < line["fill"] <= 1
    assert lines[-1]["lr"] == pytest.approx(1e-3)
    assert {(line["generation"], line["pass"]) for line in lines} == set(itertools.product((0, 1), (0, 1)))
    # The second generation comes from what was trained in the first: its first step is on-policy again.
    first = next(line for line in lines if line["generation"] == 1)
    last = [line for line in lines if line["generation"] == 0][-1]
    assert lines[0]["near_policy_kl"] < 1e-6
    assert first["near_policy_kl"] < 1e-6 < last["near_policy_kl"]
    assert (lines[0]["published"], first["published"]) == (0, 1)
    assert sum("published" in line for line in lines) == 2


def test_the_result_says_how_generations_ended_and_what_took_time(whole):
    _, run_dir, result = whole
    ends = [max(line["step"] for line in steps_of(run_dir) if line["generation"] == g) for g in (0, 1)]
    assert [(end["generation"], end["step"]) for end in result.generations] == [(0, ends[0]), (1, ends[1])]
    for end in result.generations:
        assert (end["generation_ended"], end["passes"]) == ("passes", 2)
        kls = [step["near_policy_kl"] for step in steps_of(run_dir) if step["generation"] == end["generation"]]
        assert min(kls) < end["near_policy_kl_smoothed"] < max(kls)
    assert result.by_role.keys() == {"trainer"}  # turns are taken
    own = dict(result.by_role["trainer"])
    wall = own.pop("wall")
    assert {"generate", "score", "train", "publish", "checkpoint", "evaluate", "save"} <= own.keys()
    assert 0 < sum(own.values()) <= wall


def test_evaluation_before_between_and_after(whole):
    _, run_dir, result = whole
    evals = [line for line in metrics_of(run_dir) if "eval" in line]
    ends = [max(line["step"] for line in steps_of(run_dir) if (line["generation"], line["pass"]) == at)
            for at in itertools.product((0, 1), (0, 1))]  # fmt: skip
    assert [line["step"] for line in evals] == [0, *ends]
    for line in evals:
        assert {"eval/answer/accuracy", "eval/kl_to_teacher", "eval/top1_agreement"} <= line.keys()
    assert result.before == {key: value for key, value in evals[0].items() if key.startswith("eval/")}
    assert result.after == {key: value for key, value in evals[-1].items() if key.startswith("eval/")}
    assert result.after["eval/kl_to_teacher"] < result.before["eval/kl_to_teacher"]


def test_the_student_loads(whole):
    tree, _, result = whole
    model: Any = AutoModelForCausalLM.from_pretrained(result.student)
    start = AutoModelForCausalLM.from_pretrained(tree["student"]["model"])
    ids = AutoTokenizer.from_pretrained(result.student)("1+2*3=", return_tensors="pt")["input_ids"]
    assert not torch.allclose(model(ids).logits, start(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_running_a_finished_run_again_does_nothing(whole):
    tree, run_dir, result = whole

    def written() -> dict[Path, int]:
        files = [p for p in run_dir.rglob("*") if p.is_file() and p.name not in ("config.yaml", ".lock")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    assert npd.distill(tree) == result
    assert written() == before


def test_eval_takes_the_finished_student(whole):
    tree, _, result = whole
    name, figures = npd.evaluate(tree)
    assert name == str(result.student)
    assert figures == pytest.approx(result.after)


def test_every_passes_thins_evaluation_out(make_tree, data_file):
    tree = make_tree(data={"eval": str(data_file)}, evaluation={"every_passes": 3, "kl_prompts": 2},
                     schedule={"generations": 1, "passes": 4})  # fmt: skip
    npd.distill(tree)
    lines = metrics_of(Path(tree["run_dir"]))
    ends = [max(line["step"] for line in lines if line.get("pass") == i) for i in range(4)]
    assert [line["step"] for line in lines if "eval" in line] == [0, ends[2], ends[3]]


# -- seeds


def test_same_seed_same_bits_other_seed_other_bits(make_tree):
    weights = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        tree = make_tree(name) | {"seed": seed}
        weights.append((npd.distill(tree).student / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


# -- other shapes of the loop


def test_strict_on_policy(make_tree, data_file):
    schedule = {"prompts": 3, "passes": 1, "generations": 4}
    tree = make_tree(schedule=schedule, training={"batch_tokens": 10**6}, checkpoint={"keep": 4})
    result = npd.distill(tree)
    run_dir = Path(tree["run_dir"])
    assert result.steps == 4
    assert all(line["near_policy_kl"] < 1e-6 for line in steps_of(run_dir))  # every step learns from what it wrote itself
    prompts = [parts_of(run_dir, g)["prompt_id"].to_pylist() for g in range(4)]
    assert all(len(p) == 3 for p in prompts)
    assert len(set(itertools.chain(*prompts))) == 12  # four windows of three: every prompt once
    assert [parts_of(run_dir, g)["policy_version"][0].as_py() for g in range(4)] == [0, 1, 2, 3]


def test_a_checkpoint_is_due_at_the_end_of_a_pass_too(make_tree):
    """Or a run whose passes are as long as checkpoint.every_steps would have none."""
    tree = make_tree(training={"batch_tokens": 10**6}, checkpoint={"every_steps": 1, "keep": 9})  # a pass is one step
    npd.distill(tree)
    names = {path.name for path in (Path(tree["run_dir"]) / "checkpoints").glob("step-*")}
    assert names == {f"step-{n:06d}" for n in range(1, 5)}


def test_max_steps_ends_the_run_and_the_cosine(make_tree):
    tree = make_tree(training={"max_steps": 5, "final_learning_rate": 1e-4})
    result = npd.distill(tree)
    lines = steps_of(Path(tree["run_dir"]))
    assert result.steps == len(lines) == 5
    assert lines[-1]["lr"] == pytest.approx(1e-4)


def test_max_tokens_ends_the_run(make_tree):
    tree = make_tree(training={"max_tokens": 100, "final_learning_rate": 1e-4})
    result = npd.distill(tree)
    lines = steps_of(Path(tree["run_dir"]))
    assert lines[-1]["tokens"] == result.tokens >= 100 > lines[-2]["tokens"]
    assert lines[-1]["lr"] == pytest.approx(1e-4)


def test_sft_on_given_references(make_tree, tokenizer, data_file):
    tree = make_tree(rollout={"max_new_tokens": 64}, packing={"length": 128}, schedule={"passes": 3})
    del tree["teacher"]
    result = npd.sft(tree)
    run_dir = Path(tree["run_dir"])
    table = parts_of(run_dir, 0)
    given = [json.loads(line) for line in data_file.read_text().splitlines()]
    wanted = [[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id] for row in given]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in given]
    pairs = zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
    assert sorted(pairs) == sorted(zip(prompts, wanted, strict=True))
    assert set(table["verdict"].to_pylist()) == {"reference"}
    assert set(table["policy_version"].to_pylist()) == {-1}
    assert not (run_dir / "generations/g001").exists()
    lines = steps_of(run_dir)
    assert result.tokens == 3 * sum(map(len, wanted))
    assert all(line["kd"] == 0 and line["loss"] == pytest.approx(line["ce"]) for line in lines)
    assert all(line["near_policy_kl"] is None for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_sft_on_teacher_answers(make_tree, teacher_dir):
    tree = make_tree(data={"references": "teacher"}, rollout={"temperature": 0.0})
    npd.sft(tree)
    table = parts_of(Path(tree["run_dir"]), 0)
    teacher: Any = AutoModelForCausalLM.from_pretrained(teacher_dir)
    for row in table.to_pylist()[:4]:
        prompt = torch.tensor([row["prompt_ids"]])
        answer = teacher.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert row["response_ids"] == answer
        assert row["verdict"] == "reference"


def test_refresh_makes_the_next_generation_and_distill_goes_on(make_tree):
    straight = make_tree("straight")
    npd.distill(straight)
    tree = make_tree("refreshed")
    run_dir = Path(tree["run_dir"])
    first = npd.refresh(tree)
    assert (first.index, first.policy_version, first.manifest["rows"]) == (0, 0, 12)
    assert not (run_dir / "generations/g001").exists()
    assert not (run_dir / "metrics.jsonl").exists()
    made = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    said = io.StringIO()
    npd.distill(tree, display=Display(Console(file=said, width=200)))
    assert said.getvalue().count("Generation 0:") == 0  # `npd refresh` showed it
    assert said.getvalue().count("Generation 1:") == 1
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == made  # not made twice
    assert (run_dir / WEIGHTS).read_bytes() == (Path(straight["run_dir"]) / WEIGHTS).read_bytes()
    with pytest.raises(npd.UserError, match="has all 2 generations; there is nothing to refresh"):
        npd.refresh(tree)


def test_refresh_mends_a_generation_that_lost_a_part(make_tree):
    tree = make_tree()
    npd.refresh(tree)
    part = Path(tree["run_dir"]) / "generations/g000/part-00001.parquet"
    was = part.read_bytes()
    part.unlink()
    assert npd.refresh(tree).index == 0
    assert part.read_bytes() == was
    with pytest.raises(npd.UserError, match="no policy snapshot v000007"):
        npd.refresh(tree, 7)


# -- bad input, refused before anything is computed


def test_selection_that_drops_everything_names_the_bound(make_tree):
    tree = make_tree(selection={"rule": "delta_ifd", "lower": 50.0, "upper": 60.0})
    with pytest.raises(npd.RunError, match=r"dropped all 12 responses.*12 below selection.lower 50.0 \(degenerate\)"):
        npd.distill(tree)
    tree = make_tree("other", selection={"rule": "delta_ifd", "lower": -60.0, "upper": -50.0})
    with pytest.raises(npd.RunError, match=r"12 above selection.upper -50.0 \(disconnect\)"):
        npd.distill(tree)


def test_a_prompt_beyond_the_context_is_refused_at_start(make_tree, tmp_path):
    rows = [{"prompt": "1+" * 60 + "1="}, {"prompt": "1+1="}]  # 122 tokens, and the model's context is 128
    tree = make_tree(data={"train": str(write_jsonl(tmp_path / "long.jsonl", rows)), "max_prompt_tokens": 125},
                     packing={"length": 256})  # fmt: skip
    with pytest.raises(
        npd.UserError, match=r"longest prompt \(122 tokens\) and rollout.max_new_tokens \(12\).*\(128 tokens\)"
    ):
        npd.distill(tree)
    assert not Path(tree["run_dir"]).exists()


def test_mismatched_tokenizers_are_refused(make_tree, tmp_path, tokenizer):
    other = save_model(tmp_path / "foreign", seed=9)
    vocabulary = tokenizer.get_vocab()
    vocabulary["1"], vocabulary["7"] = vocabulary["7"], vocabulary["1"]
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(other)
    tree = make_tree(teacher={"model": str(other)})
    with pytest.raises(npd.UserError, match=r"differ in 2 tokens.*'1' is 5 / 11") as caught:
        npd.distill(tree)
    assert str(other) in str(caught.value)
    assert not Path(tree["run_dir"]).exists()


def test_distill_without_a_teacher(make_tree):
    tree = make_tree()
    del tree["teacher"]
    with pytest.raises(npd.UserError, match="needs a teacher"):
        npd.distill(tree)


# -- interruption: kill -9 at any moment, run again, and nothing differs


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory, teacher_dir, student_dir):
    """A run of a third of a second with every kind of publication: three snapshots of which one is pruned, parts and
    manifests of three generations of which two are pruned, checkpoints in the middle of passes of which all but the
    newest are pruned, and evaluations."""
    root = tmp_path_factory.mktemp("resume")
    prompts = [{"prompt": f"{n}+{n % 7}*3=", "answer": "1"} for n in range(10, 14)]
    data = write_jsonl(root / "data.jsonl", prompts)
    return {
        "student": {"model": str(student_dir)},
        "teacher": {"model": str(teacher_dir)},
        "data": {"train": str(data), "eval": str(data), "max_prompt_tokens": 16},
        "schedule": {"generations": 3, "passes": 2, "lead": 0.0},
        "rollout": {"max_new_tokens": 6, "batch_size": 4, "part_size": 2},
        "scoring": {"top_k": 3, "batch_tokens": 64},
        "selection": {"rule": "none"},
        "packing": {"length": 22},
        "training": {"batch_tokens": 44, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 3, "keep": 1},
        "evaluation": {"kl_prompts": 2, "every_passes": 2},
        "tracking": {"trackers": [], "report": False},
    }


def in_child(action, report: Path, seconds: float = HANG) -> int:
    """Run `action` in a forked process; its exit status, or minus the signal that ended it. A kill there is a real one:
    no handler and no `finally` runs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the process did not end within {seconds} s")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counted:
    """Kills the process when called for the nth time (1, 2, ...)."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            kill_self()


def hook_publications(nth: int, after: bool) -> None:
    point, real = Counted(nth), npd.store.files.put

    def put(aside: Path, path: Path) -> None:
        if not after:
            point()
        real(aside, path)
        if after:
            point()

    npd.store.files.put = put


def hook_steps(nth: int, when: str) -> None:
    """Before an optimiser step, right after the weights changed, or after its metrics are written."""
    point = Counted(nth)
    if when == "updated":
        real_step = torch.optim.AdamW.step

        def step(self, *args, **kwargs):
            out = real_step(self, *args, **kwargs)
            point()
            return out

        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    else:
        real = npd.train.trainer.Trainer.step

        def whole_step(self, *args):
            if when == "before":
                point()
            out = real(self, *args)
            if when == "after":
                point()
            return out

        npd.train.trainer.Trainer.step = whole_step  # type: ignore[method-assign]


def hook_file_events(run_dir: Path, nth: int) -> None:
    """Before the nth change of the run directory that Python itself makes: files opened for writing, renamed, removed."""
    point, root = Counted(nth), str(run_dir)

    def audit(event: str, args: tuple) -> None:
        if event == "open":
            ours = str(args[0]).startswith(root) and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
        elif event in ("os.remove", "os.rmdir"):  # rmtree names what it removes relative to an open directory
            ours = str(args[0]).startswith(root) or not str(args[0]).startswith("/")
        else:
            ours = event in ("os.rename", "os.mkdir") and str(args[0]).startswith(root)
        if ours:
            point()

    sys.addaudithook(audit)


def whole_state(run_dir: Path) -> dict:
    """All of a finished run that must not depend on interruptions."""
    files = [*run_dir.glob("generations/g*/part-*"), *run_dir.glob("generations/g*/manifest.json")]
    files += [*run_dir.glob("policy/v*/model.safetensors"), *run_dir.glob("checkpoints/step-*/model.safetensors")]
    files += [run_dir / WEIGHTS, run_dir / "policy/LATEST", run_dir / "checkpoints/LATEST"]
    times = ("tokens_per_second", "publish_seconds")
    timeless = [{k: v for k, v in line.items() if k not in times} for line in metrics_of(run_dir)]
    state = {str(f.relative_to(run_dir)): f.read_bytes() for f in files}
    temporary = [str(f) for f in (*run_dir.rglob(".*.tmp"), *run_dir.glob("cache"))]
    return state | {"metrics": timeless, "temporary": temporary}


@pytest.fixture(scope="module")
def uninterrupted(small_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    npd.distill(small_tree | {"run_dir": str(run_dir)})
    state = whole_state(run_dir)
    # It is only worth comparing with if it is what it should be.
    assert state["temporary"] == []
    assert [line["step"] for line in steps_of(run_dir)] == list(range(1, len(steps_of(run_dir)) + 1))
    manifests = [m for generation in range(3) if (m := Store(run_dir).manifest(generation))]  # with checksums of every part
    assert [(m.rows, len(m.parts), m.removed) for m in manifests] == [(4, 2, True)] * 2 + [(4, 2, False)]
    assert [path.parent.name for path in run_dir.glob("generations/*/part-*")] == ["g002", "g002"]
    assert len(set(parts_of(run_dir, 2)["prompt_id"].to_pylist())) == 4
    assert {p.name for p in (run_dir / "policy").glob("v*")} == {"v000000", "v000002"}
    assert any(line["step"] for line in state["metrics"] if "eval" in line)
    return state


def count_publications(run: Path, tree: dict) -> int:
    seen = run.parent / "seen"
    seen.write_text("")

    def action() -> None:
        real = npd.store.files.put

        def put(aside: Path, path: Path) -> None:
            with seen.open("a") as file:
                file.write(f"{path.name}\n")
            real(aside, path)

        npd.store.files.put = put
        npd.distill(tree)

    assert in_child(action, run.parent / "report") == 0
    return len(seen.read_text().split())


def interrupted(tree: dict, root: Path, *hooks) -> dict:
    """Run with each hook in turn until it kills, then without, and give the finished run's state."""
    run_dir = root / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    tree = tree | {"run_dir": str(run_dir)}
    report = root / "report"
    for hook in (*hooks, None):

        def action(hook=hook) -> None:
            if hook:
                hook(run_dir)
            npd.distill(tree)

        status = in_child(action, report)
        if hook:
            assert status in (-signal.SIGKILL, 0), report.read_text()
        else:
            assert status == 0, report.read_text()
    return whole_state(run_dir)


def assert_same(got: dict, wanted: dict, where: str) -> None:
    different = sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
    if different:  # pytest.fail: a rewritten assert would print the weights
        pytest.fail(f"{where}: {different} differ from the uninterrupted run", pytrace=False)


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_publication(small_tree, uninterrupted, tmp_path, after, every):
    count = count_publications(tmp_path / "run", small_tree | {"run_dir": str(tmp_path / "run")})
    assert count > 20
    for nth in range(1, count + 1, every):
        got = interrupted(small_tree, tmp_path, lambda _, nth=nth: hook_publications(nth, after))
        assert_same(got, uninterrupted, f"killed {'after' if after else 'before'} publication {nth} of {count}")


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "updated", "after"])
def test_killed_at_every_optimiser_step(small_tree, uninterrupted, tmp_path, when, every):
    count = max(line["step"] for line in uninterrupted["metrics"])
    for nth in range(1 if every == 1 else 2, count + 1, every):
        got = interrupted(small_tree, tmp_path, lambda _, nth=nth: hook_steps(nth, when))
        assert_same(got, uninterrupted, f"killed {when} step {nth} of {count}")


# No shrinking: an example is a second, and a failing one says all there is to say.
@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
          phases=[Phase.generate], print_blob=False)  # fmt: skip
@given(points=st.lists(st.integers(1, 330), min_size=1, max_size=3))
@pytest.mark.slow
def test_killed_at_any_change_of_the_directory_several_times(small_tree, uninterrupted, tmp_path, points):
    hooks = [lambda run_dir, nth=nth: hook_file_events(run_dir, nth) for nth in points]
    assert_same(interrupted(small_tree, tmp_path, *hooks), uninterrupted, f"killed at changes {points}")


def test_a_torn_line_of_metrics_is_no_obstacle(small_tree, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    tree = small_tree | {"run_dir": str(run_dir)}

    def killed_later() -> None:
        hook_steps(6, "after")
        npd.distill(tree)

    assert in_child(killed_later, tmp_path / "report") == -signal.SIGKILL
    for name in ("metrics.jsonl", "events.jsonl"):
        file = run_dir / name
        file.write_text(file.read_text()[:-20])
    npd.distill(tree)
    assert_same(whole_state(run_dir), uninterrupted, "torn metrics")


@pytest.mark.parametrize(("wanted", "generation"), [("generations/g000/part-00000.parquet", 0), ("policy/v000001", 1)])
def test_a_real_kill_from_outside(small_tree, uninterrupted, tmp_path, wanted, generation):
    """The command in a process of its own, killed by another one as soon as a file appears, and started again."""
    run_dir = tmp_path / "run"
    config = write_yaml(tmp_path / "config.yaml", small_tree | {"run_dir": str(run_dir)})
    first = min(line["step"] for line in uninterrupted["metrics"] if line.get("generation") == generation)
    killed_from_outside("distill", str(config), once=run_dir / wanted, before_step=first)
    assert not (run_dir / "student").exists()
    npd.distill(config)
    assert_same(whole_state(run_dir), uninterrupted, f"killed when {wanted} appeared")


def test_a_run_of_another_configuration_is_refused(make_tree):
    tree = make_tree(training={"max_steps": 1})
    npd.distill(tree)
    changed = make_tree(training={"max_steps": 1, "learning_rate": 0.5}, scoring={"top_k": 2})
    with pytest.raises(npd.UserError, match=r"scoring.top_k: 4 -> 2; training.learning_rate: 0.001 -> 0.5"):
        npd.distill(changed)
    with pytest.raises(npd.UserError, match="holds a run of `npd distill`; choose another run_dir for `npd sft`"):
        npd.sft(make_tree(data={"references": "teacher"}))
    # What does not change the result may differ.
    npd.distill(make_tree(training={"max_steps": 1, "micro_batch_rows": 2}, checkpoint={"every_steps": 1}))


def test_a_damaged_part_is_made_again_by_itself(make_tree):
    tree = make_tree()
    npd.refresh(tree)
    store = Store(load_config(tree).run_dir)
    part = store.part(0, 1)
    was = part.read_bytes()
    part.write_bytes(was[:300] + bytes([was[300] ^ 0xFF]) + was[301:])
    result = npd.distill(tree)
    assert part.read_bytes() == was
    straight = make_tree("straight")
    assert (npd.distill(straight).student / "model.safetensors").read_bytes() == (
        result.student / "model.safetensors"
    ).read_bytes()


def test_dry_run_checks_tasks_and_the_run_directory(make_tree):
    for options, message in (
        ({"evaluation": {"tasks": ["gsm_symbloic"]}}, "'gsm_symbloic'.*is no task"),
        ({"evaluation": {"tasks": ["chain_sum", {"name": "chain_sum", "size": 3}]}}, "tasks has a name twice"),
        ({"placement": {"train": "cuda:99"}}, "placement.train names cuda:99, but this machine has"),
    ):
        with pytest.raises(npd.UserError, match=message):
            npd.preflight.prepare(load_config(make_tree(**options)), "distill")


def test_a_run_dir_that_is_a_file_is_refused(make_tree):
    tree = make_tree()
    Path(tree["run_dir"]).write_text("mine")
    with pytest.raises(npd.UserError, match="is a file; choose a directory"):
        npd.distill(tree)


def test_progress_is_of_the_limit_that_ends_the_run(make_tree):
    npd.distill(make_tree(training={"max_steps": 1000, "final_learning_rate": 1e-5}))
    lines = steps_of(Path(make_tree()["run_dir"]))
    assert lines[-1]["step"] < 1000
    assert lines[-1]["lr"] == pytest.approx(1e-5)


def test_half_a_surrogate_pair_is_named(make_tree, tmp_path):
    data = tmp_path / "torn.jsonl"
    data.write_text('{"prompt": "1+1="}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(npd.UserError, match=r"torn\.jsonl, line 2 can't be turned into tokens"):
        npd.distill(make_tree(data={"train": str(data)}))


def test_a_held_out_row_without_an_answer_is_named_by_its_line(make_tree, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "1=", "answer": "1"}\n{"prompt": "1=", "answer": "1"}\n{"prompt": "2="}\n')
    tree = make_tree(data={"eval": str(held_out)}, evaluation={"tasks": ["answer"]})
    with pytest.raises(npd.UserError, match=r"held-out\.jsonl, line 3 has no answer"):
        npd.distill(tree)


def test_a_resumed_run_does_not_pass_its_weights_off_as_the_start(make_tree):
    tree = make_tree(checkpoint={"every_steps": 1})
    npd.distill(tree)
    run_dir = Path(tree["run_dir"])
    shutil.rmtree(run_dir / "student")
    shutil.rmtree(run_dir / "policy/v000000")
    npd.distill(tree)
    assert (run_dir / "student/model.safetensors").exists()
    assert not (run_dir / "policy/v000000").exists()


def test_evaluation_leaves_no_trace_in_snapshots(make_tree, data_file):
    """Generating changes the model's generation_config for a while; a snapshot written beside it must not have that."""
    tree = make_tree(
        data={"eval": str(data_file)},
        schedule={"lead": 0.0, "passes": 1},
        evaluation={"tasks": ["answer"], "temperature": 0.7, "kl_prompts": 4},
    )
    result = npd.distill(tree)
    configs = [json.loads(f.read_text()) for f in result.run_dir.glob("*/v*/generation_config.json")]
    configs.append(json.loads((result.student / "generation_config.json").read_text()))
    assert len(configs) == 3
    assert all(config == configs[0] for config in configs)
    assert "temperature" not in configs[0]


def test_a_proxy_is_called_one_where_it_ends_a_generation(make_tree):
    tree = make_tree(rollout={"temperature": 0.7}, schedule={"kl_budget": 1e-4}, training={"learning_rate": 1e-2})
    result = npd.distill(tree)
    assert [end["generation_ended"] for end in result.generations] == ["kl_budget", "kl_budget"]
    assert all(end["near_policy_kl_is_proxy"] for end in result.generations)


def test_threads_are_given_back(make_tree, monkeypatch):
    before = torch.get_num_threads()

    def broken(self, *args):
        torch.set_num_threads(before + 1)
        raise ValueError("boom")

    monkeypatch.setattr(npd.train.trainer.Trainer, "step", broken)
    with pytest.raises(ValueError, match="boom"):
        npd.distill(make_tree())
    assert torch.get_num_threads() == before


def test_a_snapshot_that_is_wanted_and_gone_is_missed_at_once(make_tree, monkeypatch):
    """Not waited for: nobody could write the parts that lack."""
    tree = make_tree(schedule={"lead": 1.0}, placement={"rollout": "external"})
    tree["schedule"]["lead"] = 0.0
    del tree["placement"]
    npd.refresh(tree)
    store = Store(tree["run_dir"])
    store.part(0, 1).unlink()
    shutil.rmtree(store.path / "policy")
    monkeypatch.setattr(npd.train.work.RunWork, "publish", lambda self, version: None)
    resumed = tree | {"placement": {"rollout": "external"}, "schedule": tree["schedule"] | {"lead": 0.5}}
    file = store.path / "config.yaml"
    file.write_text(file.read_text().replace("lead: 0.0", "lead: 0.5"))
    with pytest.raises(npd.UserError, match=r"Generation 0 .* lacks 1 parts, and the snapshot"):
        npd.distill(resumed)
