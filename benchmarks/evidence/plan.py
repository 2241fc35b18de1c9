"""Which cells there are, in the order in which they are run: something that says something stands at any moment."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.evidence.arms import ABLATIONS, ARMS
from benchmarks.evidence.cells import TEACHER, Cell
from benchmarks.evidence.grpo import GRPO_ARMS
from benchmarks.evidence.hypotheses import ABLATED, ALL, RL
from benchmarks.evidence.tasks import TASKS

VARIANT_ARMS = ("sft", "kd-sequence", "kd-topk", "npd", "npd-none", "strict")
"""Of tasks that differ from another one in the student alone."""


def cells(seeds: int) -> list[Cell]:
    """Every cell, each once: two seeds of everything first, then the others seed by seed."""
    return list(dict.fromkeys([*_cells(range(min(2, seeds))), *(c for seed in range(2, seeds) for c in _cells([seed]))]))


def _cells(seeds: range | list[int]) -> Iterator[Cell]:
    for tasks in (("sums", "coins"), ALL):
        for seed in seeds:
            for task in tasks:
                yield from (Cell(task, arm, seed) for arm in (TEACHER, *ARMS))
    for seed in seeds:
        for task in TASKS:
            if task not in ALL:
                yield from (Cell(task, arm, seed) for arm in (TEACHER, *VARIANT_ARMS))
    for seed in seeds:
        for task in ABLATED:
            yield from (Cell(task, arm, seed) for arm in ABLATIONS)
    for seed in seeds:
        for task in RL:
            yield from (Cell(task, arm, seed) for arm in GRPO_ARMS)
