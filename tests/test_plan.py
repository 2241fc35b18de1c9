"""The plan against the run: what `--dry-run` says is what a run of the longest responses then takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import save_model, write_jsonl

import npd
import npd.run
import npd.store.files
from npd import plan as plans
from npd.config import Sampling, load_config
from npd.demo.task import make_problems
from npd.models import load_model
from npd.plan import Plan, make_plan, plan_rows
from npd.preflight import DISTILL, SFT, prepare
from npd.records import StepLine
from npd.registry import ENGINES
from npd.rollout import Engine, Progress, Request, Weights
from npd.store import REFERENCE, Store
from npd.store.schema import add_answers
from npd.train.trainer import Trainer

MOST = 96  # tokens of every response, so that there is something on the disk
TOO_MUCH = 3.0  # times what a run took, which its plan may not say


class Longest(Engine):
    """Writes as many tokens as it may, and no stop token."""

    exact = True

    def take(self, weights: Weights) -> None:
        pass

    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        stops = self.setting.vocabulary.stop_ids
        for number, table, seed in requests:
            draw = torch.Generator().manual_seed(seed)
            shape = (len(table) * sampling.samples_per_prompt, sampling.max_new_tokens)
            ids = torch.randint(5, 20, shape, generator=draw)
            yield number, add_answers(table, ids.tolist(), stops, (-torch.rand(shape, generator=draw)).tolist())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Mapping[str, str]:
    """Data, and models wide enough that weights are what they take on disk."""
    folder = tmp_path_factory.mktemp("plan")
    rows = [{"prompt": p.prompt, "source": "abc"[i % 3]} for i, p in enumerate(make_problems(24, seed=7))]
    completed = [row | {"completion": "1" * (1 + 3 * i)} for i, row in enumerate(rows)]
    return {
        "prompts": str(write_jsonl(folder / "prompts.jsonl", rows)),
        "completed": str(write_jsonl(folder / "completed.jsonl", completed)),
        "student": str(save_model(folder / "student", seed=3, hidden=128)),
        "untied": str(save_model(folder / "untied", seed=3, hidden=64, tied=False)),
        "teacher": str(save_model(folder / "teacher", seed=1, hidden=64)),
    }


@pytest.fixture
def make(files, tmp_path) -> Callable[..., dict[str, Any]]:
    def make(**sections: Any) -> dict[str, Any]:
        ENGINES.register("longest", Longest)
        tree: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "student": {"model": files["student"]},
            "teacher": {"model": files["teacher"]},
            "data": {"train": files["prompts"], "max_prompt_tokens": 24},
            "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
            "rollout": {"engine": "longest", "max_new_tokens": MOST},
            "scoring": {"top_k": 10},
            "selection": {"rule": "none"},
            "packing": {"length": 256},
            "training": {"batch_tokens": 512},
            "checkpoint": {"every_steps": 4},
            "tracking": {"trackers": [], "report": False},
        }
        for name, options in sections.items():
            tree[name] = tree.get(name, {}) | options
        return tree

    return make


def on_disk(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def peak(monkeypatch, tmp_path) -> list[int]:
    """The most that the run directory held, looked at whenever something in it is whole but not yet in its place."""
    most = [0]
    real = npd.store.files.put

    def put(aside: Path, path: Path) -> None:
        most[0] = max(most[0], on_disk(tmp_path / "run"))
        real(aside, path)

    monkeypatch.setattr(npd.store.files, "put", put)
    return most


def response_tokens(store: Store, generation: int) -> int:
    manifest = store.manifest(generation)
    assert manifest is not None
    assert manifest.response_tokens is not None
    return manifest.response_tokens


MIXED = {"references": 0.25, "passes": 2, "generations": 2, "lead": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "distill": (DISTILL, {}),
    "samples, small parts": (
        DISTILL,
        {"rollout": {"samples_per_prompt": 2, "part_size": 3}, "training": {"batch_tokens": 1024}},
    ),
    "windows": (DISTILL, {"schedule": {"prompts": 7, "generations": 9, "passes": 1}, "rollout": {"part_size": 3}}),
    "keep 1": (DISTILL, {"schedule": {"generations": 6, "passes": 1}, "checkpoint": {"every_steps": 2, "keep": 1}}),
    "untied": (DISTILL, {"student": {"dtype": "float32"}}),
    "lora": (DISTILL, {"student": {"lora": {"r": 4}}}),
    "references": (DISTILL, {"schedule": MIXED, "data": {"references": "teacher"}}),
    "max_steps": (DISTILL, {"training": {"max_steps": 11}}),
    "max_tokens": (DISTILL, {"training": {"max_tokens": 3000}}),
    "no checkpoint": (DISTILL, {"checkpoint": {"every_steps": 1000}}),
    "sft": (SFT, {"schedule": {"passes": 3}}),
    "sft by the teacher": (SFT, {"data": {"references": "teacher"}, "rollout": {"part_size": 5}}),
    "sft of adapters": (SFT, {"student": {"lora": {"r": 8}}}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_the_run_takes(make, files, peak, name):
    command, sections = CASES[name]
    if name == "untied":
        sections = sections | {"student": {"model": files["untied"]}}
    if command == SFT and "data" not in sections:
        sections = sections | {"data": {"train": files["completed"]}}
    tree = make(**sections)
    setup = prepare(load_config(tree), command)
    planned = make_plan(setup)
    assert not Path(tree["run_dir"]).exists()
    result = (npd.distill if command == DISTILL else npd.sft)(tree)
    store = Store(result.run_dir)
    assert planned.steps == result.steps
    assert planned.samples == store.manifest(0).rows  # type: ignore[union-attr]
    for generation in range(planned.generations):
        if store.manifest(generation) is not None:
            assert planned.response_tokens == response_tokens(store, generation)
    took = max(peak[0], on_disk(result.run_dir))
    assert took <= planned.disk_bytes <= TOO_MUCH * took
    if name == "max_tokens":
        lines = [line for line in store.read_metrics() if isinstance(line, StepLine)]
        assert [line.tokens >= 3000 for line in lines if line.tokens is not None][-2:] == [False, True]
    if name == "references":
        assert response_tokens(store, REFERENCE) == MOST * setup.generations.size(REFERENCE)


def test_shorter_responses_take_fewer_steps(make):
    """With an engine that may stop, the plan is an upper bound; parts land one by one, and rows fill less well."""
    tree = make(rollout={"engine": "transformers", "part_size": 3})
    planned, result = make_plan(prepare(load_config(tree), DISTILL)), npd.distill(tree)
    assert result.steps <= planned.steps
    assert response_tokens(Store(result.run_dir), 0) <= planned.response_tokens


def tensors(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


FEW = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(("which", "dtype", "lora"), [
    ("student", "auto", None), ("untied", "bfloat16", None), ("untied", "auto", {"r": 4}), ("student", "bfloat16", {"r": 4}),
    ("student", "auto", FEW), ("untied", "bfloat16", FEW),
])  # fmt: skip
def test_memory_is_that_of_the_real_tensors(make, files, monkeypatch, which, dtype, lora):
    """Weights, gradients and AdamW's moments, counted after the first step; its step counters are no moments."""
    real, seen = Trainer.step, []

    def step(self: Trainer, *args: Any) -> Any:
        optimizer, model = self.optimizer, self.loss_model
        zero = optimizer.zero_grad

        def before_it_is_zero() -> None:
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
            moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
            seen.append(tensors(model) + gradients + sum(v.numel() * v.element_size() for v in moments))
            zero()

        monkeypatch.setattr(optimizer, "zero_grad", before_it_is_zero)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "step", step)
    model = {"model": files[which], "dtype": dtype, "lora": lora}
    tree = make(student=model, data={"train": files["completed"]}, training={"max_steps": 1})
    config = load_config(tree)
    planned = make_plan(prepare(config, SFT))
    npd.sft(tree)
    assert seen == [planned.training_bytes]
    loaded = load_model(config.student)
    assert tensors(loaded) == planned.inference_bytes
    assert sum(p.numel() for p in loaded.parameters()) == planned.student_parameters


@pytest.mark.parametrize("sample", [1, 24, 30, 60])
@pytest.mark.parametrize("limit", [{}, {"max_steps": 13}, {"max_tokens": 9000}])
def test_a_long_run_is_counted_in_proportion(make, monkeypatch, sample, limit):
    """Of a few of its responses; each pass, or each part of it, may end with rows that do not fill a step."""
    setup = prepare(load_config(make(rollout={"part_size": 4}, schedule={"passes": 3, "lead": 0.0}, training=limit)), DISTILL)
    whole = make_plan(setup)
    monkeypatch.setattr(plans, "SAMPLE", sample)
    part = make_plan(setup)
    assert whole.steps <= part.steps <= math.ceil(1.5 * whole.steps)
    assert replace(part, steps=0, disk_bytes=0.0) == replace(whole, steps=0, disk_bytes=0.0)
    assert whole.disk_bytes / 1.5 <= part.disk_bytes <= 1.5 * whole.disk_bytes


def test_what_ends_a_run_earlier_is_said(make):
    setup = prepare(load_config(make(training={"max_steps": 3, "max_tokens": 10_000})), DISTILL)
    plan: Plan = make_plan(setup)
    assert plan.limits == ["training.max_steps 3", "training.max_tokens 10,000"]
    assert plan.steps == 3
    rows = [what for what, _ in plan_rows(setup, plan)]
    assert rows.count("ends earlier at") == 2
    assert "student in rollout" in rows
