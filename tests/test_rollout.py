"""What the student writes, and the log-probabilities kept with it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Held, engine_of, save_model
from transformers import GenerationConfig

from npd.config import ModelConfig, Sampling
from npd.models import Vocabulary, load_model
from npd.rollout import Request

SHARED = 20
VOCABULARY = Vocabulary(size=SHARED, stop_ids=(2,), start_id=1)
PROMPTS = [[5, 14, 6, 16], [4], [9, 9, 14, 5, 6, 14, 7, 16], [7, 14, 7, 16], [11, 12], [4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model(student_dir):
    return load_model(ModelConfig(model=str(student_dir)))


def table_of(prompts: list[list[int]]) -> pa.Table:
    ids = pa.array([f"p{i}" for i in range(len(prompts))])
    return pa.table({"prompt_id": ids, "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})


def write(model, prompts=PROMPTS, seed=0, vocabulary=VOCABULARY, batch_size=4, batching="auto", **options) -> list[dict]:
    sampling = Sampling(**{"max_new_tokens": 12} | options)
    engine = engine_of(model, vocabulary, batch_size=batch_size, batching=batching)
    return engine.answer(table_of(prompts), sampling, seed).to_pylist()


def recomputed(model, row: dict) -> np.ndarray:
    """Log-probabilities of a response, read alone."""
    prompt, response = row["prompt_ids"], row["response_ids"]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def greedy(model, prompt: list[int], tokens: int, allowed: int = SHARED) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and ids[-1:] != [2]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :allowed].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.5}, {"top_p": 0.5}, {"temperature": 0.0}]
)
def test_behavior_logprobs_are_the_models_own_at_temperature_1(model, options):
    rows = write(model, samples_per_prompt=3, **options)
    for row in rows:
        assert len(row["behavior_logprobs"]) == len(row["response_ids"])
        np.testing.assert_allclose(row["behavior_logprobs"], recomputed(model, row), atol=1e-4, rtol=0)
    assert len({len(row["response_ids"]) for row in rows}) > 1


def test_sampling_follows_the_models_distribution(model):
    """The first token's frequencies over many samples, at temperature 1 and cooled."""
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    for temperature in (1.0, 0.5):
        rows = write(model, [prompt], samples_per_prompt=4000, batch_size=4000, max_new_tokens=1, temperature=temperature)
        counts = np.bincount([row["response_ids"][0] for row in rows], minlength=SHARED)
        wanted = (logits / temperature).softmax(-1).numpy()
        deviation = np.abs(counts / 4000 - wanted)
        assert (deviation <= 4.5 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-3).all()


def test_nucleus_sampling_leaves_the_tail_out(model):
    prompt = PROMPTS[0]
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
    rows = write(model, [prompt], samples_per_prompt=800, batch_size=800, max_new_tokens=1, top_p=0.6)
    assert {row["response_ids"][0] for row in rows} == set(order[:nucleus].tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_a_loop_by_hand(model, batch_size):
    """Prompts of unequal length share left-padded batches; each is answered as if it were alone."""
    rows = write(model, temperature=0.0, batch_size=batch_size)
    assert [row["response_ids"] for row in rows] == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_the_seed_decides(model):
    assert write(model, seed=3) == write(model, seed=3)
    assert [row["response_ids"] for row in write(model, seed=3)] != [row["response_ids"] for row in write(model, seed=4)]


def test_global_random_state_is_untouched(model):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    write(model, seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_rows_keep_their_order(model, samples):
    rows = write(model, samples_per_prompt=samples)
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(len(PROMPTS)) for _ in range(samples)]
    assert [row["prompt_ids"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(samples)]
    if samples > 1:
        assert any(rows[i]["response_ids"] != rows[i + 1]["response_ids"] for i in range(0, len(rows), samples))


def test_stop_token_is_kept_and_length_stops_are_marked(model):
    rows = write(model, samples_per_prompt=20, max_new_tokens=8)
    for row in rows:
        ids = row["response_ids"]
        assert 2 not in ids[:-1]
        assert row["finish_reason"] == ("stop" if ids[-1] == 2 else "length")
        assert len(ids) == 8 or ids[-1] == 2
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_every_stop_token_stops(model):
    several = Vocabulary(size=SHARED, stop_ids=(2, 5, 9), start_id=1)
    rows = write(model, vocabulary=several, samples_per_prompt=20)
    ends = {row["response_ids"][-1] for row in rows if row["finish_reason"] == "stop"}
    assert ends == {2, 5, 9}
    assert all(not {2, 5, 9} & set(row["response_ids"][:-1]) for row in rows)


def test_a_stop_token_may_pad(model):
    """Where the padding token is the end-of-text token, as in many models."""
    engine = engine_of(model, VOCABULARY, pad_id=2, batch_size=6)
    rows = engine.answer(table_of(PROMPTS), Sampling(12, temperature=0.0)).to_pylist()
    assert [row["response_ids"] for row in rows] == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_the_models_generation_config_has_no_say_and_is_restored(model):
    plain = write(model)
    theirs = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, min_new_tokens=12, eos_token_id=2, pad_token_id=0
    )
    before, model.generation_config = model.generation_config, theirs
    try:
        assert write(model) == plain
        assert model.generation_config is theirs
        bad = table_of([[]])  # an empty prompt cannot be answered
        with pytest.raises(Exception):  # noqa: B017, PT011
            engine_of(model, VOCABULARY, batch_size=1).answer(bad, Sampling(3))
        assert model.generation_config is theirs
    finally:
        model.generation_config = before


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A student with ten rows of vocabulary that the teacher does not have, all of them likely."""
    path = save_model(tmp_path_factory.mktemp("padded") / "model", seed=6, vocabulary=30)
    return load_model(ModelConfig(model=str(path)))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_ids_beyond_the_shared_vocabulary_are_never_written(padded, temperature):
    rows = write(padded, temperature=temperature, samples_per_prompt=10)
    assert max(max(row["response_ids"]) for row in rows) < SHARED
    with torch.no_grad():
        beyond = padded(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)[SHARED:].sum()
    assert beyond > 0.05  # or the test would prove nothing
    for row in rows[:20]:
        np.testing.assert_allclose(row["behavior_logprobs"], recomputed(padded, row), atol=1e-4, rtol=0)
    if temperature == 0:
        assert [row["response_ids"] for row in rows[::10]] == [greedy(padded, prompt, 12) for prompt in PROMPTS]


def test_progress_counts_responses(model):
    told: list[int] = []
    engine_of(model, VOCABULARY).answer(table_of(PROMPTS), Sampling(3, samples_per_prompt=2), 0, told.append)
    assert sum(told) == 12
    assert min(told) > 0


def test_a_stream_answers_each_request_by_its_number(model):
    """Each as if it were alone; progress says how many responses of which request are finished."""
    requests = [Request(7, table_of(PROMPTS), 1), Request(3, table_of(PROMPTS[:2]), 2)]
    told: list[tuple[int, int]] = []
    sampling = Sampling(12, samples_per_prompt=2)
    stream = engine_of(model, VOCABULARY).stream(iter(requests), sampling, lambda *said: told.append(said))
    answered = [(number, table.to_pylist()) for number, table in stream]
    alone = [
        (number, write(model, table["prompt_ids"].to_pylist(), seed, samples_per_prompt=2))
        for number, table, seed in requests
    ]
    assert answered == alone
    assert told == sorted(told, key=lambda said: (-said[0], said[1]))
    assert (7, 12) in told
    assert told[-1] == (3, 4)


def test_other_weights_can_be_taken(model, padded):
    engine = engine_of(model, VOCABULARY)
    answers = []
    for weights in (model, padded, model):
        engine.take(Held(weights))
        answers.append(engine.answer(table_of(PROMPTS), Sampling(12, temperature=0.0)).to_pylist())
        engine.rest()
        assert engine.model is None  # whoever shares the device has the memory
    assert answers[0] == answers[2] == write(model, temperature=0.0)
    assert answers[1] == write(padded, temperature=0.0) != answers[0]
