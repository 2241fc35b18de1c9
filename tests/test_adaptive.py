from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from npd.config import SelectionConfig, load_config
from npd.errors import RunError, UserError
from npd.registry import RULES
from npd.selection import Bounds, Select, Summary, check_some_kept
from npd.selection.adaptive import CHANCE, ENOUGH, adaptive_bounds, bounds_by_source

ADAPTIVE = SelectionConfig(rule="adaptive")
FIXED = SelectionConfig(rule="delta_ifd")
TOKENS = 20

CONFIGS = st.builds(
    lambda lower, deeper, upper: SelectionConfig(rule="adaptive", lower=lower, adaptive_lower=lower - deeper, upper=upper),
    st.floats(-0.3, 0),
    st.floats(0, 1),
    st.floats(0.01, 2),
)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def slow_bounds(delta: Sequence[float], nats: Sequence[float], config: SelectionConfig) -> tuple[float, float]:
    pairs = [(float(d), float(n)) for d, n in zip(delta, nats, strict=True) if math.isfinite(d)]
    lower, upper = config.lower, config.upper
    if len(pairs) >= 200:
        middle = quantile([d for d, _ in pairs], 0.5)
        sigma_below = (middle - quantile([d for d, _ in pairs], 0.1)) / 1.2815515655446004
        sigma_above = (quantile([d for d, _ in pairs], 0.9) - middle) / 1.2815515655446004
        lower, upper = middle - 3 * sigma_below, middle + 3 * sigma_above
    typical = quantile([n for _, n in pairs], 0.5) if pairs else 0.0
    chance = math.log(100) / typical if typical > 0 else math.inf
    lower = min(lower, -chance, config.lower)
    upper = max(upper, config.upper / 2)
    return max(lower, config.adaptive_lower), min(upper, config.upper)


def table(delta: np.ndarray, nats: np.ndarray, sources: Sequence[str] = ("a",)) -> pa.Table:
    """A scored part whose Δ-IFD is `delta`: the prompt halves the student's loss."""
    free = np.asarray(nats, np.float32) / TOKENS
    return pa.table(
        {
            "source": [sources[i % len(sources)] for i in range(len(delta))],
            "response_ids": pa.array([[3] * TOKENS] * len(delta), pa.list_(pa.int32())),
            "student_nll": free / 2,
            "student_nll_free": free,
            "teacher_nll": (0.5 + np.asarray(delta, np.float32)) * free,
            "teacher_nll_free": free,
        }
    )


def far_from_mastery(rng: np.random.Generator, count: int) -> np.ndarray:
    """Quantiles -0.02, 0.16 and 0.47 at 5, 50 and 95%: a normal distribution of two halves."""
    z = rng.normal(size=count)
    return 0.16 + z * np.where(z < 0, 0.18, 0.31) / 1.6449


def near_mastery(rng: np.random.Generator, count: int) -> np.ndarray:
    """Six of ten responses are about as likely to the teacher as to the student."""
    return np.where(rng.random(count) < 0.6, rng.normal(0.007, 0.01, count), rng.normal(0.1, 0.12, count))


def dropped(delta: np.ndarray, nats: float, config: SelectionConfig) -> float:
    verdicts = Select(config)(table(delta, np.full(len(delta), nats)))["verdict"].to_pylist()
    return 1 - verdicts.count("proximal") / len(verdicts)


@given(st.integers(0, 2**32), st.integers(0, 600), st.floats(0.001, 1), st.floats(0, 200), CONFIGS)
def test_bounds_are_those_of_the_definition(seed, count, scale, nats, config):
    rng = np.random.default_rng(seed)
    delta = rng.normal(0.1, scale, count) + rng.exponential(scale, count)
    delta[rng.random(count) < 0.02] = rng.choice([math.nan, math.inf, -math.inf])
    free = nats * rng.random(count)
    expected = slow_bounds(delta.tolist(), free.tolist(), config)
    assert adaptive_bounds(delta, free, config) == pytest.approx(expected, abs=1e-12)


@given(
    arrays(np.float64, st.integers(0, 300), elements=st.floats(width=32)),
    st.floats(0, 1e6),
    CONFIGS,
)
def test_never_outside_its_limits(delta, nats, config):
    lower, upper = adaptive_bounds(delta, np.full(len(delta), nats), config)
    assert config.adaptive_lower <= lower <= config.lower
    assert config.upper / 2 <= upper <= config.upper


@pytest.mark.parametrize("far", [1.0, 10.0, 1e30])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.09])
def test_outliers_move_the_bounds_only_a_little(share, far):
    """With 9% of them a normal distribution's bound goes from 3 to at most 6 of its σ, however far out they are.

    The 10% point is then the 1.1% point of the others, 2.3 σ below their median instead of 1.28.
    """
    sigma, count = 0.05, 20_000
    rng = np.random.default_rng(0)
    clean = rng.normal(0.1, sigma, count)
    nats = np.full(count, 1e4)  # chance alone explains next to nothing
    config = SelectionConfig(rule="adaptive", adaptive_lower=-1e9, upper=0.45, lower=0.0)
    before = adaptive_bounds(clean, nats, config)
    assert before == pytest.approx((0.1 - 3 * sigma, 0.1 + 3 * sigma), abs=0.005)
    wild = clean.copy()
    wild[: int(share * count)] = -far
    after = adaptive_bounds(wild, nats, config)
    limit = 0.1 - (6 if share == 0.09 else 4) * sigma
    assert limit <= after.lower <= before.lower
    assert after.upper == pytest.approx(before.upper, abs=0.03)  # the median moves
    wild[: int(share * count)] = far  # and above
    after = adaptive_bounds(wild, nats, config)
    assert before.upper <= after.upper <= 0.2 - limit
    assert after.lower == pytest.approx(before.lower, abs=0.02)


@pytest.mark.parametrize(("regime", "nats", "most"), [(far_from_mastery, 60.0, 0.03), (near_mastery, 40.0, 0.05)])
def test_little_is_dropped_but_what_is_wrong(regime, nats, most):
    for seed in range(3):
        delta = regime(np.random.default_rng(seed), 4000)
        assert dropped(delta, nats, ADAPTIVE) < most
        lower, upper = adaptive_bounds(delta, np.full(len(delta), nats), ADAPTIVE)
        assert lower > -0.3  # by its own measure, not only by its limit
        anomaly = Select(ADAPTIVE)(table(np.append(delta, -0.5), np.full(len(delta) + 1, nats)))
        assert anomaly["verdict"][-1].as_py() == "degenerate"
        assert upper >= 0.4


def test_the_fixed_band_drops_what_has_been_learned():
    """Near mastery Δ is about 0, on either side of it."""
    delta = near_mastery(np.random.default_rng(0), 4000)
    assert dropped(delta, 40.0, FIXED) > 0.2
    assert dropped(far_from_mastery(np.random.default_rng(0), 4000), 60.0, FIXED) < 0.1


def test_a_source_has_its_own_bounds_from_200_samples_on():
    rng = np.random.default_rng(0)
    for others, own in ((ENOUGH, True), (ENOUGH - 1, False)):
        math_, chat = rng.normal(0.0, 0.02, 3 * ENOUGH), rng.normal(0.2, 0.08, others)
        delta, nats = np.concatenate([math_, chat]), np.full(3 * ENOUGH + others, 100.0)
        part = Select(ADAPTIVE)(table(delta, nats)).set_column(0, "source", pa.array(["m"] * len(math_) + ["c"] * others))
        bounds = bounds_by_source(part, ADAPTIVE)
        stored = part["delta_ifd"].to_numpy()
        assert bounds["m"] == pytest.approx(adaptive_bounds(stored[: len(math_)], nats[: len(math_)], ADAPTIVE), abs=1e-6)
        alone, of_all = (slice(len(math_), None), slice(None))
        expected = adaptive_bounds(stored[alone if own else of_all], nats[alone if own else of_all], ADAPTIVE)
        assert bounds["c"] == pytest.approx(expected, abs=1e-6)


def test_few_samples_are_judged_by_the_fixed_bounds_and_chance():
    delta = np.random.default_rng(0).normal(0.5, 0.01, ENOUGH - 1)
    assert adaptive_bounds(delta, np.full(len(delta), 92.1), ADAPTIVE) == pytest.approx((-0.05, 0.8), abs=1e-4)
    assert adaptive_bounds([], [], ADAPTIVE) == Bounds(ADAPTIVE.adaptive_lower, ADAPTIVE.upper)


@given(st.integers(0, 2**32), st.integers(1, 500))
def test_the_order_of_samples_does_not_matter(seed, count):
    rng = np.random.default_rng(seed)
    part = table(rng.normal(0.1, 0.2, count), rng.uniform(10, 90, count), ("a", "b", "b"))
    order = rng.permutation(count)
    verdicts = Select(ADAPTIVE)(part)["verdict"].to_numpy(zero_copy_only=False)
    shuffled = Select(ADAPTIVE)(part.take(pa.array(order)))
    assert (shuffled["verdict"].to_numpy(zero_copy_only=False) == verdicts[order]).all()


def test_verdicts_follow_from_the_stored_columns():
    """And the manifest says between which bounds its parts were judged."""
    rng = np.random.default_rng(1)
    parts = [Select(ADAPTIVE)(table(rng.normal(0.1, s, 600), rng.uniform(10, 90, 600), ("a", "b"))) for s in (0.05, 0.2)]
    summary = Summary(ADAPTIVE)
    every: dict[str, list[Bounds]] = {"a": [], "b": []}
    for part in parts:
        summary.add(part)
        for source, bounds in bounds_by_source(part, ADAPTIVE).items():
            every[source].append(bounds)
        for row in part.select(["source", "delta_ifd", "verdict"]).to_pylist():
            lower, upper = every[row["source"]][-1]
            assert row["verdict"] == (
                "degenerate" if row["delta_ifd"] < lower else "disconnect" if row["delta_ifd"] > upper else "proximal"
            )
    result = summary.result()
    assert result.rows == sum(result.verdicts.values()) == 1200
    for source, of_parts in every.items():
        assert result.sources[source].bounds == (min(b.lower for b in of_parts), max(b.upper for b in of_parts))
    every_part = [bounds for of_parts in every.values() for bounds in of_parts]
    assert result.bounds == (min(b.lower for b in every_part), max(b.upper for b in every_part))


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.0, 2.0])
def test_chance_alone_seldom_puts_the_teacher_a_hundred_times_ahead(distance):
    """For y ~ p_S the mean of p_T(y) / p_S(y) is 1, so by Markov it is 100 or more with a probability of 1% at most."""
    rng = np.random.default_rng(int(10 * distance))
    vocabulary, length, count = 8, 12, 50_000
    logits = rng.normal(size=(length, vocabulary))
    student, teacher = (
        x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, logits + distance * rng.normal(size=logits.shape))
    )
    tokens = np.argmax(student + rng.gumbel(size=(count, length, vocabulary)), axis=-1)  # y ~ p_S
    at = np.arange(length)
    ahead = (teacher[at, tokens] - student[at, tokens]).sum(-1)
    assert np.mean(ahead >= math.log(1 / CHANCE)) <= CHANCE
    if distance <= 0.5:  # the mean converges fast where the models are alike
        assert np.exp(ahead).mean() == pytest.approx(1, abs=0.15)


def test_perplexity_ratios_have_no_adaptive_bounds():
    tree = {"run_dir": "runs/x", "student": {"model": "m"}, "data": {"train": "p.jsonl"}}
    with pytest.raises(UserError, match=r"is not a valid configuration: selection: the adaptive rule's .* ifd loss_ratio"):
        load_config(tree | {"selection": {"rule": "adaptive", "ifd": "perplexity_ratio"}})


def test_all_dropped_names_the_adaptive_bounds():
    part = Select(ADAPTIVE)(table(np.array([-0.9, -0.8, 1.5]), np.full(3, 92.1)))
    summary = Summary(ADAPTIVE)
    summary.add(part)
    with pytest.raises(RunError) as caught:
        check_some_kept(summary.result(), ADAPTIVE)
    assert "2 below the adaptive lower bound (-0.050 at the lowest) (degenerate)" in str(caught.value)
    assert "1 above the adaptive upper bound (0.800 at the highest) (disconnect)" in str(caught.value)


def test_a_plan_with_small_parts_says_what_they_cost():
    rule = RULES[ADAPTIVE.rule]()
    assert f"needs {ENOUGH} responses in a part" in rule.note(ADAPTIVE, ENOUGH - 1)
    assert rule.note(ADAPTIVE, ENOUGH) is None
    assert RULES[FIXED.rule]().note(FIXED, 1) is None
