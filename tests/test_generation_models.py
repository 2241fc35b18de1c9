"""Models that make generations: loaded once, let go of, never damaged ones; and how far a student is from its teachers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from bench import Tasks
from conftest import Held, save_model
from rich.console import Console

import npd.generations.models
import npd.scoring.local
from npd.config import Sampling, load_config
from npd.errors import UserError
from npd.generations.evaluated import AskedTeacher, Evaluated
from npd.generations.models import Models, engine_difference, load_tokenizers, routed_writer
from npd.models import load_model, load_tokenizer
from npd.models import save_model as write_model
from npd.observe.display import Display
from npd.placement import resolve_placement
from npd.rollout.transformers import TransformersEngine
from npd.scoring import Reading
from npd.store import Store


@pytest.fixture
def other_dir(tmp_path) -> Path:
    return save_model(tmp_path / "other", seed=9, hidden=16)


@pytest.fixture
def make(make_tree) -> Callable[..., Models]:
    """A run's models, with two snapshots of the student."""

    def make(**sections: Any) -> Models:
        config = load_config(make_tree(**sections))
        store = Store(config.run_dir)
        student: Any = load_model(config.student)
        tokenizer = load_tokenizer(config.student)
        for version in (0, 1):
            store.publish(version, lambda path: write_model(student, tokenizer, path), version)
            with torch.no_grad():
                student.get_input_embeddings().weight.mul_(1.5)
        tokens = load_tokenizers(config)
        display = Display(Console(quiet=True))
        return Models(config, store, tokens.vocabulary, 0, 32, display, resolve_placement(config, take_turns=True))

    return make


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the directories that weights were loaded from."""
    names: list[str] = []

    def counted(config: Any, **options: Any) -> Any:
        names.append(Path(config.model).name)
        return load_model(config, **options)

    monkeypatch.setattr(npd.generations.models, "load_model", counted)
    monkeypatch.setattr(npd.scoring.local.models, "load_model", counted)
    return names


def test_each_model_is_loaded_when_it_is_first_asked_for_and_once(make, loads):
    kept = make()
    assert loads == []
    assert kept.student(0) is kept.student(0)
    engine = kept.engine(0)
    assert isinstance(engine, TransformersEngine)
    assert loads == ["v000000"]  # engine and prefill read with the same weights
    assert kept.teacher(None) is kept.teacher(None)
    assert loads == ["v000000", "teacher"]
    assert kept.engine(1) is engine
    assert loads == ["v000000", "teacher", "v000001"]
    assert kept.student(1) is kept.student(1)
    kept.student(0)
    assert loads == ["v000000", "teacher", "v000001", "v000000"]  # of the student's snapshots, the last one is kept


def test_an_engine_answers_with_the_snapshot_it_was_given(make):
    kept = make()
    table = pa.table({"prompt_ids": pa.array([[5, 6], [7]], pa.list_(pa.int32()))})
    for version in (0, 1):
        answered = kept.engine(version).answer(table, Sampling(6), seed=1)
        found = engine_difference(answered, kept.prefill(kept.student(version)))
        assert found.mean_abs_difference < 1e-5
        wrong = engine_difference(answered, kept.prefill(kept.student(1 - version)))
        assert wrong.mean_abs_difference > 0.05


def test_release_lets_the_student_go_and_close_everything(make, loads):
    kept = make()
    engine, teacher = kept.engine(0), kept.teacher(None)
    kept.release()
    assert kept._student is None
    assert kept.teacher(None) is teacher
    assert kept.engine(0) is engine
    assert loads == ["v000000", "teacher", "v000000"]
    kept.close()
    assert (kept._student, kept._engine, kept._teachers) == (None, None, {})
    with pytest.raises(AssertionError, match="once it is closed"):
        teacher.model()
    kept.close()
    kept.teacher(None)  # they can be had again
    assert loads[-1] == "teacher"


def test_a_damaged_snapshot_is_refused(make):
    kept = make()
    file = kept.store.policy(1) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    kept.student(0)
    for load in (kept.student, kept.engine, kept.snapshot):
        with pytest.raises(UserError, match=r"v000001 is damaged: model\.safetensors is not what was written"):
            load(1)
    with pytest.raises(UserError, match=r"v000007 .* is no longer kept \(checkpoint\.keep 2\)"):
        kept.student(7)


def test_checksums_are_compared_once_a_snapshot(make, monkeypatch):
    kept, checked = make(), []
    monkeypatch.setattr(kept.store, "check_model", lambda path: checked.append(path.name))
    for version in (0, 0, 1, 1, 0):
        kept.engine(version)
    assert checked == ["v000000", "v000001", "v000000"]


# -- under evaluation


def kl_by_hand(student: Any, teacher: Any, context: list[int], response: list[int], size: int) -> tuple[float, int]:
    """KL(teacher || student) on one response in float64, each model reading it alone; and where both agree on the best."""
    ids = torch.tensor([context + response])
    with torch.no_grad():
        s, t = (m.double()(ids).logits[0, len(context) - 1 : -1, :size].log_softmax(-1) for m in (student, teacher))
    return float((t.exp() * (t - s)).sum()), int((t.argmax(-1) == s.argmax(-1)).sum())


def test_the_gap_is_summed_over_teachers_by_source(make, teacher_dir, other_dir):
    kept = make(teachers={"b": {"model": str(other_dir)}})
    rng = np.random.default_rng(0)
    rows = [
        (source, rng.integers(5, 20, 3).tolist(), rng.integers(5, 20, n).tolist())
        for source, n in zip("abacbb", (4, 1, 7, 2, 5, 3), strict=True)
    ]
    table = pa.table(
        {"source": [r[0] for r in rows], "prompt_ids": [r[1] for r in rows], "response_ids": [r[2] for r in rows]}
    )
    weights = Held(kept.student(1))
    weights.model().train()
    gap = Evaluated(kept, weights, lambda: pytest.fail("nobody generates")).gap(table)
    assert weights.model().training  # as it was
    student = load_model(kept.config.student.model_copy(update={"model": str(kept.store.policy(1))}))
    teachers = {key: load_model(teacher) for key, teacher in kept.config.all_teachers.items()}
    kl, agreed = 0.0, 0
    for source, context, response in rows:
        one, same = kl_by_hand(student, teachers["b" if source == "b" else None], context, response, kept.vocabulary.size)
        kl, agreed = kl + one, agreed + same
    assert gap.kl == pytest.approx(kl, rel=1e-4)
    assert (gap.agreed, gap.tokens, gap.exact) == (agreed, 22, True)
    only = Evaluated(kept, weights, lambda: None).gap(table.slice(0, 1))
    assert only.tokens == 4
    assert only.kl < gap.kl


def test_evaluation_writes_inside_its_room(make):
    kept, told = make(), []

    @contextmanager
    def around():
        told.append("enter")
        yield
        told.append("leave")

    table = pa.table({"prompt_ids": pa.array([[5, 6], [7]], pa.list_(pa.int32()))})
    kept.display = tasks = Tasks()
    weights = Held(kept.student(0))
    sampling = Sampling(6, samples_per_prompt=3)
    answered = Evaluated(kept, weights, around).write(table, sampling, 5, "title")
    assert told == ["enter", "leave"]
    assert tasks.tasks == [["title", 6, "responses", 6]]
    assert answered.equals(kept.engine(0).answer(table, sampling, 5))
    teacher = AskedTeacher(kept)
    written = teacher.write(table, sampling, 5, "teacher")
    assert "behavior_logprobs" not in written.column_names
    gap = teacher.gap(written)
    assert (gap.kl, gap.agreed, gap.tokens, gap.exact) == (0.0, 6, 6, True)


def test_references_are_written_by_the_teacher_of_their_source(make, other_dir):
    kept = make(teachers={"b": {"model": str(other_dir)}})
    prompts = [[5, 6], [7], [8, 9, 10], [11]]
    table = pa.table({"source": list("abca"), "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    sampling = Sampling(8, temperature=0.0)
    written = routed_writer(kept, sampling)(table, 3, lambda steps: None)
    for i, key in enumerate([None, "b", None, None]):
        alone = kept.teacher(key).write(table.slice(i, 1), sampling, 3)
        assert alone["response_ids"].to_pylist() == written["response_ids"].slice(i, 1).to_pylist()


def test_engine_difference_by_hand():
    """Mean over tokens, not over responses, in float64."""
    theirs, ours = [[-1.0], [-2.0, -0.5, -3.0]], [[-1.5], [-1.0, -0.5, -3.25]]
    table = pa.table({"prompt_ids": [[1], [2]], "response_ids": [[5], [6, 7, 8]], "behavior_logprobs": theirs})
    nothing = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    prefill: Any = lambda contexts, responses: [Reading(np.array(o, np.float32), *nothing) for o in ours]  # noqa: E731
    found = engine_difference(table, prefill)
    assert (found.samples, found.tokens) == (2, 4)
    assert found.mean_difference == pytest.approx((0.5 - 1.0 + 0.0 + 0.25) / 4)
    assert found.mean_abs_difference == pytest.approx((0.5 + 1.0 + 0.0 + 0.25) / 4)
