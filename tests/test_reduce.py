from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.report.reduce import bucket_means, edges_for, few_digits, histogram, m4, smoothed_kl, spread

numbers = st.lists(st.floats(width=32), max_size=300)
finite = st.floats(-1e6, 1e6)


@given(numbers, st.integers(1, 20))
def test_m4_keeps_ends_and_extremes_and_is_short(values, buckets):
    y = np.array(values, float)
    index = m4(y, buckets)
    known = np.flatnonzero(np.isfinite(y))
    assert len(index) <= 4 * buckets
    assert (np.diff(index) > 0).all()
    assert set(index) <= set(known)
    if len(known):
        assert index[0] == known[0]
        assert index[-1] == known[-1]
        assert y[index].min() == y[known].min()
        assert y[index].max() == y[known].max()
    if len(known) <= 4 * buckets:
        assert (index == known).all()


@given(st.lists(finite, min_size=1, max_size=200), st.integers(1, 50))
def test_bucket_means_average_to_the_mean(values, buckets):
    x, y = bucket_means(np.arange(len(values)), values, buckets)
    sizes = [len(g) for g in np.array_split(np.arange(len(values)), min(buckets, len(values)))]
    assert len(x) == len(y) == min(buckets, len(values))
    assert np.average(y, weights=sizes) == pytest.approx(np.mean(values), rel=1e-9, abs=1e-3)
    assert (np.diff(x) > 0).all()


@given(st.lists(st.floats(), max_size=200), st.integers(1, 60), st.lists(st.floats(-5, 5), max_size=2))
def test_a_histogram_counts_every_finite_value_once(values, bins, must):
    v = np.array(values, float)
    v = v[np.abs(v) < 1e9]
    edges = edges_for(v, bins, *sorted(must))
    assert (np.diff(edges) > 0).all()
    counts, below, above = histogram(values, edges)
    assert counts.sum() + below + above == np.isfinite(values).sum()
    for value in must[:1] if len(must) < 2 else sorted(must)[:1]:
        assert np.abs(edges - value).min() <= 1e-6 * max(1, np.ptp(edges))  # no bin straddles it


@given(st.lists(st.sampled_from("abcd"), max_size=60), st.integers(0, 40))
def test_spread_takes_from_each_group_alike(groups, most):
    index = spread(groups, most)
    assert len(index) == min(most, len(groups))
    assert len(set(index.tolist())) == len(index)
    taken = {g: sum(groups[i] == g for i in index) for g in set(groups)}
    for g, n in taken.items():
        for other, m in taken.items():
            assert n >= m - 1 or n == groups.count(g), f"{g} has {n} of {groups.count(g)}, {other} has {m}"


def test_spread_takes_what_it_can_and_no_more():
    assert spread(["a"] * 100 + ["b"] * 2, 6).tolist()[-2:] == [100, 101]
    assert spread([], 5).tolist() == []


@given(st.lists(st.floats(), max_size=50))
def test_few_digits_are_json_and_near(values):
    out = json.loads(json.dumps(few_digits(values), allow_nan=False))
    for value, short in zip(values, out, strict=True):
        if math.isfinite(value) and abs(value) < 1.79e308:  # beyond, rounding may pass what a float holds
            assert short == pytest.approx(value, rel=1e-4)
        elif not math.isfinite(value):
            assert short is None


def test_the_smoothed_kl_is_the_loops():
    """Held against npd.train.loop's own accounting, two generations, a step of references alone in the first."""
    from npd.schedule import SMOOTHING
    from npd.train.loop import Position

    steps = [(0, 0.5, 100), (0, 0.1, 300), (0, math.nan, 0), (0, 0.2, 50), (1, 0.0, 10), (1, 0.4, 20)]
    at, wanted = Position(), []
    for generation, kl, tokens in steps:
        if generation != at.generation:
            at.next_generation()
        at.kl = SMOOTHING * at.kl + (kl * tokens if tokens else 0.0)
        at.kl_tokens = SMOOTHING * at.kl_tokens + tokens
        wanted.append(at.near_policy_kl)
    got = smoothed_kl([s[1] for s in steps], [s[2] for s in steps], [s[0] for s in steps], SMOOTHING)
    assert got == pytest.approx(wanted)
