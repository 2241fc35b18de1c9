"""Packed prefill against every sample read alone through the plain model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import engine_of, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npd.scoring.prefill
from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.models import Vocabulary, load_model
from npd.scoring import Prefill, ScoreStudent, ScoreTeacher, TeacherSetting
from npd.scoring.local import LocalTeacher

SHARED = 20
VOCABULARY = Vocabulary(size=SHARED, stop_ids=(2,), start_id=1)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, tmp_path_factory):
    """A model whose vocabulary is padded beyond the shared one, as 152,064 is beyond 151,936."""
    path = save_model(tmp_path_factory.mktemp("scoring") / request.param, seed=5, layers=3, vocabulary=24, tied=False)
    model = load_model(ModelConfig(model=str(path), attention=request.param))
    assert model.config._attn_implementation == request.param
    return model


def alone(model, context: list[int], response: list[int]) -> torch.Tensor:
    """[T, V] log-probabilities at the positions that predict the response."""
    with torch.no_grad():
        logits = model(torch.tensor([context + response])).logits[0]
    return logits.log_softmax(-1)[len(context) - 1 : len(context) + len(response) - 1]


def make_pairs(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(3, SHARED, rng.integers(1, 15)).tolist() for _ in range(count)]
    responses = [rng.integers(2, SHARED, rng.integers(1, 18)).tolist() for _ in range(count)]
    responses[3] = [2]  # nothing but a stop token
    responses[4], contexts[4] = [7], [1]
    return contexts, responses


def assert_reads_alike(model, contexts, responses, batch_tokens: int, top_k: int) -> None:
    readings = Prefill(model, VOCABULARY, 0, batch_tokens)(contexts, responses, top_k)
    assert len(readings) == len(responses)
    for context, response, reading in zip(contexts, responses, readings, strict=True):
        dense = alone(model, context, response)
        wanted = dense.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
        assert reading.logprobs.shape == (len(response),)
        np.testing.assert_allclose(reading.logprobs, wanted, atol=1e-4, rtol=0)
        best = dense[:, :SHARED].topk(top_k)  # probabilities over the whole vocabulary, ids of the shared one
        np.testing.assert_allclose(reading.topk_logprobs, best.values.numpy(), atol=1e-4, rtol=0)
        assert (np.diff(reading.topk_logprobs, axis=1) <= 0).all()
        own = dense.gather(1, torch.from_numpy(reading.topk_ids).long()).numpy()
        np.testing.assert_allclose(own, reading.topk_logprobs, atol=1e-4, rtol=0)  # the ids are those of the values
        assert all(len(set(row)) == top_k for row in reading.topk_ids.tolist())
        assert reading.topk_ids.max(initial=0) < SHARED


@pytest.mark.parametrize("batch_tokens", [1, 7, 40, 100, 8192])
def test_packed_equals_alone(model, batch_tokens):
    assert_reads_alike(model, *make_pairs(17, seed=batch_tokens), batch_tokens, top_k=4)


def test_free_reading_equals_alone(model):
    _, responses = make_pairs(12, seed=3)
    assert_reads_alike(model, [[1]] * len(responses), responses, 60, top_k=1)


def test_top_k_up_to_the_shared_vocabulary(model):
    contexts, responses = make_pairs(6, seed=4)
    assert_reads_alike(model, contexts, responses, 50, top_k=SHARED)


def test_chunks_of_the_head_change_nothing(model, monkeypatch):
    contexts, responses = make_pairs(17, seed=8)
    monkeypatch.setattr(npd.losses.linear, "CHUNK_ELEMENTS", 17 * 24)
    assert sum(map(len, responses)) > 5 * 17
    assert_reads_alike(model, contexts, responses, 400, top_k=3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=15),
    batch_tokens=st.integers(1, 200),
    data=st.data(),
)
def test_any_lengths_and_batches(student_model, sizes, batch_tokens, data):
    token = st.integers(0, SHARED - 1)
    contexts = [data.draw(st.lists(token, min_size=c, max_size=c)) for c, _ in sizes]
    responses = [data.draw(st.lists(token, min_size=r, max_size=r)) for _, r in sizes]
    assert_reads_alike(student_model, contexts, responses, batch_tokens, top_k=2)


@pytest.fixture(scope="module")
def student_model(student_dir):
    return load_model(ModelConfig(model=str(student_dir)))


@pytest.fixture(scope="module")
def rolled_out(student_model):
    prompts = [[5, 14, 6, 16], [4], [9, 9, 14, 5, 6, 16], [7, 14, 7, 16]]
    table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    return engine_of(student_model, VOCABULARY, batch_size=2).answer(table, Sampling(10), seed=1)


def test_teacher_stage_adds_the_contracts_columns(model, rolled_out):
    told: list[int] = []
    table = ScoreTeacher(Prefill(model, VOCABULARY, 0, 64), top_k=3)(rolled_out, told.append)
    added = ["teacher_nll", "teacher_nll_free", "topk_ids", "topk_logprobs"]
    assert table.column_names == [*rolled_out.column_names, *added]
    assert table.select(rolled_out.column_names).equals(rolled_out)
    assert [table.schema.field(name).type for name in added] == [
        pa.float32(), pa.float32(), pa.list_(pa.int32()), pa.list_(pa.float32())
    ]  # fmt: skip
    for row in table.to_pylist():
        response = row["response_ids"]
        labels = torch.tensor(response)[:, None]
        dense = alone(model, row["prompt_ids"], response)
        assert row["teacher_nll"] == pytest.approx(-float(dense.gather(1, labels).mean()), abs=1e-4)
        free = alone(model, [VOCABULARY.start_id], response)
        assert row["teacher_nll_free"] == pytest.approx(-float(free.gather(1, labels).mean()), abs=1e-4)
        best = dense[:, :SHARED].topk(3)
        assert row["topk_ids"] == best.indices.ravel().tolist()  # row-major [token, k], best first
        np.testing.assert_allclose(row["topk_logprobs"], best.values.ravel().numpy(), atol=1e-4)
    assert sum(told) == 2 * sum(map(len, table["response_ids"].to_pylist()))


def test_student_stage_equals_a_prefill(student_model, rolled_out):
    table = ScoreStudent(Prefill(student_model, VOCABULARY, 0, 64))(rolled_out)
    assert table.column_names == [*rolled_out.column_names, "student_nll", "student_nll_free"]
    for row in table.to_pylist():
        labels = torch.tensor(row["response_ids"])[:, None]
        dense = alone(student_model, row["prompt_ids"], row["response_ids"])
        assert row["student_nll"] == pytest.approx(-float(dense.gather(1, labels).mean()), abs=1e-4)
        free = alone(student_model, [VOCABULARY.start_id], row["response_ids"])
        assert row["student_nll_free"] == pytest.approx(-float(free.gather(1, labels).mean()), abs=1e-4)
        assert row["student_nll"] != pytest.approx(row["student_nll_free"], abs=1e-3)


def test_a_local_teacher_reads_and_writes(teacher_dir, student_model):
    """As its model does; what it wrote with goes when it rests, and writes again."""
    closed: list[Any] = []

    def start(config: ModelConfig) -> Any:
        engine = engine_of(student_model, VOCABULARY)  # it is to take the teacher's weights
        engine.setting = replace(engine.setting, model=config)
        engine.close = lambda: closed.append(engine)
        return engine

    setting = TeacherSetting(VOCABULARY, 0, "cpu", 64, start_engine=start)
    teacher = LocalTeacher(TeacherConfig(model=str(teacher_dir)), setting)
    contexts, responses = make_pairs(9, seed=6)
    for mine, other in zip(teacher(contexts, responses, 3), teacher.prefill(contexts, responses, 3), strict=True):
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_array_equal(a, b)
    table = pa.table({"prompt_ids": pa.array(contexts, pa.list_(pa.int32())), "source": ["a"] * 9})
    expected = engine_of(teacher.model(), VOCABULARY).answer(table, Sampling(6), 3)
    for _ in range(2):
        told: list[int] = []
        written = teacher.write(table, Sampling(6), 3, told.append)
        assert written.equals(expected.drop_columns("behavior_logprobs"))  # no snapshot of the student wrote it
        assert sum(told) == 9
        teacher.rest()
    assert len(closed) == 2
    assert {engine.setting.model.model for engine in closed} == {str(teacher_dir)}
    assert teacher.path() == teacher_dir
