"""Does a response hold the right answer? Verifiers, for rollouts, evaluation and rewards alike.

Responses are untrusted text: what is done here to one takes time linear in its length, and verifiers of others' making run in
a process of their own, within bounds (`npd.verifying`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from npd.answers import OPEN, extract_answer, final_answer, is_marked, marked_answer, same_answer, without_thoughts
from npd.errors import UserError
from npd.prompts import accepted_answers, reasoning_gym_entry
from npd.verifying import Judge, Unjudged

__all__ = ["Verifier", "Verify", "check_entries", "extract_answer", "is_correct", "is_marked", "pass_at_k"]


def is_correct(response: str, answer: str | list[str]) -> bool:
    """Compare a response's final answer with the right one, as `npd.answers` does; nothing is right where that is empty.

    Args:
        answer: an answer, or several, of which any is right; of a solution with a box or GSM8K's #### what is marked.
    """
    said, marked = final_answer(response)
    return any(same_answer(said, reference(one), marked) for one in ([answer] if isinstance(answer, str) else answer))


def reference(answer: str) -> str:
    """What a row says is right, which data may give as a whole solution."""
    lines = answer.strip().splitlines()
    worked = "\\boxed" in answer or (lines and lines[-1].startswith("#### "))
    return (marked_answer(answer) or answer) if worked else answer


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
            return float(is_correct(text, answers)) if answers else None
        return self.task(text, task_of(entry), {}, entry)

    def task(self, text: str, name: str, options: dict[str, Any], entry: dict[str, Any]) -> float | None:
        """As above, by the verifier of a reasoning-gym task with these options, for an entry of it."""
        whole = "\n" in str(entry["answer"]) and OPEN not in text
        said = without_thoughts(text).strip() if whole else extract_answer(text).rstrip(".")
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
