from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.config import ScheduleConfig, TrainingConfig
from npd.schedule import derive_seed, learning_rate, parts_of_generation, prompts_of_generation


def test_seeds_differ_by_purpose_and_fit_every_generator():
    paths = [("rollout", 0, 1, 2), ("rollout", 0, 2, 1), ("pass", 0, 1, 2), ("task", "answer"), ("task", "reswan")]
    seeds = {derive_seed(seed, *path) for seed in (0, 1) for path in paths}
    assert len(seeds) == 2 * len(paths)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@given(count=st.integers(1, 40), window=st.integers(1, 60), part_size=st.integers(1, 20), seed=st.integers(0, 3))
def test_windows_take_every_prompt_once_a_lap(count, window, part_size, seed):
    schedule = ScheduleConfig(prompts=window)
    laps = 3
    generations = -(-count * laps // window)
    parts = parts_of_generation(window, part_size)
    taken = [i for g in range(generations) for p in parts for i in prompts_of_generation(count, g, schedule, seed, p)]
    for lap in range(laps):
        assert sorted(taken[lap * count : (lap + 1) * count]) == list(range(count))


def test_all_prompts_are_answered_in_an_order_that_is_no_files():
    orders = [prompts_of_generation(50, g, ScheduleConfig(), seed, slice(None)) for g, seed in ((0, 0), (1, 0), (0, 1))]
    for order in orders:
        assert sorted(order) == list(range(50))
    different = {tuple(order) for order in [*orders, np.arange(50)]}
    assert len(different) == 4


@given(size=st.integers(1, 5000), part_size=st.integers(1, 1200))
def test_parts_are_as_few_and_as_equal_as_can_be(size, part_size):
    parts = parts_of_generation(size, part_size)
    assert [i for part in parts for i in range(size)[part]] == list(range(size))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= part_size
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-size // part_size)


def test_learning_rate_rises_and_falls_to_its_ends():
    config = TrainingConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_ratio=0.1)
    assert learning_rate(0.05, config) == pytest.approx(0.5)
    assert learning_rate(0.1, config) == pytest.approx(1.0)
    assert learning_rate(0.55, config) == pytest.approx(0.55)  # half-way down the cosine
    assert learning_rate(1.0, config) == pytest.approx(0.1)
    rates = [learning_rate(0.1 + 0.9 * i / 50, config) for i in range(51)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0.0, TrainingConfig(learning_rate=1.0, warmup_ratio=0.0)) == pytest.approx(1.0)
