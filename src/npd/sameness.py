"""Do two short texts say the same answer? Numbers by value, lists by their members, choices by their letter, else as text.

A wrong answer that is called right teaches the wrong thing, a right one that is called wrong costs a sample: what can be
read in two ways is called wrong. All of it takes time linear in the texts' length: they are untrusted.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

__all__ = ["same_answer"]


def same_answer(said: str, answer: str, marked: bool = True) -> bool:
    """Is what was said the right answer?

    Numbers are equal by value: 1/2, \\frac{1}{2}, ½ and 0.5; 10,000, 10 000 and 10'000; 3 \\times 10^5. A number may have
    words before it, and units or words behind it, which count where both sides have them. 50% is 50, as in MATH's own
    normalisation, and 0.5 too, as in math-verify. A number that is part of something else (an expression, a range, a list, a
    date, a word such as H2O) is none.

    Args:
        marked: was what was said marked as the answer? A line of prose may have further numbers in other clauses.
    """
    said, answer = _plain(said), _plain(answer)
    if not answer:
        return False
    if said == answer:
        return True
    right = _only_number(answer)
    if right is not None:
        mine = _last_number(said, marked)
        return mine is not None and _same_number(mine, right)
    return _same_text(said, answer)


# -- text: ways to write the same

_UNITS = (
    "mm|cm|dm|km|nm|mg|kg|ml|cl|dl|lbs?|oz|ft|yd|mi|mph|kph|hrs?|mins?|secs?|ms|kw|mw|kwh|hz|khz|mhz|ghz|kb|mb|gb|tb|usd|eur|"
    "inch(?:es)?|feet|foot|yards?|miles?|units?|met(?:er|re)s?|(?:centi|milli|kilo)met(?:er|re)s?|cms|kms"
)
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_FRACTIONS |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_REPLACED = (
    (re.compile("[\u2212\ufe63\uff0d]"), "-"),  # minus signs
    (re.compile(r"</?answer>"), ""),  # of a pair that was never closed
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\^\{?\\circ\}?|\\!|\u200b"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s?(\d)\s?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s?([^\W_])"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|operatorname|boxed|fbox)\s?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]]"), ""),
    (re.compile(r"\\approx(?![a-zA-Z])|≈"), "="),
    (re.compile(r"\\(?:to|rightarrow|implies|Rightarrow)(?![a-zA-Z])|[→⇒]"), "="),
    (re.compile(r"(\d)\s{0,2}(?:\\times|\\cdot|[×*])\s{0,2}10\^\{?([-+]?\d{1,9})\}?"), r"\1e\2"),
    (re.compile(r"(?<![\w.,])10\^(?:\{([-+]?\d{1,9})\}|([-+]?\d{1,9}))(?![\d.}])"), r"1e\1\2"),
    (
        re.compile("[" + "".join(_FRACTIONS) + "]"),
        lambda found: " " * found.string[max(0, found.start() - 1)].isdigit() + _FRACTIONS[found[0]],
    ),
    (re.compile(r"(?<![\w)])\*{2,3}(?=\S)|(?<=\S)\*{2,3}(?![\w(])|`"), ""),  # Markdown
    (re.compile(r"(?<=\{) {1,9}| {1,9}(?=\})|(?<=\}) {1,9}(?=\{)|(?<=frac) {1,9}(?=\{)"), ""),
    (re.compile(rf"(?<![a-zA-Z])({_UNITS}|[ms])(?:\^\{{?-?[1-3]\}}?(?!\d)|[²³])"), r"\1"),
)


def _plain(text: str) -> str:
    for pattern, instead in _REPLACED:
        text = pattern.sub(instead, text)
    text = " ".join(text.casefold().split())
    return text.rstrip('.$* "”').lstrip('$* "“') or text


_TIGHT = (
    (re.compile(r"\s?([(){}\[\],;:=+*/^|<>])\s?"), r"\1"),
    (re.compile(r"(?<=\S) - (?=\S)"), "-"),
    (re.compile(r"\\([{}])"), r"\1"),
    (re.compile(r"([\^_])\{(\w)\}"), r"\1\2"),
    (re.compile(r"\\frac\{(\\?\w{1,20})\}\{(\\?\w{1,20})\}"), r"\1/\2"),
)
_NAMED = re.compile(r"[a-z]\w?\s?=\s?")
_CHOICE = re.compile(
    r"(?:(?:the |correct |right |final ){0,3}(?:option|choice|answer)(?: is)?:? )?[(\[]?([a-z])(?:[)\].:]{1,2}(?:\s(.*))?)?",
    re.DOTALL,
)
_OTHER_CHOICE = re.compile(r"(?<![\w'’])(?:[b-hj-z](?![\w'’])|[(\[]?[a-z][)\]])")
_WORD = re.compile(r"(yes|no|true|false)(?:[,.;:!]{1,2}(?:\s(.*))?)?", re.DOTALL)
_AGAINST = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
MOST = 64  # members of a list that are compared one by one


def _same_text(said: str, answer: str) -> bool:
    if (right := _CHOICE.fullmatch(answer)) and right[2] is None:
        mine = _CHOICE.fullmatch(said)
        return mine is not None and mine[1] == right[1] and not _OTHER_CHOICE.search(mine[2] or "")
    if answer in _AGAINST:
        word = _WORD.fullmatch(said)
        return word is not None and word[1] == answer and _AGAINST[answer] not in re.findall(r"\w+", word[2] or "")
    said, answer = _tight(said), _tight(answer)
    names = [_NAMED.match(text) for text in (said, answer)]
    if (names[0] is None) != (names[1] is None):  # x = is not part of an answer
        said, answer = (text[name.end() if name else 0 :] for text, name in zip((said, answer), names, strict=True))
    return said == answer or _same_members(said, answer)


def _tight(text: str) -> str:
    for pattern, instead in _TIGHT:
        text = pattern.sub(instead, text)
    return text.replace(" ", "") if "\\" in text else text


def _same_members(said: str, answer: str) -> bool:
    """Tuples and intervals member by member; sets, and lists without brackets, in any order."""
    mine, right = _members(said), _members(answer)
    if mine is None or right is None or mine[0] != right[0] or len(mine[1]) != len(right[1]):
        return False
    left = list(mine[1])
    for i, member in enumerate(right[1]):
        places = range(len(left)) if right[0] in ("", "{}") else [i - len(right[1]) + len(left)]
        found = next((at for at in places if _same_member(left[at], member)), None)
        if found is None:
            return False
        del left[found]
    return True


def _members(text: str) -> tuple[str, list[str]] | None:
    bounds = text[0] + text[-1] if text and text[0] in "([{" and text[-1] in ")]}" else ""
    inner = text[1:-1] if bounds else text
    if re.search(r"[()\[\]]", inner) or (bounds and "{" in bounds and bounds != "{}"):
        return None
    members = re.split(r"(?<!\{),(?!\})", inner)
    return (bounds, members) if 2 <= len(members) <= MOST else None


def _same_member(said: str, answer: str) -> bool:
    if said == answer:
        return True
    mine, right = _only_number(said), _only_number(answer)
    return mine is not None and right is not None and _same_number(mine, right)


# -- numbers

_UNSIGNED = (
    r"(?:(?:\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)|\d{1,3}(?:(?: \d{3}){1,9}|(?:['’]\d{3}){1,9})(?![\d/])|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:e[-+]?\d+)?"
)
_QUANTITY = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-+])?(?P<money>[$€£¥₹]\s?)?(?:"
    rf"(?P<whole>\d{{1,9}})?\s{{0,2}}\\frac\{{(?P<top>[-+]?{_UNSIGNED})\}}\{{(?P<bottom>{_UNSIGNED})\}}"
    r"|(?P<full>\d{1,9})\s{1,2}(?P<part>[1-9]\d{0,8})/(?P<of>\d{1,9})(?!\d)"
    rf"|(?P<number>{_UNSIGNED})(?:\s{{0,2}}/\s{{0,2}}(?P<under>{_UNSIGNED}))?)"
)
# What makes a number part of something else: where it is glued to a word, an operator, a function, a comparison, a bracket.
_BEFORE = re.compile(
    r"(?:[\w.,]|\d:|[\^_]\{?\w{1,4}\}?\s|[\w}]\(|[-–—+*/^<>≤≥≠±∓×÷·⋅√∛!|&@%;{\[)\]}]\s?"
    r"|[!<>]=\s?|\\[a-z]{1,20}(?:\[[^\]]{0,20}\])?\s?[({]?"
    r"|(?<!\w)[a-z][,;]\s|(?<!\w)(?:not(?: \w{1,9}){0,2}|and|or|never|than|least|most|log|ln|sqrt|root|sin|cos|tan"
    r"|minus|negative|plus|times|mod|over|under|above|below|except|between|either|up to|from|x|twice|double"
    r"|half of|(?:third|quarter|fifth|tenth)s? of|one in)\s?\(?"
    r"|n['’]t )$"
)
_BEHIND = re.compile(
    r"(?:\s?(?P<percent>%|per ?cent(?!\w)))?(?:\s(?P<scale>dozen|hundred|thousand|million|billion|trillion)s?(?!\w))?"
    r"(?:\s?(?P<sign>[°℃℉$€£¥₹])[cf]?(?!\w))?"
    rf"(?P<unit>(?:\s?(?:{_UNITS})|(?:\s[mgslhcfjwvad]))(?![\w^²³]))?(?:/\s?(?:[a-z]{{2,20}}|[hslmgd])(?![\w^(]))?"
    r"""["'’”)\]}*]{0,9}(?:$|[.,;:?](?=$|[\s"'’”)*])(?!\s[b-hj-z](?!\w))"""
    r"|\s(?:[-–—]\s(?=[a-z]{2})|\((?=[a-z]{2})|(?=[a-z°]{2}|[ad] )"
    r"(?!(?:or|and|to|pi|mod|modulo|factorial|squared|cubed|choose|plus|minus|times|divided|over|sqrt|half|point)(?!\w)"
    r"|\w{1,20}[\^_(]|[a-z]{1,3}\d)))"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MONEY = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}  # the dollar sign is LaTeX's too
# Between two numbers: the second one is what was come to; else they are a list, a range or a sum.
_CLAUSE = re.compile(
    r"(?<![!<>])=\s?$|[.?!:]\s|(?<!\w)(?:is|are|was|were|be|equals?|gives?|makes?|has|have|had|gets?|so|then|thus|hence|therefore|"
    r"total|answer|leaving|leaves?)(?!\w)"
)
_LISTED = re.compile(r"(?:[,;]|(?<!\w)(?:and|or))\s?\w{1,4}\s?(?:=|is|are)\s?$")
_JOINS = {"and", "or", "to", "of", "out", "through", "by", "per", "vs", "versus", "feet", "foot", "on", "at"}
LONGEST = 400  # digits of what fractions are computed of; longer numbers are compared as they stand


@dataclass(frozen=True)
class _Number:
    value: Decimal | Fraction
    percent: bool
    unit: str
    """What follows it, or the currency."""
    name: str
    """Of what it is said to be, such as x."""
    start: int


def _only_number(text: str) -> _Number | None:
    """The number that a text is, by itself or of so many things."""
    number = _last_number(text, marked=True)
    if number is None or not (number.start == 0 or _NAMED.fullmatch(text[: number.start])) or len(number.unit.split()) > 3:
        return None
    return number


def _last_number(text: str, marked: bool) -> _Number | None:
    """The number that a text ends with, if it stands for itself there."""
    ends: deque[int] = deque([0, 0], maxlen=2)
    last = None
    for found in _QUANTITY.finditer(text):
        last, front = found, text[found.start() - 1] if found.start() else " "
        if not (front.isalpha() or front == "_"):
            ends.append(found.end())
    if last is None or ends[1] != last.end():
        return None
    before, behind = text[max(0, last.start() - 60) : last.start()], _BEHIND.match(text, last.end())
    if behind is None or _BEFORE.search(before):
        return None
    if text[0] in "([{" and (last.start() != 1 or ")" not in behind[0]):  # a tuple's, not by itself
        return None
    if ends[0] and not _apart(text[ends[0] : last.start()][-200:], marked):
        return None
    value = _value(last)
    if value is None:
        return None
    if behind["scale"]:
        short = _short(value)
        value = None if short is None else Fraction(short) * _SCALES[behind["scale"]]
    sign = (last["money"] or behind["sign"] or "").strip()
    rest = re.split(r"[.,;:?()]", text[behind.end() :], maxsplit=1)[0]
    unit = _MONEY.get(sign) or f"{behind['unit'] or ''} {rest}".strip()
    name = re.search(r"(?<!\w)([a-z]\w?)\s?=\s?$", before)
    return None if value is None else _Number(value, bool(behind["percent"]), unit, name[1] if name else "", last.start())


def _apart(gap: str, marked: bool) -> bool:
    """Is the number behind this gap another clause's than the one before it?"""
    if _LISTED.search(gap):
        return False
    return bool(_CLAUSE.search(gap)) or (not marked and len(set(re.findall(r"[^\W\d_]{2,}", gap)) - _JOINS) > 1)


def _same_number(said: _Number, right: _Number) -> bool:
    if said.name and right.name and said.name != right.name:
        return False
    mine, theirs = ([word.rstrip("s") for word in number.unit.split()] for number in (said, right))
    if mine and theirs and mine[: len(theirs)] != theirs:
        return False
    if _equal(said.value, right.value):
        return True
    if said.percent == right.percent:
        return False
    share, plain = (said, right) if said.percent else (right, said)
    part = _short(share.value)
    return part is not None and _equal(Fraction(part) / 100, plain.value)


def _value(found: re.Match[str]) -> Decimal | Fraction | None:
    """A quantity as a number: exact, and computed with only where that takes no time."""
    sign, (over, under) = -1 if found["sign"] == "-" else 1, found.group("number", "under")
    if over is not None and under is None:
        number = _decimal(over)
        return None if number is None else number.copy_negate() if sign < 0 else number
    over, under = over or found["top"] or found["part"], under or found["bottom"] or found["of"]
    parts = [_short(_decimal(text)) for text in (over, under, found["whole"] or found["full"] or "0")]
    if None in parts or not parts[1]:
        return None
    top, bottom, whole = (Fraction(part or 0) for part in parts)
    return sign * (whole + top / bottom)


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub("[,'’ ]", "", text))
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _short(number: Decimal | Fraction | None) -> Decimal | Fraction | None:
    """The number, unless it has so many digits that computing with it would take long."""
    if isinstance(number, Decimal) and (len(number.as_tuple().digits) > LONGEST or abs(number.adjusted()) > LONGEST):
        return None
    return number


def _equal(a: Decimal | Fraction, b: Decimal | Fraction) -> bool:
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    short = _short(a), _short(b)
    return short[0] is not None and short[1] is not None and Fraction(short[0]) == Fraction(short[1])
