"""Short texts in a form that is the same however they are spaced or spelled: formulas, whose case counts, and words.

There is no algebra here: x+1 is not 1+x.
"""

from __future__ import annotations

import re

from npd.answers.choices import LETTERED
from npd.answers.quantities import SPECIAL, UNITS

__all__ = ["in_words", "opener", "tight"]

LONGEST = 1000  # characters of a text in which fractions are looked for
_FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp"
_TIGHT = (
    (re.compile(rf"(?<![a-zA-Z\\])({_FUNCTION})(?= ?[\dα-ω(\\^_|]| [a-zA-Z](?![a-zA-Z]))"), r"\\\1"),
    (re.compile(r" ?([(){}\[\],;:=+*/^|<>×·±∪∩∈≤≥≠⇒-]) ?"), r"\1"),
    (re.compile(r"\\([{}])"), r"\1"),
    (re.compile(r"([\^_]) ?(\w)"), r"\1{\2}"),  # TeX takes one
    (re.compile(r"(?:^|(?<=[(\[{,;=]))\+(?=∞)"), ""),
    (
        re.compile(
            rf"\\({_FUNCTION})(?![a-zA-Z])(\^\{{\w\}})? ?(\d{{0,9}}(?:[a-zA-Z]|\\(?!(?:{_FUNCTION})(?![a-z]))[a-z]{{1,9}}"
            r"|π)|\d{1,9})(?=$|[+=,;)\]}<>≤≥-])"
        ),
        r"\\\1\2(\3)",
    ),
    (re.compile(r"(?<![^\W\d_]) (?=[^\W\d_])|(?<=[^\W\d_]) (?![^\W\d_])|(?<!\w) | (?!\w)"), ""),
)


def tight(text: str) -> str:
    """A formula without spaces, unless they keep apart what would be one."""
    for pattern, instead in _TIGHT:
        text = pattern.sub(instead, text)
    if len(text) <= LONGEST:
        text = _fractions(text)
        if text[:1] == "(" and re.search(r"[-+*/^=\\]", text) and "," not in text and opener(text, len(text)) == 0:
            text = text[1:-1]
    return text


_UNDER = re.compile(
    r"/(?:(\d+)|(\([^()]*\))|([^\W\d_]|\\(?:pi|alpha|beta|gamma|theta|lambda|mu|sigma|phi|omega))|(\\sqrt\{[^{}]*\}))"
    r"(?![\w.({\\^!'/*·×²³°πα-ω])"
)
_CLOSERS = {")": "(", "}": "{", "]": "["}
_NO_TOP = re.compile(rf"(?:{_FUNCTION}|lim|max|min)(?![a-zA-Z({{^_])|(?<!\\)(?:{_FUNCTION})|_\{{?$|\^$")


def _fractions(text: str) -> str:
    """A slash between a product and one number, letter or bracket as TeX's fraction."""
    pieces, at = [], 0
    for found in _UNDER.finditer(text):
        start = _top(text, found.start(), at)
        over = text[start : found.start()]
        if not over or _NO_TOP.search(over) or (start and text[start - 1] not in "+-=,;([{<>≤≥±"):
            continue
        under = next(group for group in found.groups() if group)
        if over[0] == "(" and opener(over, len(over)) == 0:
            over = over[1:-1]
        pieces += [text[at:start], f"\\frac{{{over}}}{{{under[1:-1] if under[0] == '(' else under}}}"]
        at = found.end()
    return "".join(pieces) + text[at:]


def _top(text: str, end: int, first: int) -> int:
    """Where the product begins that ends here."""
    at = end
    while at > first:
        if text[at - 1] in ")}":
            begun = opener(text, at)
            if begun is None or begun < first:
                return at
            at = begun
        elif text[at - 1].isalnum() or text[at - 1] in "\\^_.'":
            at -= 1
        else:
            break
    return at


def opener(text: str, end: int) -> int | None:
    """Where the bracket opens that closes right before this place."""
    open_ = list[str]()
    for at in range(end - 1, -1, -1):
        if text[at] in _CLOSERS:
            open_.append(_CLOSERS[text[at]])
        elif text[at] in "([{" and (not open_ or open_.pop() != text[at]):
            return None
        if not open_:
            return at
    return None


# -- words

_NO_WORDS = re.compile(r"[\\^_=+*<>|{}$%#√π∞×·°±∈∪∩≤≥≠~@]")
_RUN = re.compile(r"[^\W_]+")
_INITIALS = re.compile(r"(?<![\w.])(?:[^\W\d_]\. ?){1,6}[^\W\d_](?!\w)|(?<![\w.])[^\W\d_]\.(?= )")
_TIME = re.compile(r"(\d{1,2}(?::\d{2})?) ?([ap])\.? ?m\.?", re.IGNORECASE)
_FOLDED: dict[str, set[str]] = {}
for _unit in {*UNITS, *SPECIAL}:
    _FOLDED.setdefault(_unit.casefold(), set()).add(_unit)


def in_words(text: str) -> str | None:
    """A text of words in small letters and without its article; None where it is a formula, or may be one.

    A letter by itself keeps its case, for it may be a variable: the radius r is not R.
    """
    if found := _TIME.fullmatch(text):
        return found[1] + found[2].casefold() + "m"
    if _NO_WORDS.search(text):
        return None
    text = _INITIALS.sub(lambda found: re.sub(r"[. ]", "", found[0]).casefold(), text)
    if re.fullmatch(r"n/a", text, re.IGNORECASE):
        return "n/a"
    if re.search(r"(?<![^\W\d_]{2})/|/(?![^\W\d_]{2})", text):
        return None
    if not re.search(r"[^\W\d_]{3}", text):
        short = text.isalpha() and len(text) > 1 and (text.isupper() or text.islower())
        return text.casefold() if short and not set(text.casefold()) <= set("abcdmnpqrxyz") else None
    pieces, at, before = [], 0, ""
    for found in _RUN.finditer(text):
        run, start, end = found[0], found.start(), found.end()
        pieces += [text[at:start], run if _counts(text, run, start, end, before) else run.casefold()]
        at, before = end, run
    text = re.sub(r" ?([(){}\[\],;:/-]) ?", r"\1", "".join(pieces) + text[at:])
    return re.sub(r"^(?:the|an?) (?=.*[^\W\d_]{2})", "", text)


def _counts(text: str, run: str, start: int, end: int, before: str) -> bool:
    """Does a word's case count?"""
    if len(run) == 1 and run.isalpha():
        joined = text[end : end + 1] in tuple("-'&") or text[max(0, start - 1) : start] in tuple("-'&")
        return not (joined or run.casefold() in "ai" or before.casefold() in LETTERED)
    return before.isdigit() and len(_FOLDED.get(run.casefold(), ())) > 1
