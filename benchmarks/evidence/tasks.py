"""The tasks: a family of problems, a teacher, a student's size and how far it was warmed up.

Tasks that are `held_out` were not used to choose any setting of any arm: settings were chosen on the tuning tasks, and the
held-out ones run once with them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import chains
from benchmarks.evidence.problems import FAMILIES, Family, Problem, problems
from npd import run
from npd.config import Config, load_config
from npd.observe.display import Display
from npd.store import write_text

QUIET = Display(quiet=True)
LARGE, MIDDLE, SMALL = (128, 4), (96, 3), (64, 2)
"""Width and layers."""
ROW = 512
"""Tokens of a training row, or a sample's own if it may be longer: short samples fill such rows well."""


@dataclass(frozen=True)
class Training:
    """Plain training on worked references."""

    references: int
    """How many different ones."""
    steps: int
    """0: as benchmarks/chains.py trains its teacher."""
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4


@dataclass(frozen=True)
class Task:
    """What is learned, by whom, from whom."""

    family: str
    held_out: bool
    teacher: Training
    warm_up: Training
    size: tuple[int, int] = SMALL
    teacher_size: tuple[int, int] = MIDDLE
    prompts: int = 720
    batch_tokens: int = 2048
    """Of a step of every arm."""
    steps: int = 600
    """About forty passes over all prompts with their responses."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 3e-5
    """The rate falls along a cosine over an arm's steps: at a constant 3e-4, the second design's, 200 steps moved no arm by
    more than the noise, and at a constant 1e-3 every arm fell back (benchmarks/results/evidence/second, rate-1e-3).
    """
    asked: int = 500
    """Held-out problems."""

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family]


_SUMS = Task("sums", held_out=False, teacher=Training(20_000, 1600), warm_up=Training(1500, 1200), batch_tokens=2560)
_COINS = Task("coins", held_out=True, teacher=Training(20_000, 1200), warm_up=Training(800, 500), batch_tokens=2560)

TASKS: dict[str, Task] = {
    # tuning
    "sums": _SUMS,
    "chains": Task(
        "chains",
        held_out=False,
        teacher=Training(80_000, 0),
        warm_up=Training(8000, 1000),
        size=MIDDLE,
        teacher_size=LARGE,
        prompts=480,
        asked=300,
    ),
    "sorting": Task("sorting", held_out=False, teacher=Training(20_000, 800), warm_up=Training(2400, 600), batch_tokens=1792),
    "sums-strong": replace(_SUMS, warm_up=Training(20_000, 2000)),
    # held out
    "coins": _COINS,
    "mixed": Task("mixed", held_out=True, teacher=Training(20_000, 1000), warm_up=Training(4000, 800), batch_tokens=1024),
    "palindromes": Task(
        "palindromes", held_out=True, teacher=Training(20_000, 500), warm_up=Training(4000, 800), batch_tokens=896
    ),
    "coins-large": replace(_COINS, size=MIDDLE),
}


def shortened(task: Task) -> Task:
    """The same with tiny models and hardly any training, to try the machinery."""
    few = {"references": 64, "steps": 2}
    return replace(
        task,
        teacher=replace(task.teacher, **few),
        warm_up=replace(task.warm_up, **few),
        size=(32, 1),
        teacher_size=(32, 1),
        prompts=24,
        batch_tokens=512,
        steps=4,
        asked=16,
    )


class Shelf:
    """What cells share, made once and kept under a folder: teachers, data and warm students."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teacher(self, task: Task) -> Path:
        """Its model, trained when it is first asked for."""
        home = self.folder / "teachers" / task.family
        student = home / "run/student"
        if (student / "npd.json").exists():
            return student
        if not task.teacher.steps:
            chains.train_teacher(home)
            return student
        made = problems(task.family, task.teacher.references, "teacher", distinct=False)
        self._train(task, home, made, task.teacher, task.teacher_size, seed=0)
        return student

    def warm(self, name: str, task: Task, seed: int) -> Path:
        """Home of a task's seed: references.jsonl, prompts.jsonl, held-out.jsonl and run/student, the warm student.

        Prompts have their true references beside them, where there is one; who may read those is the arm's affair.
        """
        home = self.folder / "warm" / name / f"seed-{seed}"
        if (home / "run/student/npd.json").exists():
            return home
        counts = task.warm_up.references, task.prompts, task.asked
        made = problems(task.family, 3 * sum(counts) // 2, f"seed-{seed}")
        proper = [problem for problem in made if problem.check][: counts[0] + counts[2]]
        asked, references = proper[: counts[2]], proper[counts[2] :]
        prompts = made[made.index(proper[-1]) + 1 :][: task.prompts]
        strata = task.kind.has_strata
        write_rows(home / "prompts.jsonl", (row(p, source=strata) for p in prompts))
        write_rows(home / "solved.jsonl", (row(p, source=strata) for p in prompts if p.check))
        write_rows(home / "held-out.jsonl", (row(p, source=True) for p in asked))
        self._train(task, home, references, task.warm_up, task.size, seed)
        return home

    def _train(self, task: Task, home: Path, made: list[Problem], how: Training, size: tuple[int, int], seed: int) -> None:
        shutil.rmtree(home / "run", ignore_errors=True)
        write_rows(home / "references.jsonl", (row(p) for p in made if p.completion is not None))
        untrained(home / "untrained", task.kind, size, seed)
        config = config_of(
            task,
            home / "run",
            seed,
            student={"model": str(home / "untrained")},
            data={"train": str(home / "references.jsonl")},
            schedule={"passes": 100_000},
            packing={"length": task.kind.row},
            training={
                "batch_tokens": how.batch_tokens,
                "micro_batch_rows": max(1, 2048 // task.kind.row),
                "learning_rate": how.learning_rate,
                "final_learning_rate": how.final_learning_rate,
                "weight_decay": 0.01,
                "max_steps": how.steps,
            },
        )
        run.sft(config, display=QUIET)
        for left in ("checkpoints", "generations", "policy", "cache"):
            shutil.rmtree(home / "run" / left, ignore_errors=True)


def config_of(task: Task, run_dir: Path, seed: int, **sections: dict[str, Any]) -> Config:
    """What all runs of a task share, with a run's own options over it."""
    family = task.kind
    tree: dict[str, dict[str, Any]] = {
        "data": {"max_prompt_tokens": family.prompt_tokens},
        "rollout": {"max_new_tokens": family.new_tokens, "batch_size": 256, "part_size": 2048},
        "schedule": {"lead": 0.0},
        "packing": {"length": max(ROW, family.row)},
        "training": {
            "batch_tokens": task.batch_tokens,
            "micro_batch_rows": max(1, 4 * ROW // max(ROW, family.row)),
            "learning_rate": task.learning_rate,
            "final_learning_rate": task.final_learning_rate,
        },
        "checkpoint": {"every_steps": 100_000},
        "evaluation": {"tasks": [], "kl_prompts": 0},
        "tracking": {"trackers": [], "report": False},
    }
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options
    return load_config({"run_dir": str(run_dir), "seed": seed, "plugins": ["benchmarks.evidence.verified"]} | tree)


def asked(task: Task, home: Path, whole_from: int = 0, **evaluation: Any) -> dict[str, dict[str, Any]]:
    """Sections that make a run ask the held-out problems; from which step on see `Verified`."""
    one = {"name": "verified", "size": task.asked, "options": {"family": task.family, "whole_from": whole_from}}
    return {"evaluation": {"tasks": [one], "kl_prompts": 0} | evaluation, "data": {"eval": str(home / "held-out.jsonl")}}


def row(problem: Problem, *, source: bool = False) -> dict[str, str]:
    given = {"prompt": problem.prompt, "completion": problem.completion, "answer": problem.check or None}
    return {key: value for key, value in given.items() if value is not None} | ({"source": problem.stratum} if source else {})


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(one) + "\n" for one in rows))


def untrained(path: Path, family: Family, size: tuple[int, int], seed: int) -> None:
    chains.untrained(path, *size, seed, characters=family.characters)
