"""Does a response hold the right answer? Verifiers, for rollouts, evaluation and rewards alike.

Responses are untrusted text: what is done here to one takes time linear in its length, and verifiers of others' making run in
a process of their own, within bounds (`npd.verifying`).
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import pyarrow as pa

from npd.errors import UserError
from npd.prompts import accepted_answers, reasoning_gym_entry
from npd.verifying import Judge, Unjudged

__all__ = ["Verifier", "Verify", "check_entries", "extract_answer", "is_correct", "is_marked", "pass_at_k"]

OPEN, CLOSE = "<answer>", "</answer>"
# Whatever may repeat in front of what can fail has a bound: else a text could be made that takes quadratic time.
_MARKED = (
    re.compile(r"(?:#{4}\s{0,99}|#(?=[^\s#]))([^\n#]+)"),  # GSM8K's mark and the demo's, but no Markdown heading
    re.compile(r"(?<![</\w])answer(?!\w)(?:\s{1,9}is)?\s{0,9}[:=]?\s{0,9}\*{0,9}([^\n*]+)", re.IGNORECASE),
)
_BRACE = re.compile(r"\\boxed ?\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str:
    """The final answer of a response: in <answer> tags, in \\boxed{}, behind # or "answer:", else its last line."""
    for find in (_in_tags, _in_box):
        if (found := find(text)) is not None:
            return found.strip()
    for pattern in _MARKED:
        last = _last(pattern, text)
        if last is not None:
            return last[1].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def _in_tags(text: str) -> str | None:
    """What stands in the last pair of <answer> tags."""
    found, at = None, text.find(OPEN)
    while at >= 0 and (end := text.find(CLOSE, at + len(OPEN))) >= 0:
        found = text[at + len(OPEN) : end]
        at = text.find(OPEN, end + len(CLOSE))
    return found


def _in_box(text: str) -> str | None:
    """What stands in the \\boxed{} that is closed last; braces within it are its own."""
    found, opened = None, list[int]()  # where what is in a box begins; 0: another brace
    for brace in _BRACE.finditer(text):
        if brace[0] == "}":
            start = opened.pop() if opened else 0
            found = (start, brace.start()) if start else found
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            opened.append(brace.end() if len(brace[0]) > 1 else 0)
    return None if found is None else text[slice(*found)]


def is_marked(text: str) -> bool:
    """Does a response mark its final answer, rather than end with it?"""
    marked = any(find(text) is not None for find in (_in_tags, _in_box))
    return marked or any(pattern.search(text) for pattern in _MARKED)


def is_correct(response: str, answer: str) -> bool:
    """Compare a response's final answer with the right one: as text, and if that is a number, with the last number said.

    Numbers are equal by value, fractions too (1/2, \\frac{1}{2}, 0.5). A number that is part of something else, an exponent,
    below a root, a factor of π, is none. LaTeX's ways to write the same are one. Nothing is right where the answer is empty.
    """
    said, right = _plain(extract_answer(response)), _plain(answer)
    if not right:
        return False
    if said == right:
        return True
    whole = _QUANTITY.fullmatch(right)
    number = None if whole is None else _value(whole)
    return number is not None and (last := _last_number(said)) is not None and _equal(last, number)


# -- text: LaTeX's ways to write the same

_REPLACED = (
    (re.compile("[\u2212\ufe63\uff0d]"), "-"),  # minus signs
    (re.compile(r"\\[,!;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\^\{?\\circ\}?"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s?(\d)\s?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|operatorname|boxed|fbox)\s?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]]"), ""),
    (re.compile(r"(\d)\s{0,2}(?:\\times|\\cdot|[×*])\s{0,2}10\^\{?([-+]?\d{1,9})\}?"), r"\1e\2"),
)


def _plain(text: str) -> str:
    for pattern, instead in _REPLACED:
        text = pattern.sub(instead, text)
    text = text.strip().rstrip(".$ ").lstrip("$ ").casefold()
    return "".join(text.split()) if "\\" in text else " ".join(text.split())


# -- numbers

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
_QUANTITY = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-+])?\$?(?:"
    rf"(?P<whole>\d{{1,9}})?\s{{0,2}}\\frac\{{(?P<top>[-+]?{_UNSIGNED})\}}\{{(?P<bottom>{_UNSIGNED})\}}"
    r"|(?P<full>\d{1,9})\s{1,2}(?P<part>\d{1,9})/(?P<of>\d{1,9})(?!\d)"
    rf"|(?P<number>{_UNSIGNED})(?:\s{{0,2}}/\s{{0,2}}(?P<under>{_UNSIGNED}))?)"
)
# What makes a number part of something else: an exponent, an index, a root, a denominator, a factor.
_BEFORE = re.compile(r"(?:[\^_/]\s?\{?|\\sqrt\s?|\\[a-z]{1,20}(?:\[[^\]]{0,20}\])?\{|\}\s?\{)$")
_BEHIND = re.compile(r"\s{0,2}(?:/\s?\d|\^|π|√|\\(?:pi|sqrt|frac|binom|infty)(?![a-z]))")
LONGEST = 400  # digits of what fractions are computed of; longer numbers are compared as they stand


def _last_number(text: str) -> Decimal | Fraction | None:
    last = _last(_QUANTITY, text)
    if last is None or _BEFORE.search(text[max(0, last.start() - 60) : last.start()]) or _BEHIND.match(text, last.end()):
        return None
    return _value(last)


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
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _short(number: Decimal | None) -> Decimal | None:
    """The number, unless it has so many digits that computing with it would take long."""
    if number is None or len(number.as_tuple().digits) > LONGEST or abs(number.adjusted()) > LONGEST:
        return None
    return number


def _equal(a: Decimal | Fraction, b: Decimal | Fraction) -> bool:
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    a, b = (_short(x) if isinstance(x, Decimal) else x for x in (a, b))  # type: ignore[assignment]
    return a is not None and b is not None and Fraction(a) == Fraction(b)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k responses is right: 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class Verifier:
    """Judges responses by what their rows say is right.

    A row's `answer` cell (as prompts.arrow and data frames of `npd` have it) holds one answer or several, of which any
    counts, or a reasoning-gym entry, whose own verifier then judges. A verifier that raises or computes too long costs that
    response its reward alone.
    """

    def __init__(self) -> None:
        self.judge = Judge()
        self.failed = 0
        """Responses that their verifier could not judge."""
        self.why = ""
        """What happened with the first of them."""

    def __call__(self, text: str, cell: str | None) -> float | None:
        """1.0 for a right response, 0.0 for a wrong one; None where nothing verifies it."""
        if cell is None:
            return None
        entry = reasoning_gym_entry(cell)
        if entry is None:
            answers = [answer for answer in accepted_answers(cell) if answer.strip()]
            return float(any(is_correct(text, answer) for answer in answers)) if answers else None
        return self.task(text, task_of(entry), {}, entry)

    def task(self, text: str, name: str, options: dict[str, Any], entry: dict[str, Any]) -> float | None:
        """As above, by the verifier of a reasoning-gym task with these options, for an entry of it."""
        whole = "\n" in str(entry["answer"]) and OPEN not in text
        said = text.strip() if whole else extract_answer(text).rstrip(".")
        try:
            # Part marks, which some verifiers give for a format, are no solution.
            return float(self.judge(name, options, said, entry) >= 1.0)
        except Unjudged as error:
            self.failed += 1
            self.why = self.why or f"reasoning-gym's {name}: {error}"
            return None


class Verify:
    """Stage: adds `reward`, float32: 1 for a right response, 0 for a wrong one, null where nothing verifies it."""

    def __init__(self) -> None:
        self.verifier = Verifier()

    @property
    def failed(self) -> int:
        return self.verifier.failed

    @property
    def why(self) -> str:
        return self.verifier.why

    def __call__(self, table: pa.Table, decode: Callable[[list[list[int]]], list[str]]) -> pa.Table:
        """`table` has columns response_ids and answer; `decode` gives the texts of responses without special tokens."""
        texts = decode(table["response_ids"].to_pylist())
        rewards = [self.verifier(text, cell) for text, cell in zip(texts, table["answer"].to_pylist(), strict=True)]
        return table.append_column("reward", pa.array(rewards, pa.float32()))


def task_of(entry: dict[str, Any]) -> str:
    """The reasoning-gym task that an entry is of."""
    return str(entry["metadata"]["source_dataset"])


def check_entries(cells: Iterable[str]) -> None:
    """See that the tasks of reasoning-gym entries exist.

    Raises:
        UserError: one does not.
    """
    named = {task_of(entry) for cell in cells if (entry := reasoning_gym_entry(cell)) is not None}
    if named:
        from reasoning_gym.factory import DATASETS

        if unknown := sorted(named - DATASETS.keys()):
            raise UserError(
                f"data.train has reasoning_gym entries of the task {json.dumps(unknown[0])[:80]}, which the installed "
                "reasoning-gym does not know. Leave them out, or install the version that made them."
            )
