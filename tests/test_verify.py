from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
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
        ("**Answer: Paris** because of 3*4.", "Paris"),
        ("The answer is 3*4", "3*4"),
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
        ("Answer: 2*5", "2"),
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


# -- answers of many kinds: (right answer, ways to say it, wrong ones that look like it)

MARKS = st.sampled_from(
    ["#{}", "#### {}", "<answer>{}</answer>", r"so \boxed{{{}}}.", "The answer is {}.", "**Answer:** {}", "{}"]
)


def kinds(n: int, m: int) -> dict[str, tuple[str, list[str], list[str]]]:
    """For whole numbers 1 < n < m without a common one: what is the same, and what is not."""
    a, b = str(n), str(m)
    big, spaced = 10_000 + n, f"{10 + n // 1000} {n % 1000:03d}"
    formula = [
        f"H{a}O",
        f"CO{a}",
        f"x{a}",
        f"x_{a}",
        f"GPT-{a}",
        f"v1.{a}",
        f"{a}x",
        f"{a}i",
        f"{a}k",
        f"{a}rd",
        f"{b}.{b}.{a}",
    ]
    within = [
        f"x+{a}",
        f"{b}-{a}",
        f"{b}*{a}",
        f"{b} × {a}",
        rf"\sqrt{{{a}}}",
        f"√{a}",
        f"{a}π",
        f"{a}!",
        f"{a}²",
        f"{b}^{a}",
        f"{a}^{b}",
    ]
    within += [
        f"f({a})",
        f"log {a}",
        f"({a}, x)",
        f"x or {a}",
        f"(x+1) {a}",
        f"(x, {a})",
        f"|{a}|",
        f"{b} mod {a}",
        f"{b} % {a}",
        f"{a}/x",
        f"{b}/{a}",
    ]
    several = [
        f"{b} or {a}",
        f"{b} and {a}",
        f"{b}, {a}",
        f"{b}; {a}",
        f"({b}, {a})",
        f"[{b},{a}]",
        rf"\{{{b},{a}\}}",
        f"{b}-{a}",
    ]
    several += [
        f"{b}–{a}",
        f"{b} to {a}",
        f"{b}:{a}",
        rf"{b} \pm {a}",
        f"x = {b} or x = {a}",
        f"x={b}, y={a}",
        f"{b} feet {a} inches",
    ]
    bounds = [
        f"< {a}",
        f"≥ {a}",
        rf"x \le {a}",
        rf"x \neq {a}",
        f"not {a}",
        f"at least {a}",
        f"between {b} and {a}",
        f"{a} or more",
    ]
    scaled = [
        f"{a} million",
        f"{a} dozen",
        f"-{a}",
        f"−{a}",
        f"{a}e5",
        f"0.{a}",
        f"1/{a}",
        f"0x{a}",
        f"2024-10-{a}",
        f"Jan {a}, 2024",
    ]
    said = [
        f"x = {a}",
        f"+{a}",
        f"{a}.0",
        f"{a} apples",
        f"{a} cm",
        rf"{a}\text{{ cm}}^2",
        f"${a}",
        f"€{a}",
        f"{a} €",
        rf"{a}^\circ",
        f"{a}°",
    ]
    said += [
        f"{a}%",
        f"{a} percent",
        f"**{a}**",
        f"{m - n} + {2 * n - m} = {a}",
        f"{a} km/h",
        f"({a})",
        f"${a}$",
        f"{a} ({a} in words)"[: len(a)],
    ]
    numbers = [
        f"{big:,}",
        spaced,
        spaced.replace(" ", "\u202f"),
        spaced.replace(" ", r"\,"),
        spaced.replace(" ", "'"),
        f"{big}.00",
    ]
    return {
        "number": (a, said, formula + within + several + bounds + scaled),
        "thousands": (
            str(big),
            numbers,
            [f"{spaced}0", spaced[:-1], f"{spaced} or 3", spaced.replace(" ", "."), spaced.replace(" ", "  3 ")],
        ),
        "a part of thousands": (spaced[-3:], [str(n % 1000)], [spaced, f"{big:,}"]),
        "negative": (
            f"-{a}",
            [f"\u2212{a}", f"-{a}.0", f"x = -{a}", rf"-{a}\%"],
            [a, f"{b}-{a}", f"{b} - {a}", f"x-{a}", f"±{a}"],
        ),
        "fraction": (
            f"{a}/{b}",
            [rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * n}}}{{{2 * m}}}", f"{a} / {b}", f"x = {a}/{b}"],
            [f"{b}/{a}", f"-{a}/{b}", a, b, f"{a}:{b}", f"{a}/{b}/7", f"{n / m:.3f}1", f"{a}/{b}x"],
        ),
        "mixed": (
            rf"{a}\frac{{1}}{{2}}",
            [f"{a} 1/2", f"{a}.5", f"{a}½", f"{a} ½"],
            [f"{a}/2", f"-{a}.5", f"{a} and a half, {b}", "1/2"],
        ),
        "percent": (
            rf"{a}\%",
            [f"{a}%", a, f"{n / 100}", f"{a} percent"],
            [f"{n / 100}%", f"{100 * n}%", f"{a}% or {b}%", f"{a} % {b}"],
        ),
        "share": (f"{n / 100}", [f"{a}%", rf"{a}\%", f".{n:02d}" if n < 100 else f"{n / 100}"], [a, f"{n * 10}%", f"-{a}%"]),
        "unit": (
            f"{a} cm",
            [a, f"{a}cm", f"{a} cm in all", rf"{a}\text{{ cm}}"],
            [f"{a} m", f"{a} kg", f"{b} cm", f"{a} feet"],
        ),
        "currency": (f"€{a}", [a, f"{a} €", f"€{a}.00"], [f"£{a}", f"{a} ¥", f"-€{a}"]),
        "scientific": (
            f"{a}e5",
            [rf"{a} \times 10^5", rf"{a} \cdot 10^{{5}}", f"{n * 10**5}", f"{n * 10**5:,}"],
            [rf"{a} \times 10^{{-5}}", a, "5"],
        ),
        "tuple": (
            f"({a}, {b})",
            [rf"\left({a},{b}\right)", f"({a}.0,{b})"],
            [f"({b}, {a})", f"[{a}, {b}]", f"{a}, {b}", f"({a}, {b}, {b})"],
        ),
        "set": (rf"\{{{a}, {b}\}}", [f"{{{b},{a}}}", rf"\{{{a},{b}\}}"], [f"({a},{b})", rf"\{{{a},{a}\}}", rf"\{{{a}\}}", a]),
        "list": (f"{a}, {b}", [f"{a}, {b}.0", f"{b} , {a}"], [f"({a}, {b})", a, f"{a}, {a}"]),
        "interval": (f"[{a}, {b})", [f"[{a},{b})", f"[{a}.0, {b})"], [f"({a}, {b})", f"[{a}, {b}]", f"[{b}, {a})"]),
        "time": (f"12:{n % 50 + 10}", [f"12:{n % 50 + 10}"], ["12", str(n % 50 + 10), f"11:{n % 50 + 10}"]),
        "named": (f"x={a}", [a, f"x = {a}"], [f"y = {a}", f"x = {b}", f"x = {a} or x = {b}", f"x > {a}"]),
        "root": (
            rf"{a}\sqrt{{{b}}}",
            [rf"{a} \sqrt {{{b}}}", rf"x = {a}\sqrt{{{b}}}"],
            [a, b, rf"{b}\sqrt{{{a}}}", rf"{a}+\sqrt{{{b}}}"],
        ),
        "choice": (
            "B",
            ["(B)", "B.", "**B**", "B) text", f"(B) {a}", "b: Paris"],
            ["A", "A or B", "(A), (B)", "A. not B", "Bob", "AB", "not B", a],
        ),
        "marked choice": (r"\text{(B)}", ["B", "(B)", r"\textbf{(B)}"], ["C", "(B) or (C)", "BC"]),
        "yes": (
            "Yes",
            ["yes", "Yes.", f"Yes, as {a} < {b}", "**Yes**"],
            ["no", "yes and no", "Yes, no", "not yes", "yesterday"],
        ),
        "words": ("NaN", ["nan", "NaN."], ["inf", "0", "nano"]),
        "long": ("9" * 300 + a, ["9" * 300 + a + ".0", "x = " + "9" * 300 + a], ["9" * 299 + a, "9" * 300 + b]),
    }


@settings(max_examples=40)
@given(st.integers(2, 900).flatmap(lambda n: st.tuples(st.just(n), st.integers(n + 1, 999))), MARKS)
def test_answers_of_many_kinds(pair, mark):
    n, m = pair
    assume(math.gcd(n, m) == 1 and n % 1000)
    for kind, (answer, same, other) in kinds(n, m).items():
        wrong = [said for said in [answer, *same] if not is_correct(mark.format(said), answer)]
        assert not wrong, f"{kind}: {answer!r} is called wrong as {wrong}"
        right = [said for said in other if is_correct(mark.format(said), answer)]
        assert not right, f"{kind}: {right} is called {answer!r}"
        for nothing in ("", " ", "\u200b"):
            assert not is_correct(mark.format(answer), nothing)


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_counts_all_choices(samples):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))
