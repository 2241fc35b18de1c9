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
from npd.quantities import DENYING
from npd.sameness import same_answer
from npd.verifying import Judge, Unjudged

__all__ = ["Verifier", "Verify", "check_entries", "extract_answer", "is_correct", "is_marked", "pass_at_k"]

OPEN, CLOSE = "<answer>", "</answer>"
# Whatever may repeat in front of what can fail has a bound: else a text could be made that takes quadratic time.
_HASH = re.compile(r"(?:#{4}\s{0,99}|#(?=[^\s#]))([^\n#]+)")  # GSM8K's mark and the demo's, but no Markdown heading
_ANSWER = re.compile(  # to the end of what is bold, or of the line
    r"(?<![</\w])answer(?!\w)(?:\*{1,3}(?=[:\s]))?(?:\s{1,9}is)?\s{0,9}[:=]?[\s*]{0,18}"
    r"((?:(?!(?<=\S)\*\*(?:[\s.,;:!)]|$))[^\n])+)",
    re.IGNORECASE,
)
_BRACE = re.compile(r"\\boxed ?(?:(?=([^\s{}\\]|\\[a-zA-Z]{1,20}))|\{)|\\[{}]|[{}]")
NEAR = 200  # characters before and behind a mark that say whether it marks an answer by itself


def extract_answer(text: str) -> str:
    """The final answer of a response: in <answer> tags, in \\boxed{}, behind # or "answer:", else its last line.

    Where a box or an "answer" is part of something (-\\boxed{5}, \\boxed{5} or \\boxed{6}, the wrong answer), that is it.
    """
    found = _marked(text)
    return _last_line(text) if found is None else found


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _marked(text: str) -> str | None:
    for find in (_in_tags, _in_box, _behind_hash, _behind_answer):
        if (found := find(text)) is not None:
            return found.strip()
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


def _behind_hash(text: str) -> str | None:
    found = _last(_HASH, text)
    return found and _emphasised(found[1])


def _emphasised(said: str) -> str:
    """Without the end of an emphasis that began before the mark."""
    said = said.strip()
    bare = said.rstrip("* ")
    return said if "*" in bare else bare


def _in_box(text: str) -> str | None:
    """What stands in the \\boxed{} that is closed last; braces within it are its own."""
    found, opened = None, list[tuple[int, int]]()  # where a box and what is in it begin; 0: another brace
    for brace in _BRACE.finditer(text):
        if brace[1]:
            found = (brace.start(), brace.end(), brace.end(1), brace.end(1))
        elif brace[0] == "}":
            begun, start = opened.pop() if opened else (0, 0)
            found = (begun, start, brace.start(), brace.end()) if start else found
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            opened.append((brace.start(), brace.end() if len(brace[0]) > 1 else 0))
    if found is None:
        return None
    begun, start, end, over = found
    return _by_itself(text[:begun][-NEAR:].rpartition("\n")[2], text[start:end], text[over : over + NEAR].partition("\n")[0])


# What opens and closes a formula, a line of one, or emphasis: it says nothing.
_OPENERS = re.compile(
    r"(?:[\s$*_>\"“&(]|\\[(\[,;:!]|\\\\|\\(?:left|q?quad|displaystyle|bf|[lL]arge)(?![a-zA-Z])|\\(?:text|math)[a-z]{0,4}\{"
    r"|\\begin\{\w{1,20}\*?\})+$"
)
_CLOSERS = re.compile(
    r"(?:[\s$*_\"”)}∎]|\\[)\],;:!]|\\\\|\\(?:right|q?quad|blacksquare|square|qed)(?![a-zA-Z])|\\end\{\w{1,20}\*?\}"
    r"|</?\w{1,20}>)*"
)
_DENIAL = re.compile(
    r"(?<!\w)(?:not|never|cannot|neither|nor|wrong|incorrect|false|unlikely|doubt|\w{1,9}n['’]t)(?!\w)", re.IGNORECASE
)
_OF = re.compile(r"(?<!\w)(?:total|value|answer|result|number|amount|sum) of$", re.IGNORECASE)
_JOINED = re.compile(r"\\boxed.*(?:(?<!\w)(?:or|and|to|through|versus|vs\.?) (?!rather)|[,;])")
_LEADS = re.compile(
    r"(?:^|(?<![!<>≠≤≥~±?])=|[⇒→≈]|\\(?:implies|Rightarrow|therefore|approx)"
    r"|(?<![\d}\s])\s?[:：]|[a-zA-Z] \d{1,3}:|[^\W\d_][.!?)]|[.!?]\s+"
    r"|[^\W\d_]{2}[,;]|(?P<word>(?<!\\)(?<![^\W\d_])[^\W\d_]{2,}))$"
)
_LETTERS = "负負非不减減"  # minus, no


def _by_itself(before: str, box: str, after: str) -> str:
    """What is in a box; or, where that is part of something, what it is part of: for the box is no answer then."""
    opened, closed = _leads(before), _ends(after)
    if opened and closed:
        return box
    glued = bool(not opened and re.search(r"\w$|[\d.,})]\s?$", before)) or bool(re.match(r"\w|[.,]\d", after))
    if not re.fullmatch(r"[\d.,]+" if after[:1] in ("^", "!") else r"-?[\d.,]+", box):
        glued = glued or not (opened and after[:1].isspace())
    shown = "{" + box + "}" if glued else box
    said = ("" if opened else before) + shown + ("" if closed else re.split(r"[.;]\s", after, maxsplit=1)[0])
    return re.sub(r"(?<!\\)\$|\\[()\[\]]", "", said)


def _leads(before: str) -> bool:
    """Does what stands before a box on its line lead to it: words, an equals sign, nothing?"""
    clause = re.split(r"[.,;:!?]", before)[-1]
    if _DENIAL.search(clause) or _JOINED.search(before):
        return False
    stripped = _OPENERS.sub("", re.sub(r"(?: (?:the|a|an|be|equal to|exactly))+ *$", "", before))
    found = _LEADS.search(stripped if stripped[-1:] not in (".", "!", "?") else before[: len(stripped) + 1])
    if found is None or (stripped[-1:] in (",", ";") and before.count("(") > before.count(")")):
        return False
    word = found["word"]
    if word == "of":
        return _OF.search(stripped) is not None
    return word is None or (word.casefold() not in DENYING and word[-1] not in _LETTERS)


def _ends(after: str) -> bool:
    """Does nothing more belong to a box, by what stands behind it on its line?"""
    rest = after[_CLOSERS.match(after).end() :]  # type: ignore[union-attr]
    word = re.match(r"[,;:]\W{0,9}([^\W\d_]{2,})", rest)
    return (
        not rest or re.match(r"\.(?!\d|\.)|。", rest) is not None or (word is not None and word[1].casefold() not in DENYING)
    )


_DETERMINERS = re.compile(
    r"(?:(?:so|thus|and|the|an?|this|that|my|our|your|his|her|its|final|correct|right|exact|numerical|simplified|desired|required|"
    r"actual|complete|full|short|best)[\s*_]{1,3})+$",
    re.IGNORECASE,
)


def _behind_answer(text: str) -> str | None:
    """What stands behind "answer"; or the whole line, where that is not the answer (a wrong answer, not the answer)."""
    found = _last(_ANSWER, text)
    if found is None:
        return None
    before = text[max(0, found.start() - NEAR) : found.start()].rpartition("\n")[2]
    named = _DETERMINERS.search(before)
    rest = before[: named.start()] if named else before
    if _DENIAL.search(re.split(r"[.,;:!?]", rest)[-1]) or (not named and rest.rstrip()[-1:].isalnum()):
        return before + found[0]
    return _emphasised(found[1])


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
            answers = accepted_answers(cell)
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


def check_entries(cells: Iterable[str], where: str = "data.train has") -> None:
    """See that the tasks of reasoning-gym entries exist.

    Raises:
        UserError: one does not.
    """
    named = {task_of(entry) for cell in cells if (entry := reasoning_gym_entry(cell)) is not None}
    if named:
        from reasoning_gym.factory import DATASETS

        if unknown := sorted(named - DATASETS.keys()):
            raise UserError(
                f"{where} reasoning_gym entries of the task {json.dumps(unknown[0])[:80]}, which the installed "
                "reasoning-gym does not know. Leave them out, or install the version that made them."
            )
