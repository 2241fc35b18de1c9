"""Guard rails: each warns of what it is for, by the rule that is stated, and of nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bench import Bench
from hypothesis import given
from hypothesis import strategies as st

import npd
from npd.config import Config, load_config
from npd.demo import demo
from npd.generations import guards
from npd.generations.guards import FOREIGN, LEAST_MASS, look_at, measured, notes
from npd.observe.events import SpanName, read_events
from npd.report.facts import gather
from npd.report.verified import warnings
from npd.store import REFERENCE

V, K = 12, 4


def part_read(rng: np.random.Generator, responses: int, length: int, *, written: bool, sharp: float = 1.0) -> pa.Table:
    """A part read by a teacher with random distributions; its responses are drawn from these (`written`), or evenly."""
    logits = rng.normal(size=(responses, length, V)) * sharp
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = (logp + rng.gumbel(size=logp.shape)).argmax(-1) if written else rng.integers(0, V, logp.shape[:2])
    nll = -np.take_along_axis(logp, chosen[..., None], -1)[..., 0].mean(1)
    best = -np.sort(-logp, -1)[..., :K]
    return pa.table(
        {
            "source": [""] * responses,
            "response_ids": pa.array(chosen.tolist(), pa.list_(pa.int32())),
            "teacher_nll": pa.array(nll, pa.float32()),
            "topk_logprobs": pa.array(best.reshape(responses, -1).tolist(), pa.list_(pa.float32())),
        }
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_what_is_measured(seed, responses, length, written):
    table = part_read(np.random.default_rng(seed), responses, length, written=written)
    found = measured(table, V)
    assert found is not None
    surprise = masses = entropy = 0.0
    for row in table.to_pylist():
        surprise += row["teacher_nll"] * length
        for t in range(length):
            p = [math.exp(x) for x in row["topk_logprobs"][t * K : (t + 1) * K]]
            rest = 1 - sum(p)
            masses += sum(p)
            entropy += -sum(x * math.log(x) for x in p) - rest * math.log(rest / (V - K))
    n = responses * length
    assert found == pytest.approx((n, surprise / n, entropy / n, masses / n), rel=1e-4)


def test_the_bound_on_the_entropy_is_one():
    """What the teacher wrote itself costs no more, whatever its distributions."""
    rng = np.random.default_rng(0)
    for sharp in (0.3, 1.0, 3.0):
        found = measured(part_read(rng, 400, 20, written=True, sharp=sharp), V)
        assert found is not None
        assert found.surprise < found.entropy + 0.03
        foreign = measured(part_read(rng, 400, 20, written=False, sharp=sharp), V)
        assert foreign is not None
        assert (foreign.surprise > foreign.entropy + FOREIGN) is (sharp >= 1)


def looked_at(folder: Path, table: pa.Table, generation: int, **sections: object) -> tuple[list[str], str]:
    """What is warned of, on record and on the terminal, when it is looked at twice."""
    bench = Bench(folder, **({"scoring": {"top_k": K}} | sections))
    bench.store.vocabulary_size = V
    bench.store.read_part = lambda *_: table
    for _ in range(2):
        look_at(generation, bench.config, bench.store, bench.events, bench.display)
    events = read_events(bench.events.path, SpanName.WARNING)
    return [str(event.facts["about"]) for event in events], bench.said.getvalue()


def test_references_of_another_author(tmp_path):
    rng = np.random.default_rng(1)
    theirs = part_read(rng, 60, 20, written=False, sharp=3.0)
    about, said = looked_at(tmp_path / "a", theirs, REFERENCE)
    assert about == ["references"] * 2
    assert said.count("the references seem not to be the teacher's") == 1
    assert looked_at(tmp_path / "b", part_read(rng, 60, 20, written=True, sharp=3.0), REFERENCE) == ([], "")
    assert looked_at(tmp_path / "c", theirs, REFERENCE, data={"references": "teacher"}) == ([], "")
    assert looked_at(tmp_path / "d", theirs, 0) == ([], "")
    assert looked_at(tmp_path / "e", theirs.slice(0, 5), REFERENCE) == ([], "")  # too few tokens to say so


def test_a_top_k_that_holds_little(tmp_path):
    flat = part_read(np.random.default_rng(2), 60, 20, written=True, sharp=0.3)
    found = measured(flat, V)
    assert found is not None
    assert found.mass < LEAST_MASS
    about, said = looked_at(tmp_path / "a", flat, 0)
    assert about == ["top-k mass"] * 2
    assert "Raise scoring.top_k (now 4), or set loss.top_k_mass: tail" in said
    assert looked_at(tmp_path / "b", flat, 0, loss={"top_k_mass": "tail"}) == ([], "")
    assert looked_at(tmp_path / "c", flat, 0, loss={"divergence": "reverse_kl"}) == ([], "")  # which is told at the start
    sharp = part_read(np.random.default_rng(2), 60, 20, written=True, sharp=6.0)
    assert looked_at(tmp_path / "d", sharp, 0) == ([], "")


@pytest.mark.parametrize("sharp", [0.3, 6.0])
def test_positions_that_an_alignment_leaves_empty_are_no_lack_of_mass(sharp):
    whole = part_read(np.random.default_rng(2), 60, 20, written=True, sharp=sharp)
    rows = np.array(whole["topk_logprobs"].to_pylist()).reshape(60, 20, K)
    rows[:, 1::2] = -np.inf
    rows[:, 1::4, 0] = -3.0  # the label's own probability
    holed = whole.set_column(3, "topk_logprobs", pa.array(rows.reshape(60, -1).tolist(), pa.list_(pa.float32())))
    found = measured(holed, V, aligned=True)
    assert found is not None
    p = np.exp(np.array(whole["topk_logprobs"].to_pylist())).reshape(60, 20, K)[:, ::2].sum(-1)
    assert found.mass == pytest.approx(p.mean(), rel=1e-5)
    assert (found.mass < LEAST_MASS) == (sharp < 1)


def config_of(**sections: object) -> Config:
    tree = {"run_dir": "r", "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    return load_config(tree | sections)


@pytest.mark.parametrize(
    ("divergence", "schedule", "told"),
    [
        ("reverse_kl", {}, "6 passes"),
        ("jensen_shannon", {"passes": 3, "lead": 0}, "3 passes"),
        ("reverse_kl", {"passes": 1, "lead": 1}, None),
        ("reverse_kl", {"kl_budget": 0.1}, None),
        ("reverse_kl", {"passes": 2, "lead": 1, "generations": 1}, None),
        ("forward_kl", {}, None),
        ("skewed_forward_kl", {}, None),
    ],
)
def test_divergences_and_stale_responses(divergence, schedule, told):
    said = notes(config_of(loss={"divergence": divergence}, schedule=schedule))
    assert len(said) == (told is not None)
    assert told is None or told in said[0]


@pytest.mark.parametrize(
    ("command", "references", "teacher", "told"),
    [("sft", "teacher", "u", 1), ("sft", "teacher", "t", 0), ("sft", "given", None, 0), ("distill", "teacher", "u", 0)],
)
def test_a_warm_up_by_another_teacher(tmp_path, command, references, teacher, told):
    run = tmp_path / "warm-up"
    bench = config_of(run_dir=str(run), data={"train": "d", "references": references})
    assert bench.teacher is not None
    told_by = None if teacher is None else bench.teacher.model_copy(update={"model": teacher})
    bench = bench.model_copy(update={"teacher": told_by})
    npd.store.Store(run).open(bench, command)
    said = notes(config_of(student={"model": str(run / "student")}))
    assert len(said) == told
    assert not told or "on what u wrote" in said[0]


def test_the_demo_is_not_warned(tmp_path):
    assert notes(demo._config(tmp_path, "npd", 0, {})) == []


def test_a_warning_stands_in_the_report(make_tree):
    """The tests' models are so flat that their top-k hold little."""
    result = npd.distill(
        make_tree(
            scoring={"top_k": 1},
            schedule={"generations": 2, "passes": 1},
            rollout={"max_new_tokens": 40, "part_size": 100, "samples_per_prompt": 4},
            packing={"length": 128},
        )
    )
    said = warnings(gather(result.run_dir))
    assert [("generation 0" in line, "generation 1" in line) for line in said] == [(True, False), (False, True)]
    assert guards.LEAST_MASS == 0.9
    assert "bound: 90%" in said[0]
