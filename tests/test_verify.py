from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.verifiers import extract_answer, is_correct, pass_at_k


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("47+8=55;55*3=65;#65", "65"),
        ("#1 then #2", "2"),
        ("#### 1,234\n", "1,234"),
        ("so <answer> 12 </answer> and more", "12"),
        ("<answer>1</answer> no: <answer>2\n3</answer>", "2\n3"),
        (r"thus \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{-7}", "-7"),
        ("# 5 but <answer>6</answer>", "6"),  # tags are the clearest mark
        ("The answer is 9.", "9."),
        ("Answer: Paris", "Paris"),
        ("**Final Answer: 3**", "3"),
        ("one\n\ntwo\n", "two"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("55*3=65;#65", "65"),
        ("#065", "65"),
        ("#65.0", "65"),
        ("The total is $1,234.", "1234"),
        ("#1234", "1,234"),
        ("#-3", "-3"),
        ("#.5", "0.5"),
        ("#1e3", "1000"),
        ("it is 12 apples", "12"),
        ("first 3\nthen 4", "4"),
        ("Answer: paris.", "Paris"),
        ("<answer> New   York </answer>", "new york"),
        ("#infinity", "infinity"),
        ("#NaN", "nan"),
        ("#inf", "Inf"),
    ],
)
def test_right(response, answer):
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#66", "65"),
        ("#651", "65"),
        ("65;#6", "65"),  # the right number, but not as the answer
        ("#3", "-3"),
        ("", "65"),
        ("#", "0"),
        ("none", "65"),
        ("London", "Paris"),
        ("Paris or London", "Paris"),
        ("#", "infinity"),
    ],
)
def test_wrong(response, answer):
    assert not is_correct(response, answer)


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_numbers_compare_as_numbers(said, right):
    assert is_correct(f"work 1 2 3 #{said}", str(right)) == (said == right)


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_counts_all_choices(samples):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))
