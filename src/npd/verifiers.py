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
from typing import Any

import pyarrow as pa

from npd.errors import UserError
from npd.prompts import accepted_answers, reasoning_gym_entry
from npd.sameness import same_answer
from npd.verifying import Judge, Unjudged

__all__ = ["Verifier", "Verify", "check_entries", "extract_answer", "is_correct", "is_marked", "pass_at_k"]

OPEN, CLOSE = "<answer>", "</answer>"
# Whatever may repeat in front of what can fail has a bound: else a text could be made that takes quadratic time.
_MARKED = (
    re.compile(r"(?:#{4}\s{0,99}|#(?=[^\s#]))([^\n#]+)"),  # GSM8K's mark and the demo's, but no Markdown heading
    re.compile(  # to the end of what is bold, or of the line
        r"(?<![</\w])answer(?!\w)(?:\s{1,9}is)?\s{0,9}[:=]?[\s*]{0,18}((?:(?!(?<=\S)\*\*(?:[\s.,;:!)]|$))[^\n])+)",
        re.IGNORECASE,
    ),
)
_BRACE = re.compile(r"\\boxed ?\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str:
    """The final answer of a response: in <answer> tags, in \\boxed{}, behind # or "answer:", else its last line."""
    found = _marked(text)
    return _last_line(text) if found is None else found


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _marked(text: str) -> str | None:
    for find in (_in_tags, _in_box):
        if (found := find(text)) is not None:
            return found.strip()
    for pattern in _MARKED:
        if (last := _last(pattern, text)) is not None:
            return last[1].strip().rstrip("* ")
    return None


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
    return _marked(text) is not None


def is_correct(response: str, answer: str) -> bool:
    """Compare a response's final answer with the right one, as `npd.sameness` does; nothing is right where that is empty."""
    found = _marked(response)
    return same_answer(_last_line(response) if found is None else found, answer, marked=found is not None)


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
