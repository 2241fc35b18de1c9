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
        (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", "1/2"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("#1/2", "0.5"),
        ("#0.5", "1/2"),
        ("#1 1/2", "1.5"),
        (r"$\boxed{-1\frac{1}{2}}$", "-1.5"),
        (r"\boxed{\text{Paris}}", "paris"),
        (r"\boxed{x = \sqrt{2}}", r"x=\sqrt{2}"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{1\,000\text{ km}}", "1000"),
        (r"\boxed{3 \times 10^{5}}", "300000"),
        (r"\boxed{90^\circ}", "90"),
        ("#\u22123", "-3"),
        ("#\u0664\u0662", "42"),
        ("#" + "9" * 100_000, "9" * 100_000),
        ("Answer: 42\nI answered your question.", "42"),
        ("#$5/hour", "5"),
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
        ("#142", "42"),
        ("#1,2", "12"),
        ("#1/2", "2"),
        ("#3/4/2020", "2020"),
        ("#\u22123", "3"),
        ("#x^2", "2"),
        ("#1-2", "-2"),
        ("#1/0", "0"),
        (r"\boxed{\frac{1}{2}}", "2"),
        (r"\boxed{\frac{x}{2}}", "2"),
        (r"\boxed{2\sqrt{3}}", "3"),
        (r"\boxed{2\pi}", "2"),
        (r"\boxed{5^{2}}", "2"),
        ("#1e999999999", "1"),
        ("#1e99999999999999999999", "1"),
        ("#1e999999999/1e999999998", "10"),
        ("#1/" + "9" * 100_000, "0"),
        ("", ""),  # where nothing is right, saying nothing is not
        ("\u200b", " "),
    ],
)
def test_wrong(response, answer):
    assert not is_correct(response, answer)


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_numbers_compare_as_numbers(said, right):
    assert is_correct(f"work 1 2 3 #{said}", str(right)) == (said == right)


@given(st.fractions(-1000, 1000, max_denominator=40), st.integers(1, 9), st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}"]))
def test_fractions_compare_by_value(right, by, form):
    top, bottom = right.numerator * by, right.denominator * by
    assert is_correct(r"\boxed{" + form.format(top, bottom) + "}", f"{right.numerator}/{right.denominator}")
    assert not is_correct(r"\boxed{" + form.format(top + 1, bottom) + "}", f"{right.numerator}/{right.denominator}")
    assert is_correct(f"#{right.numerator}", form.format(top, bottom)) == (right.denominator == 1)


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_counts_all_choices(samples):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))
