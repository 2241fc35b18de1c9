"""What a verifier calls right, by composition: the right value in any dress is right, another value or a changed one in no
dress is. The oracle is how a case was made."""

from __future__ import annotations

import string
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from npd.answers import same_answer
from npd.verifiers import is_correct

# -- values in any dress

WHOLE = st.integers(-99_999, 99_999)
HUNDREDTHS = st.integers(-99_999, 99_999).map(lambda n: Fraction(n, 100))
FRACTIONS = st.fractions(-999, 999, max_denominator=60)


def decimals(value: Fraction) -> str | None:
    """The value as a decimal number, where it is one of at most six places."""
    shown = value * 10**6
    if shown.denominator != 1:
        return None
    sign, digits = "-" * (value < 0), f"{abs(shown.numerator):07d}"
    return f"{sign}{digits[:-6]}.{digits[-6:]}".rstrip("0").rstrip(".")


def spellings(value: Fraction) -> list[str]:
    top, bottom, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
    found = [
        f"{sign}\\frac{{{top}}}{{{bottom}}}",
        f"{sign}\\dfrac{{{3 * top}}}{{{3 * bottom}}}",
        f"{sign}{2 * top}/{2 * bottom}",
    ]
    found.append(f"\\frac{{{sign}{top}}}{{{bottom}}}")
    if top < 10 and bottom < 10:
        found.append(f"{sign}\\frac{top}{bottom}")
    if (plain := decimals(value)) is not None:
        whole, point, rest = plain.partition(".")
        found += [plain, plain.replace("-", "\u2212"), f"{plain}{'' if point else '.'}00", f"{int(whole):,}{point}{rest}"]
        found[-1] = ("-" if whole == "-0" else "") + found[-1]
    if bottom == 1 and top >= 1000:
        thousands = f"{value.numerator:,}"
        found += [thousands.replace(",", "{,}"), thousands.replace(",", "\\,"), thousands.replace(",", " ")]
    if bottom == 1 and top:
        found += [f"{value}e0", f"{value} \\times 10^0", f"{value * 1000}e-3"]
    if 1 < bottom <= top:
        found += [
            f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}",
            f"{sign}{top // bottom} {top % bottom}/{bottom}",
        ]
    return found


DRESSES = [
    "{}",
    " {} ",
    "${}$",
    "\\({}\\)",
    "$$ {} $$",
    "**{}**",
    "x = {}",
    "$x={}$",
    "\\text{{{}}}",
    "\\mathbf{{{}}}",
    "({})",
]
BEHIND = ["", ".", " apples", " cups of green tea", "\\text{{ apples}}", " km", "\\text{{ km/h}}", " dollars"]
LEADS = [
    "",
    "The answer is ",
    "So the total is ",
    "Therefore, it is ",
    "In total, we get ",
    "The total number of red apples is ",
]
MARKS = [
    "#### {}", "<answer>{}</answer>", "\\boxed{{{}}}", "So, $\\boxed{{{}}}$.", "\\[\n\\boxed{{{}}}\n\\]",
    "**Answer:** {}", "Final answer: {}", "**The answer is: {}**",
    "Therefore $x = \\boxed{{{}}}$. I hope it is correct.",
]  # fmt: skip


@st.composite
def dressed(draw: st.DrawFn, value: Fraction) -> str:
    """A response that says a value, somehow."""
    said = draw(st.sampled_from(spellings(value)))
    dress = draw(st.sampled_from(DRESSES if "," not in said else DRESSES[:-1]))  # (1,000) may be a point
    behind = draw(st.sampled_from(BEHIND)) if dress in DRESSES[:5] else ""
    said = dress.format(said) + behind.replace("{{", "{").replace("}}", "}")
    mark = draw(st.sampled_from(MARKS))
    if mark in MARKS[:2]:
        said = draw(st.sampled_from(LEADS)) + said
    work = draw(st.sampled_from(["", "1 + 1 = 2, so\n", "The answer is 7? No.\n\n"]))
    return work + mark.format(said)


@st.composite
def values(draw: st.DrawFn) -> tuple[Fraction, str]:
    """A value and one way to write it as data do."""
    value = Fraction(draw(st.one_of(WHOLE, HUNDREDTHS, FRACTIONS)))
    return value, draw(st.sampled_from(spellings(value)))


@given(values().flatmap(lambda one: st.tuples(st.just(one[1]), dressed(one[0]))))
def test_a_value_is_right_in_any_dress(case):
    answer, response = case
    assert is_correct(response, answer)


@given(values().flatmap(lambda one: st.tuples(st.just(one), st.one_of(WHOLE, HUNDREDTHS, FRACTIONS), st.data())))
def test_another_value_is_right_in_no_dress(case):
    (right, answer), other, data = case
    assume(Fraction(other) != right and Fraction(other) / 100 != right and Fraction(other) != right / 100)
    assert not is_correct(data.draw(dressed(Fraction(other))), answer)


# -- what stands around a value changes it

DIGITS = st.integers(2, 9999).map(str)
CHANGED_BEFORE = [
    "-", "−", "not ", "never ", "<", ">", "≥ ", "\\leq ", "\\neq ", "≠", "±", "\\pm ", "√", "\\sqrt ", "1/", "2*",
    "3 + ", "7-", "0.", "1,", "1e", "2^", "x^", "x_", "H", "at least ", "at most ", "more than ", "less than ",
    "almost ", "half of ", "twice ", "minus ", "negative ", "the square root of ", "the square of ", "log ",
    "7 or ", "7 and ", "7, ", "7; ", "7 to ", "7:", "-x + ", "between 1 and ", "from ", "below ", "a multiple of ",
    "anything but ", "x > ", "x ≠ ", "v1.", "#1 or ", "12-", "1 feet ", "f(x) = x + ", "2x = ", "n! = ", "x^2 = ",
    "|x| = ", "one of 3, ", "no ", "neither 3 nor ", "7 % ", "π",
]  # fmt: skip
CHANGED_BEHIND = [
    "!", "²", "^2", "^{-1}", "_8", "_{2}", "i", "x", "π", "\\pi", "k", "K", "M", " M", " mil", " million",
    " thousand", " dozen", " hundred", "e3", "th", "nd", "st", " or more", " or less", " or 7", " and a half",
    " and 7", ", 7", ":30", "/7", "-7", "–7", " - 7", " + x", "*7", " times", " × 7", " to 7", " in binary",
    " in base 8", " squared", " cubed", " factorial", " percent off", " mod 7", " more", " fewer", " at most", "+",
    " ± 1", "\\sqrt{2}", "x^2", "(x+1)", "(2)", " is wrong", " is not right", " is incorrect", "? No", " (wrong)",
    ", no, 7", " but rather 7", "x + 1", " > x", " < x", "%7", ".5", ",5", "'s complement", "h", "a", "Q",
    " trillion", "bn", " grand", " crore", " apples or more", " divided by 7", " of 7", " out of 7", " √2",
    "\\cdot 7", "\\%^2", " score", " pairs", "₂", "½",
]  # fmt: skip
AROUND = [
    "#### {}", "<answer>{}</answer>", "\\boxed{{{}}}", "So, $\\boxed{{{}}}$.", "Answer: {}", "The answer is {}.",
    "**Answer:** {}",
]  # fmt: skip


@given(DIGITS, st.sampled_from(CHANGED_BEFORE), st.sampled_from(["", *CHANGED_BEHIND]), st.sampled_from(AROUND))
@example("42", "7-", "", "#### {}")
def test_what_stands_before_a_value_changes_it(value, before, behind, mark):
    assert not is_correct(mark.format(before + value + behind), value)


@given(DIGITS, st.sampled_from(["", *CHANGED_BEFORE]), st.sampled_from(CHANGED_BEHIND), st.sampled_from(AROUND))
def test_what_stands_behind_a_value_changes_it(value, before, behind, mark):
    assert not is_correct(mark.format(before + value + behind), value)


@pytest.mark.parametrize("mark", AROUND)
def test_each_change_is_seen(mark):
    before = [change for change in CHANGED_BEFORE if is_correct(mark.format(change + "42"), "42")]
    behind = [change for change in CHANGED_BEHIND if is_correct(mark.format("42" + change), "42")]
    assert not before + behind


@given(DIGITS, st.text("xyzqiQZ" + string.digits + "^_!/+*.,:-()<>π²√ ", min_size=1, max_size=4))
def test_what_is_glued_to_a_value_makes_it_another(value, glued):
    """Unless it is a full stop or the like, or zeros behind a point; no letters are there of which units are made."""
    held = glued.strip(" .,*:")
    assume(held and not (glued.startswith(".") and not held.strip("0")))
    for mark in AROUND[:3]:
        assert not is_correct(mark.format(value + glued), value), mark.format(value + glued)


# -- boxes that are part of something

BOX_BEFORE = [
    "-",
    "−",
    "2",
    "2 \\cdot ",
    "\\sqrt{",
    "\\frac{1}{",
    "x^",
    "x + ",
    "not ",
    "\\neq ",
    "< ",
    "\\log ",
    "\\boxed{3} or ",
    "(",
]
BOX_BEHIND = [
    "^2",
    "!",
    "x",
    "\\sqrt{2}",
    " + 1",
    "/2",
    " \\pm 1",
    ".5",
    ",5",
    "\\%^2",
    " or \\boxed{3}",
    "\\pi",
    " is wrong",
    "k",
    " million",
]
CLOSING = {"\\sqrt{": "}", "\\frac{1}{": "}", "(": ", 7)"}


@given(DIGITS, st.sampled_from(BOX_BEFORE), st.sampled_from(["", *BOX_BEHIND]), st.sampled_from(["", "$"]), st.booleans())
def test_a_box_that_is_part_of_something_is_no_answer(value, before, behind, dollar, line):
    text = f"{dollar}{before}\\boxed{{{value}}}{CLOSING.get(before, '')}{behind}{dollar}"
    assert not is_correct(("so\n" if line else "so ") + text, value)


@given(DIGITS, st.sampled_from(BOX_BEHIND), st.sampled_from(["", "$"]), st.sampled_from(["so ", "x = ", "Thus:\n"]))
def test_what_stands_behind_a_box_is_seen(value, behind, dollar, lead):
    assert not is_correct(f"{lead}{dollar}\\boxed{{{value}}}{behind}{dollar}", value)


# -- units

UNITS = [
    ["m", "meters", "metres", "meter"], ["km", "kilometers", "kms"], ["cm", "centimeters"], ["mm", "millimeters"],
    ["m^2", "m²", "square meters", "sq m", "m^{2}"], ["m^3", "m³", "cubic meters"],
    ["cm^2", "cm²", "square centimeters"], ["km/h", "km per hour", "kilometers per hour", "kph"],
    ["m/s", "meters per second"], ["mph", "miles per hour", "mi/h"], ["mW", "milliwatts"], ["MW", "megawatts"],
    ["kW", "kilowatts"], ["kWh", "kilowatthours"], ["s", "seconds", "sec"], ["min", "minutes"],
    ["h", "hours", "hrs"], ["days", "day"], ["kg", "kilograms"], ["g", "grams"], ["mg", "milligrams"],
    ["lbs", "pounds"], ["ft", "feet"], ["inches", "in"], ["°C", "degrees Celsius", "celsius"],
    ["°F", "degrees fahrenheit"], ["°", "degrees", "^\\circ"], ["dollars", "USD"], ["cents", "¢"],
    ["€", "euros", "EUR"], ["L", "liters", "litres"], ["mL", "ml", "milliliters"], ["apples"], ["boxes"],
    ["m/s^2", "m/s²"], ["g/cm^3", "grams per cubic centimeter"], ["apples per day", "apples/day"],
]  # fmt: skip
SPACES = [" ", "\\text{{ {}}}", "\\ \\text{{{}}}", "~\\mathrm{{{}}}"]


@given(DIGITS, st.sampled_from(UNITS).flatmap(lambda ways: st.tuples(st.sampled_from(ways), st.sampled_from(ways))))
def test_a_unit_is_the_same_however_it_is_written(value, ways):
    said, right = ways
    assert is_correct(f"#### {value} {said}", f"{value} {right}")
    assert is_correct(f"#### {value} {said}", value)
    assert is_correct(f"#### {value}", f"{value} {right}")


@given(DIGITS, st.lists(st.sampled_from(UNITS), min_size=2, max_size=2, unique_by=tuple), st.data())
def test_another_unit_is_another_answer(value, two, data):
    said, right = (data.draw(st.sampled_from(ways)) for ways in two)
    assert not is_correct(f"#### {value} {said}", f"{value} {right}")


# -- formulas, choices and words

TERMS = ["x", "y", "2x", "x^2", "\\sqrt{3}", "\\pi", "a_1", "e^x", "\\sin x", "3y^2", "\\frac{x}{2}", "7"]
SPACED = st.sampled_from([" ", ""])


@given(st.lists(st.sampled_from(TERMS), min_size=2, max_size=4, unique=True), st.data())
def test_formulas_are_the_same_but_for_spaces(terms, data):
    signs = data.draw(st.lists(st.sampled_from("+-"), min_size=len(terms), max_size=len(terms)))
    answer = terms[0] + "".join(sign + term for sign, term in zip(signs, terms[1:], strict=False))
    said = terms[0]
    for sign, term in zip(signs, terms[1:], strict=False):
        said += data.draw(SPACED) + sign + data.draw(SPACED) + term
    assert is_correct(f"\\boxed{{{said}}}", answer)
    for other in (
        f"-{said}",
        f"{said}^2",
        f"2({said})",
        f"{said}+1",
        said.replace("x", "X") if "x" in said.replace("ex", "") else "0",
    ):
        assert not is_correct(f"\\boxed{{{other}}}", answer), other
    turned = signs[0].translate(str.maketrans("+-", "-+"))
    assert not is_correct(f"\\boxed{{{answer.replace(signs[0], turned, 1)}}}", answer) or answer[0] == signs[0]


@given(
    st.sampled_from("ABCDE"),
    st.sampled_from("ABCDE"),
    st.sampled_from(["{}", "({})", "{}.", "\\text{{({})}}", "**{}**", "{}) Paris", "{}: Rome"]),
)
def test_choices(said, right, way):
    for mark in AROUND:
        assert is_correct(mark.format(way.format(said)), right) == (said == right)
        for more in (" or {}", ", {}", " and ({})", " is wrong", " is not right"):
            other = "B" if right == "A" else "A"
            assert not is_correct(mark.format(f"({right})" + more.format(other)), right)


NAMES = st.text(string.ascii_letters, min_size=3, max_size=8)


@given(st.lists(NAMES, min_size=1, max_size=3).map(" ".join), NAMES)
def test_words_are_the_same_in_any_case_and_nothing_else_is(answer, more):
    for mark in AROUND:
        assert is_correct(mark.format(answer.upper()), answer)
        for other in (f"not {answer}", f"{answer} or {more}", f"{answer}{more}", f"{more} {answer}", f"{answer} {more}"):
            assert not is_correct(mark.format(other), answer), other


# -- matrices, points and bounds


CELLS = st.lists(st.lists(st.integers(0, 9).map(str), min_size=3, max_size=3), min_size=2, max_size=3)


@given(CELLS, CELLS, st.sampled_from("pb"), st.sampled_from(["&", " & "]), st.sampled_from(["\\\\", " \\\\ "]))
def test_matrices_are_the_same_cell_by_cell(one, other, kind, column, row):
    said = f"\\begin{{{kind}matrix}} {row.join(map(column.join, one))} \\end{{{kind}matrix}}"
    right = (
        "\\begin{pmatrix}"
        + "\\\\".join("&".join(f"\\frac{{{cell}}}{{1}}" for cell in cells) for cells in other)
        + "\\end{pmatrix}"
    )
    assert same_answer(said, right) == (one == other)
    assert same_answer(right, right)


PAIRS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3, unique=True)


@given(PAIRS, PAIRS, st.sampled_from(["{}, {}", "({}, {})", "x={}, y={}"]))
def test_points_that_semicolons_keep_apart_keep_their_coordinates(one, other, way):
    said, right = ("; ".join(way.format(*pair) for pair in pairs) for pairs in (one, other))
    assert same_answer(said, right) == (sorted(one) == sorted(other))


@given(st.sampled_from(["x < {}", "x \\geq {}", "x \\neq {}"]), st.integers(1, 5), st.integers(6, 9))
def test_bounds_that_hold_together_are_not_those_of_which_one_holds(way, a, b):
    both, either = (f"{way.format(a)} {word} x > {b}" for word in ("and", "or"))
    assert same_answer(both, both)
    assert same_answer(either, f"x > {b} or {way.format(a)}")
    assert not same_answer(both, either)
    assert not same_answer(either, both)
