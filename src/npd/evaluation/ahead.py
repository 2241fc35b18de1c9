"""Is there anything to learn from the teacher? What the first evaluation says of it and of the references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from npd.intervals import wilson_interval
from npd.prompts import ENTRY, Prompts, accepted_answers, verifiable
from npd.verifiers import is_correct

ASKED = 1000
"""References that are judged, at most."""

Share = tuple[float, float, float]
"""A share, and the ends of its 95% interval."""


def surely_above(one: Share, other: Share) -> bool:
    """Is the whole 95% interval of the difference above 0? (Newcombe's, from two Wilson intervals; 1998)"""
    return one[0] - other[0] > math.hypot(one[0] - one[1], other[2] - other[0])


def references_right(prompts: Prompts, tokenizer: Any) -> Share | None:
    """How many of the data's completions the `answer` beside them calls right; None where no row has both.

    Rows that a verifier of reasoning-gym judges are left out: they are no task `answer`.
    """
    table = prompts.table.select(["completion_ids", "answer"])
    answered = pc.and_not(verifiable(table["answer"]), pc.fill_null(pc.starts_with(table["answer"], ENTRY), False))
    table = table.filter(pc.and_(pc.is_valid(table["completion_ids"]), answered)).slice(0, ASKED)
    if not len(table):
        return None
    texts = tokenizer.batch_decode(table["completion_ids"].to_pylist(), skip_special_tokens=True)
    right = [
        any(is_correct(text, answer) for answer in accepted_answers(cell))
        for text, cell in zip(texts, table["answer"].to_pylist(), strict=True)
    ]
    share = sum(right) / len(right)
    return share, *wilson_interval(share, len(right))


def notes(student: Mapping[str, float], teacher: Mapping[str, float], references: Share | None) -> list[str]:
    """What to think of before training, from figures eval/TASK/accuracy of the student and teacher/TASK/accuracy.

    `references` are of `answer` alone.
    """
    said = []
    for name in student:
        task = name.removeprefix("eval/").removesuffix("/accuracy")
        if name != f"eval/{task}/accuracy" or f"teacher/{task}/accuracy" not in teacher:
            continue
        mine, its = (_share(figures, f"{who}/{task}") for figures, who in ((student, "eval"), (teacher, "teacher")))
        if not surely_above(its, mine):
            said.append(
                f"The teacher solves {its[0]:.1%} of {task} and the student, as it starts, {mine[0]:.1%}: it is not ahead by "
                "more than chance explains, so there is little on this task to distil. Ask more problems, choose another "
                "teacher, or train on references that are right (`npd sft`, schedule.references)."
            )
        if task == "answer" and references is not None and surely_above(references, its):
            said.append(
                f"The references of data.train are right in {references[0]:.1%} of {task}, the teacher in {its[0]:.1%}: what "
                "it does not know they can teach. schedule.references mixes them in, `npd sft` learns from them alone."
            )
    return said


def _share(figures: Mapping[str, float], name: str) -> Share:
    value = figures[f"{name}/accuracy"]
    return value, figures.get(f"{name}/accuracy_low", value), figures.get(f"{name}/accuracy_high", value)
