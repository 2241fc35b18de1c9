"""Which cells there are, in the order in which they are run: what decides comes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.evidence.arms import ABLATIONS, ARMS, timed
from benchmarks.evidence.cells import TEACHER, Cell
from benchmarks.evidence.grpo import GRPO_ARMS
from benchmarks.evidence.hypotheses import ABLATED, ALL, RL
from benchmarks.evidence.tasks import TASKS

STRICT = "strict"
VARIANT_ARMS = ("sft", "kd-sequence", "npd-none")
"""Of tasks that differ from another one in the student alone: those that hypotheses ask for."""
FEW = 3
"""Seeds that come before the others, with everything."""


def cells(seeds: int) -> list[Cell]:
    """Every cell, each once. Teachers' cells come first: they make the seeds' warm students, which other cells wait for."""
    few = range(min(FEW, seeds))
    variants = [task for task in TASKS if task not in ALL]
    return [
        *(Cell(task, TEACHER, seed) for seed in few for task in _dear_first([*ALL, *variants])),
        *(Cell(task, arm, seed) for seed in few for arm in ARMS if arm != STRICT for task in _dear_first(ALL)),
        *(Cell(task, timed(arm), seed) for seed in few for arm in ARMS if timed(arm) != arm for task in _dear_first(ALL)),
        *(Cell(task, arm, seed) for seed in few for arm in VARIANT_ARMS for task in variants),
        *(Cell(task, arm, seed) for seed in few for arm in GRPO_ARMS for task in RL),
        *(Cell(task, STRICT, seed) for seed in few for task in _dear_first(ALL)),
        *(Cell(task, arm, seed) for seed in few for arm in _with_timed(ABLATIONS) for task in ABLATED),
        *(
            Cell(task, arm, seed)
            for seed in range(FEW, seeds)
            for arm in (TEACHER, *(name for name in _with_timed(ARMS) if name != STRICT))
            for task in _dear_first(ALL)
        ),
        *(Cell(task, arm, seed) for seed in range(FEW, seeds) for arm in GRPO_ARMS for task in RL),
        *(Cell(task, STRICT, seed) for seed in range(FEW, seeds) for task in _dear_first(ALL)),
        *(Cell(task, arm, seed) for seed in range(FEW, seeds) for arm in _with_timed(ABLATIONS) for task in ABLATED),
    ]


def _with_timed(arms: Iterable[str]) -> list[str]:
    """Each, and behind it what stands for it at equal seconds."""
    return [name for arm in arms for name in sorted({arm, timed(arm)})]


def _dear_first(tasks: Sequence[str]) -> list[str]:
    """Those that take longest first, so that processes side by side end together."""
    order = ("chains", "sums-strong", "sums", "coins-large", "coins", "sorting", "mixed", "palindromes")
    return sorted(tasks, key=order.index)
