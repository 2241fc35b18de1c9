"""Continuous batching: the same responses as reading each sequence alone, whatever is written beside them."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import engine_of
from families import FAMILIES, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout import PROMPTS, SHARED, VOCABULARY, recomputed, table_of, write
from torch import Tensor

from npd.config import ModelConfig, Sampling
from npd.errors import RunError, UserError
from npd.models import Vocabulary, continuing, expected_continuing, load_model, prove_layout
from npd.models import slots as slots_module
from npd.rollout.continuous import Sampler

ALWAYS = {"llama", "gemma2", "gemma3_text", "gpt_oss", "mistral", "mixtral", "gpt2", "qwen3_vl", "deepseek_v3", "bloom"}
"""One of each way to differ in what a cache holds or a mask says; the others are marked."""


@pytest.fixture(scope="module")
def model(student_dir):
    return load_model(ModelConfig(model=str(student_dir)))


def responses(rows: list[dict]) -> list[list[int]]:
    return [row["response_ids"] for row in rows]


def test_the_model_of_these_tests_is_written_with_continuously(model):
    assert continuing(model).why_not is None
    write(model, batching="continuous")


ids = st.integers(3, SHARED - 1)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(ids, min_size=1, max_size=30), min_size=1, max_size=9),
    stops=st.sets(ids, max_size=4),
    samples=st.integers(1, 3),
    batch=st.integers(1, 7),
    tokens=st.integers(1, 40),
)
def test_greedy_is_generate_token_for_token(model, prompts, stops, samples, batch, tokens):
    vocabulary = Vocabulary(size=SHARED, stop_ids=(2, *sorted(stops)), start_id=1)
    table = table_of(prompts)
    sampling = Sampling(tokens, temperature=0.0, samples_per_prompt=samples)
    ours, theirs = (
        engine_of(model, vocabulary, batch_size=batch, batching=batching).answer(table, sampling).to_pylist()
        for batching in ("continuous", "static")
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if k != "behavior_logprobs"} == {
            k: v for k, v in other.items() if k != "behavior_logprobs"
        }
        np.testing.assert_allclose(mine["behavior_logprobs"], other["behavior_logprobs"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.8}, {"temperature": 2.0}])
def test_a_response_does_not_depend_on_what_is_written_beside_it(model, options):
    """Neither on the batch size, nor on the other prompts behind it; its log-probabilities are those of reading it alone."""
    options |= {"samples_per_prompt": 5, "max_new_tokens": 40}
    rows = write(model, batch_size=64, **options)
    for batch_size in (1, 3, 7):
        assert responses(write(model, batch_size=batch_size, **options)) == responses(rows)
    assert responses(write(model, PROMPTS[:2], **options)) == responses(rows)[:10]
    for row in rows:
        np.testing.assert_allclose(row["behavior_logprobs"], recomputed(model, row), atol=1e-5, rtol=0)
    assert len({len(row["response_ids"]) for row in rows}) > 5  # slots were filled anew


def test_the_same_seed_gives_the_same_bits(model):
    options = {"samples_per_prompt": 7, "max_new_tokens": 40, "batch_size": 5}
    assert write(model, seed=3, **options) == write(model, seed=3, **options)
    assert responses(write(model, seed=3, **options)) != responses(write(model, seed=4, **options))


def warped(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution that is sampled from, [N, V] float64: the likeliest tokens whose share first reaches top_p."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(-1, descending=True)
    ranked = p.gather(-1, order)
    kept = ranked * (ranked.cumsum(-1) - ranked < top_p)
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.7)])
def test_two_tokens_are_distributed_as_the_model_says(model, temperature, top_p):
    """Chi-square of all pairs that are likely enough, against their probabilities in float64; slots are refilled often."""
    count, prompt = 6000, PROMPTS[0]
    vocabulary = Vocabulary(size=SHARED, stop_ids=(), start_id=1)
    options = {"max_new_tokens": 2, "temperature": temperature, "top_p": top_p, "samples_per_prompt": count}
    rows = write(model, [prompt], seed=1, vocabulary=vocabulary, batch_size=1500, **options)
    with torch.no_grad():
        both = torch.tensor([[*prompt, first] for first in range(SHARED)])
        logits = model(both).logits
    first = warped(logits[:1, -2], temperature, top_p)[0]
    pairs = (first[:, None] * warped(logits[:, -1], temperature, top_p)).flatten().numpy()
    seen = Counter(a * SHARED + b for a, b in responses(rows))
    assert all(pairs[pair] > 0 for pair in seen)
    likely = pairs * count >= 5
    observed = np.array([seen[pair] for pair in range(len(pairs))])
    expected = np.append(pairs[likely], pairs[~likely].sum()) * count
    observed = np.append(observed[likely], observed[~likely].sum())
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
    freedom = len(expected) - 1
    assert freedom > 5
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom), (statistic, freedom)


def test_a_token_without_probability_is_never_chosen():
    """Not even by the greatest random number, nor in a padded vocabulary whose rows beyond are the likeliest."""
    sampler = Sampler(Sampling(4), 5, seed=0)
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, -torch.inf, 50.0]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    tokens, logprobs = sampler(logits, uniform)
    assert tokens.tolist() == [0, 2, 2]
    np.testing.assert_allclose(logprobs, [-50.0, -49.0, -49.0], atol=1e-5)


class Stopped(Exception):
    pass


def test_an_end_in_the_middle_leaves_nothing_behind(model):
    engine = engine_of(model, VOCABULARY, batch_size=3)
    before = engine.answer(table_of(PROMPTS), Sampling(20)).to_pylist()
    threads, options, attention = threading.active_count(), model.generation_config, model.config._attn_implementation

    def stop(finished: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        engine.answer(table_of(PROMPTS), Sampling(20), 0, stop)
    assert threading.active_count() == threads
    assert model.generation_config is options
    assert model.config._attn_implementation == attention
    assert not any(isinstance(value, slots_module._Cache) for module in model.modules() for value in vars(module).values())
    assert engine.answer(table_of(PROMPTS), Sampling(20)).to_pylist() == before


def test_weights_that_compute_nonsense_are_told(model, student_dir):
    broken = load_model(ModelConfig(model=str(student_dir)))
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        write(broken)


def test_a_prompt_is_read_once_for_all_of_its_samples(model):
    read: list[int] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[0]) if kwargs["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    try:
        write(model, [[5, 6, 7], [9, 8, 7]], samples_per_prompt=8, batch_size=16)
    finally:
        hook.remove()
    assert read == [2]


def test_what_cannot_be_proved_is_written_by_generate_and_said(model, monkeypatch):
    found = slots_module.Continuing("it is of another kind")
    monkeypatch.setattr("npd.rollout.transformers.continuing", lambda model: found)
    said: list[str] = []
    engine = engine_of(model, VOCABULARY)
    object.__setattr__(engine.setting, "say", said.append)
    for _ in range(2):
        rows = engine.answer(table_of(PROMPTS), Sampling(12), 3).to_pylist()
    assert rows == write(model, seed=3, batching="static")
    assert len(said) == 1
    assert "another kind" in said[0]
    with pytest.raises(UserError, match="another kind"):
        write(model, batching="continuous")


def test_a_window_longer_than_what_was_tried_is_passed_by_generate(model, monkeypatch):
    found = slots_module.Continuing(None, (), 20)
    monkeypatch.setattr("npd.rollout.transformers.continuing", lambda model: found)
    assert write(model, max_new_tokens=12) == write(model, max_new_tokens=12, batching="continuous")
    with pytest.raises(UserError, match="window of 20"):
        write(model, max_new_tokens=13, batching="continuous")


@pytest.mark.parametrize(
    "family", [family if family in ALWAYS else pytest.param(family, marks=pytest.mark.families) for family in FAMILIES]
)
def test_families_go_on_as_generate_does_or_are_refused(family):
    """Where it is proved, prompts whose lengths differ are answered beside each other as each alone."""
    model = model_of(family)
    prove_layout(model, family)
    way = continuing(model)
    expected = expected_continuing(model.config)
    assert (way.why_not is None) == (expected is None), (way, expected)
    if way.why_not is not None:
        return
    vocabulary = Vocabulary(size=20, stop_ids=(2,), start_id=1)
    prompts = [[*range(4, 20)], [5], [7, 9, 11], [6, 6, 8, 14, 15, 19, 3, 4]]
    table, sampling = table_of(prompts), Sampling(9, temperature=0.0)
    rows = engine_of(model, vocabulary, batch_size=2, batching="continuous").answer(table, sampling).to_pylist()
    for row in rows:
        np.testing.assert_allclose(row["behavior_logprobs"], recomputed(model, row), atol=1e-3, rtol=0)
