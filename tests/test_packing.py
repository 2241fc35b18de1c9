from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd import packing
from npd.packing import pack, pack_tokens, short_rows


@st.composite
def problems(draw, most=60):
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=most)), capacity


@st.composite
def repeated(draw):
    """Many samples of few lengths."""
    capacity = draw(st.integers(1, 40))
    few = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=4))
    return draw(st.lists(st.sampled_from(few), max_size=120)), capacity


def naive_best_fit_decreasing(lengths, capacity):
    """By looking at all rows for each sample; of rows with one free space the last to come to it is filled first."""
    rows: list[list[int]] = []
    free: list[int] = []
    touched: list[int] = []
    for n, index in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [r for r in range(len(rows)) if free[r] >= lengths[index]]
        if not fitting:
            rows.append([])
            free.append(capacity)
            touched.append(n)
        row = min(fitting, key=lambda r: (free[r], -touched[r])) if fitting else len(rows) - 1
        rows[row].append(index)
        free[row], touched[row] = free[row] - lengths[index], n
    return rows


@given(problems())
def test_every_index_once_within_capacity(problem):
    lengths, capacity = problem
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


@settings(max_examples=300)
@given(st.one_of(problems(), repeated()))
def test_is_best_fit_decreasing(problem):
    """The very rows, not only their fill: a run that is resumed must lay out its samples as it would have."""
    lengths, capacity = problem
    assert pack(lengths, capacity) == naive_best_fit_decreasing(lengths, capacity)


@given(problems())
def test_is_a_function_of_the_lengths(problem):
    lengths, capacity = problem
    array: Any = np.array(lengths, np.int32)
    assert pack(lengths, capacity) == pack(tuple(lengths), capacity) == pack(array, capacity)


@given(problems(), st.integers(1, 5), st.data())
def test_a_length_over_the_capacity_is_refused(problem, extra, data):
    lengths, capacity = problem
    index = data.draw(st.integers(0, len(lengths)))
    lengths.insert(index, capacity + extra)
    with pytest.raises(ValueError, match=f"sample {index} has a length of {capacity + extra} tokens.*capacity of {capacity}"):
        pack(lengths, capacity)


@given(problems(), st.integers(-3, 0), st.data())
def test_a_length_below_one_is_refused(problem, length, data):
    lengths, capacity = problem
    index = data.draw(st.integers(0, len(lengths)))
    lengths.insert(index, length)
    with pytest.raises(ValueError, match=f"sample {index} has a length of {length} tokens, which is not positive"):
        pack(lengths, capacity)


def test_nothing_to_pack():
    assert pack([], 8) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([3], 3, [[0]]),
        ([2, 2], 3, [[0], [1]]),
        ([1, 5, 2, 4], 6, [[1, 0], [3, 2]]),
        # 6 and 5 stand in rows of 10; the 4 goes where it fits exactly, though the other row is as good for first-fit.
        ([5, 6, 4], 10, [[1, 2], [0]]),
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
    ],
)
def test_known_packings(lengths, capacity, rows):
    assert pack(lengths, capacity) == rows


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_fill_of_ten_thousand_lognormal_lengths(seed, sigma):
    capacity, count = 32768, 10_000
    mean = capacity / 16
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    lengths = np.clip(drawn.round(), 1, capacity).astype(int)
    assert lengths.mean() == pytest.approx(mean, rel=0.05)
    rows = pack(lengths.tolist(), capacity)
    assert lengths.sum() / (len(rows) * capacity) >= 0.99
    assert max(lengths[row].sum() for row in rows) <= capacity


@st.composite
def samples(draw):
    length = draw(st.integers(2, 24))
    count = draw(st.integers(1, 8))
    contexts, responses = [], []
    for _ in range(count):
        size = draw(st.integers(1, length - 1))
        contexts.append(draw(st.lists(st.integers(1, 50), min_size=size, max_size=size)))
        responses.append(draw(st.lists(st.integers(51, 99), min_size=1, max_size=length - size)))
    return contexts, responses, length


@settings(max_examples=150)
@given(samples())
def test_packed_tokens(drawn):
    contexts, responses, length = drawn
    rows = pack([len(c) + len(r) for c, r in zip(contexts, responses, strict=True)], length)
    packed = pack_tokens(contexts, responses, rows, length, pad_id=0)

    assert packed.samples == [i for row in rows for i in row]
    assert packed.labels.tolist() == [token for i in packed.samples for token in responses[i]]
    assert packed.input_ids.dtype == packed.labels.dtype == packed.predictors.dtype == torch.int64

    # Behind a predictor stands its label, in the same sample: the causal shift, without which nothing is learned.
    flat_ids, flat_positions = packed.input_ids.flatten(), packed.position_ids.flatten()
    assert torch.equal(flat_ids[packed.predictors + 1], packed.labels)
    assert torch.equal(flat_positions[packed.predictors + 1], flat_positions[packed.predictors] + 1)
    firsts = np.cumsum([0] + [len(responses[i]) for i in packed.samples[:-1]])
    assert flat_ids[packed.predictors[firsts]].tolist() == [contexts[i][-1] for i in packed.samples]

    for r, row in enumerate(rows):
        expected_ids: list[int] = []
        expected_positions: list[int] = []
        for i in row:
            expected_ids += [*contexts[i], *responses[i]]
            expected_positions += range(len(contexts[i]) + len(responses[i]))
        padding = length - len(expected_ids)
        assert packed.input_ids[r].tolist() == expected_ids + [0] * padding
        assert packed.position_ids[r].tolist() == expected_positions + list(range(padding))


def test_context_of_one_token():
    packed = pack_tokens([[7], [8]], [[51, 52], [53]], [[0, 1]], 6, pad_id=0)
    assert packed.input_ids.tolist() == [[7, 51, 52, 8, 53, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.predictors.tolist() == [0, 1, 3]
    assert packed.labels.tolist() == [51, 52, 53]
    assert packed.samples == [0, 1]


def test_predictors_index_across_rows():
    packed = pack_tokens([[7, 7], [8]], [[51], [52, 53]], [[0], [1]], 3, pad_id=0)
    assert packed.predictors.tolist() == [1, 3, 4]
    assert packed.labels.tolist() == [51, 52, 53]


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 300))
def test_short_rows_are_the_first_rows_of_what_is_left(lengths, tokens):
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for rows, length in short_rows(lengths, tokens):
        packed = naive_best_fit_decreasing([lengths[i] for i in left], length)[: max(1, tokens // length)]
        assert rows == [[left[i] for i in row] for row in packed]
        left = [i for i in left if not any(i in row for row in rows)]
    assert not left


def test_short_rows_of_very_many_samples(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 50, 1000).tolist()
    monkeypatch.setattr(packing, "WINDOW", 300)
    expected = []
    for start in range(0, 1000, 300):
        window = short_rows(lengths[start : start + 300], 200)
        expected += [([[start + i for i in row] for row in rows], length) for rows, length in window]
    assert list(short_rows(lengths, 200)) == expected
    assert sorted(i for rows, _ in expected for row in rows for i in row) == list(range(1000))


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 300))
def test_short_rows_hold_every_sample_once_within_the_budget(lengths, tokens):
    seen: list[int] = []
    for rows, length in short_rows(lengths, tokens):
        ids = [i for row in rows for i in row]
        seen += ids
        assert length == max(lengths[i] for i in ids)
        assert all(0 < sum(lengths[i] for i in row) <= length for row in rows)
        assert len(rows) * length <= tokens or len(rows) == 1
        left = [lengths[i] for i in range(len(lengths)) if i not in seen]
        assert not left or (len(rows) + 1) * length > tokens  # there was no room for another row
        assert max(left, default=0) <= length
    assert sorted(seen) == list(range(len(lengths)))
