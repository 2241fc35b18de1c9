"""A teacher that turns uniform, constant or another one ends the run; one that is as it was does not, however flat it is."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_model
from fake_server import serving
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import npd
from npd.errors import RunError
from npd.scoring import Reading
from npd.scoring.health import QUESTIONS, TOKENS, Health, difference, wrong_readings
from npd.store import Store

V = 30


class Model:
    """Its distribution at a token follows from context and position; `scale` is how far it is from uniform, `noise` a
    share of that which comes anew with each question."""

    most = 0.1  # nats: bfloat16 of large logits

    def __init__(self, seed: int, scale: float, noise: float = 0.0, digits: int | None = None) -> None:
        self.seed, self.scale, self.noise, self.digits = seed, scale, noise, digits
        self.rng = np.random.default_rng(seed + 1)
        self.asked: list[int] = []

    def logits(self, context: list[int], t: int) -> np.ndarray:
        return self.scale * np.random.default_rng([self.seed, *context, t]).normal(size=V)

    def __call__(self, contexts: Any, responses: Any, top_k: int) -> list[Reading]:
        self.asked.append(sum(map(len, responses)))
        readings = []
        for context, response in zip(contexts, responses, strict=True):
            z = np.array([self.logits(list(context), t) for t in range(len(response))])
            z += min(self.noise * (z.std() + 1e-4), self.most) * self.rng.normal(size=z.shape)
            x = z - np.log(np.exp(z).sum(1, keepdims=True))
            x = x if self.digits is None else x.round(self.digits)
            best = np.argsort(-x, axis=1)[:, :top_k].astype(np.int32)
            own = x[range(len(response)), response]
            readings.append(Reading(own.astype(np.float32), best, np.take_along_axis(x, best, 1).astype(np.float32)))
        return readings


class Uniform(Model):
    def logits(self, context: list[int], t: int) -> np.ndarray:
        return np.zeros(V)


class Constant(Model):
    def logits(self, context: list[int], t: int) -> np.ndarray:
        return self.scale * np.random.default_rng(self.seed).normal(size=V)


class Repetitive(Model):
    """Hardly looks at what it reads: nearly the same everywhere, and certain."""

    def logits(self, context: list[int], t: int) -> np.ndarray:
        z = 0.01 * np.random.default_rng([self.seed, *context, t]).normal(size=V)
        z[7] += 9
        return z


def questions(seed: int, rows: int = 40) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    return (
        [rng.integers(0, V, rng.integers(1, 6)).tolist() for _ in range(rows)],
        [rng.integers(0, V, rng.integers(6, 30)).tolist() for _ in range(rows)],
    )


def score(health: Health, model: Model, seed: int, top_k: int = 5, rows: int = 40) -> None:
    """A part, as the stage does it."""
    contexts, responses = questions(seed, rows)
    health.check(model, "big", contexts, responses, model(contexts, responses, top_k))


@pytest.mark.parametrize("scale", [0.003, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("kind", [Uniform, Constant, Model])
def test_one_that_turns_is_found(scale, noise, kind):
    health, model = Health(), Model(3, scale, noise)
    for part in range(4):
        score(health, model, part)
    with pytest.raises(RunError, match="can't be trusted: asked again") as caught:
        score(health, kind(9, scale, noise), 5)
    said = str(caught.value)
    assert said.isprintable()
    assert len(re.findall(r"[\d.]+(?= nats a token|%| of all probability)", said)) == 3
    score(health, model, 6)  # mended, it goes on


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1e-6, 0.003, 0.1, 1.0, 5.0, 20.0]),
    noise=st.sampled_from([0.0, 1e-3, 0.01, 0.03]),
    digits=st.sampled_from([None, 4]),
    kind=st.sampled_from([Model, Repetitive, Uniform, Constant]),
    top_k=st.sampled_from([1, 2, 5, V]),
    rows=st.sampled_from([1, 2, 40, 70]),
)
def test_one_that_stays_is_never_suspected(seed, scale, noise, digits, kind, top_k, rows):
    """Nearly uniform, uniform, certain, rounded, with the noise of other batches."""
    health, model = Health(), kind(seed, scale, noise, digits)
    mute = kind in (Uniform, Constant) or scale <= 1e-6  # it may say nothing at all, which is seen at once
    with pytest.raises(RunError, match="says the same of everything") if mute else nullcontext():
        for part in range(4):
            score(health, model, part, top_k, rows)
        if mute:
            raise RunError("It says the same of everything, but for noise or of too little.")


@pytest.mark.parametrize("kind", [Uniform, Constant])
def test_one_that_says_the_same_of_everything_is_found_at_once(kind):
    health = Health()
    with pytest.raises(RunError, match="says the same of everything that it reads: at all of ") as caught:
        score(health, kind(9, 1.0, 0.0), 0)
    assert str(caught.value).isprintable()
    score(health, Model(3, 1.0), 1)  # mended, it goes on


def test_one_that_answers_at_random_is_found_at_once():
    health, model = Health(), Model(3, 1.0, noise=2.0)
    model.most = 2.0
    with pytest.raises(RunError, match="asked the same twice"):
        score(health, model, 0)


def test_it_costs_a_bounded_number_of_questions():
    health, model = Health(), Model(3, 1.0)
    for part in range(5):
        score(health, model, part, rows=300)
    assert all(tokens <= QUESTIONS * TOKENS for tokens in model.asked[1::2])
    assert len(model.asked) == 10


def test_the_difference_is_what_it_says():
    was = Reading(np.zeros(1, np.float32), np.array([[1, 2]], np.int32), np.log([[0.6, 0.2]]).astype(np.float32))
    now = Reading(np.zeros(1, np.float32), np.array([[2, 3]], np.int32), np.log([[0.5, 0.1]]).astype(np.float32))
    found = difference(was, now)
    expected = (0.6 * np.log(0.6 / 0.1) + 0.2 * np.log(0.5 / 0.2)) / 0.8
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert (found.same_first, found.mass, found.mass_now) == pytest.approx((0.0, 0.8, 0.6))


def test_what_it_said_in_an_earlier_process_counts():
    """As a part has it: in float16, without the tokens' own."""
    contexts, responses = questions(8)
    for scale in (0.003, 1.0, 5.0):
        model = Model(3, scale, 0.02)
        stored = [
            Reading(r.logprobs * 0, r.topk_ids, r.topk_logprobs.astype(np.float16).astype(np.float32))
            for r in model(contexts, responses, 5)
        ]
        health = Health()
        health.recall("part-00000", contexts, responses, stored, 5)
        for part in range(3):
            score(health, model, part)
        if scale > 0.1:
            with pytest.raises(RunError, match=r"asked first in part-00000.*delete the run's generations"):
                score(health, Model(9, scale), 4)
    other = Health()
    other.recall("part-00000", contexts, responses, stored, 7)  # another top-k says nothing
    assert not other.begun


def test_readings_that_no_model_gives_are_named():
    (good,) = Model(1, 1.0)([[1]], [[2, 3, 4]], 5)
    assert wrong_readings([good], [3], 5, V) is None
    sure = good._replace(topk_logprobs=np.array([[0.0] + [-np.inf] * 4] * 3, np.float32))
    assert wrong_readings([sure], [3], 5, V) is None
    for bad, words in (
        (good._replace(logprobs=good.logprobs * np.nan), "nan"),
        (good._replace(logprobs=-good.logprobs), "as a log-probability"),
        (good._replace(topk_logprobs=np.zeros((3, 5), np.float32)), "5 in sum"),
        (good._replace(topk_logprobs=np.full((3, 5), -np.inf, np.float32)), "nothing that is likely"),
        (good._replace(topk_ids=good.topk_ids * 0), "token 0 more than once"),
        (good._replace(topk_ids=good.topk_ids + V), f"of a vocabulary of {V}"),
        (good._replace(topk_ids=good.topk_ids[:2]), "shapes"),
    ):
        assert words in (wrong_readings([bad], [3], 5, V) or "")
    assert "0 readings" in (wrong_readings([], [3], 5, V) or "")


@pytest.mark.slow
def test_a_run_whose_server_is_exchanged_ends_and_goes_on_once_it_is_mended(make_tree, teacher_dir, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "other", seed=77)).eval()
    from fake_server import reply

    with serving(teacher_dir) as server:
        whole = npd.refresh(make_tree("whole", teacher={"model": "big", "server": server.url}))
        right, tree = server.model, make_tree(teacher={"model": "big", "server": server.url, "concurrency": 1})
        asked = len(server.bodies)

        def exchange(handler: Any, answer: Any) -> None:
            server.model = other
            handler.close_connection = True

        server.faults = [reply] * 14 + [exchange]
        with pytest.raises(RunError, match=r"The teacher big can't be trusted.*What it read last is not kept"):
            npd.refresh(tree)
        there = Store(tree["run_dir"]).parts(0)
        assert there
        assert len(there) < len(Store(whole.path.parent.parent).parts(0))
        with pytest.raises(RunError, match=r"what it was asked first in .*part-00000.parquet"):
            npd.refresh(tree)  # another process knows too
        server.model, server.faults = right, []
        npd.refresh(tree)
        assert len(server.bodies) > asked
    for part in range(3):
        a, b = (Store(run).read_part(0, part) for run in (whole.path.parent.parent, Path(tree["run_dir"])))
        assert a["topk_ids"] == b["topk_ids"]


def test_a_teacher_here_whose_weights_break_is_named(make_tree, teacher_dir, monkeypatch):
    from npd.scoring.prefill import Prefill

    real = Prefill.logits

    def broken(self: Any, hidden: torch.Tensor, chunk: int | None = None) -> Any:
        for rows, z in real(self, hidden, chunk):
            yield rows, z * float("nan")

    monkeypatch.setattr(Prefill, "logits", broken)
    tree = make_tree()
    with pytest.raises(RunError, match="reads what no model can: nan as a log-probability"):
        npd.refresh(tree)
    assert not Store(tree["run_dir"]).parts(0)
