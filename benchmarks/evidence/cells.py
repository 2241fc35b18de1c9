"""A cell: one arm of one task with one seed, run from the seed's warm student, and the figures that it leaves.

Seconds are the processor's, of this process with all its threads, without evaluation: on a machine that others use as well,
they say what a run costs, and wall-clock does not. Both are kept.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common import machine
from benchmarks.evidence.arms import AT_SECONDS, EVERY_ARM, Arm
from benchmarks.evidence.grpo import PREFIX, STEPS, reinforce
from benchmarks.evidence.problems import verified
from benchmarks.evidence.tasks import QUIET, Shelf, Task, asked, config_of
from benchmarks.evidence.verified import ByVerifier
from npd import models, run
from npd.config import Config
from npd.records import KEPT, EvaluationLine, SelectionLine
from npd.result import DistillResult
from npd.store import Store, sha256

TEACHER = "teacher"
"""The cell of the teacher itself, on the seed's held-out problems."""


@dataclass(frozen=True, order=True)
class Cell:
    task: str
    arm: str
    seed: int

    @classmethod
    def named(cls, name: str) -> Cell:
        task, arm, seed = name.split("/")
        return cls(task, arm, int(seed))

    def __str__(self) -> str:
        return f"{self.task}/{self.arm}/{self.seed}"


class Results:
    """What cells left: a file of JSON lines a task, one a cell, sorted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[Cell, dict[str, Any]]:
        entries = [json.loads(line) for file in sorted(self.folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
        return {Cell(entry["task"], entry["arm"], entry["seed"]): entry for entry in entries}

    def write(self, entry: dict[str, Any]) -> None:
        """Add a cell, or put it in the place of its like."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{entry['task']}.jsonl"
        with locked(self.folder / ".lock"):
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            others = [one for one in lines if (one["arm"], one["seed"]) != (entry["arm"], entry["seed"])]
            lines = sorted([*others, entry], key=lambda one: (one["arm"], one["seed"]))
            aside = file.with_suffix(".new")
            aside.write_text("".join(json.dumps(one) + "\n" for one in lines))
            aside.replace(file)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Alone among the processes that work on the study."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Is this process the only one that has it? It does not wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def measure(cell: Cell, task: Task, shelf: Shelf) -> dict[str, Any]:
    """Run a cell; its entry."""
    with locked(shelf.folder / "lock" / task.family):
        teacher = shelf.teacher(task)
    with locked(shelf.folder / "lock" / f"{cell.task}-{cell.seed}"):
        home = shelf.warm(cell.task, task, cell.seed)
    start = sha256(home / "run/student/model.safetensors")[:16]
    about = {"task": cell.task, "arm": cell.arm, "seed": cell.seed, "start": start}
    if cell.arm == TEACHER:
        figures = evaluated(task, home, teacher, teacher, cell.seed)
        return about | {"curve": [{"step": 0, "cpu_seconds": 0.0} | figures]} | stamp()
    if cell.arm.startswith(PREFIX):
        return about | reinforced(cell, task, shelf, home, teacher) | stamp()
    arm = EVERY_ARM[cell.arm.removesuffix(AT_SECONDS)]
    steps = round(task.steps * arm.pace) if cell.arm.endswith(AT_SECONDS) else task.steps
    folder = shelf.folder / "cells" / str(cell)
    shutil.rmtree(folder, ignore_errors=True)
    config = configured(arm, task, home, folder, cell.seed, teacher, steps)
    ByVerifier.judged = judge_of(task, home)
    begun, wall = time.process_time(), time.monotonic()
    result: DistillResult = getattr(run, arm.command)(config, display=QUIET)
    ended, wall = time.process_time(), time.monotonic() - wall
    curve, evaluating = curve_of(result, begun)
    entry = about | {
        "steps": result.steps,
        "budget": steps,
        "tokens": result.tokens,
        "cpu_seconds": ended - begun - evaluating,
        "wall_seconds": wall - result.by_role["trainer"].get("evaluate", 0.0),
        "stages": result.by_role["trainer"],
        "curve": curve,
        **generated(result, task, home),
    }
    shutil.rmtree(folder, ignore_errors=True)
    return entry | stamp()


def reinforced(cell: Cell, task: Task, shelf: Shelf, home: Path, teacher: Path) -> dict[str, Any]:
    """What a `grpo-ARM` cell leaves: its arm's student before and after."""
    arm = EVERY_ARM[cell.arm.removeprefix(PREFIX)]
    folder = shelf.folder / "cells" / str(cell)
    shutil.rmtree(folder, ignore_errors=True)
    config = configured(arm, task, home, folder, cell.seed, teacher, task.steps, unseen=True)
    getattr(run, arm.command)(config, display=QUIET)
    before = evaluated(task, home, folder / "student", teacher, cell.seed)
    steps = min(STEPS, task.steps)
    model, figures = reinforce(folder, task.family, task.kind.new_tokens, cell.seed, steps)
    after = evaluated(task, home, model, teacher, cell.seed)
    shutil.rmtree(folder, ignore_errors=True)
    points = [{"step": 0, "cpu_seconds": 0.0} | before, {"step": steps, "cpu_seconds": figures["cpu_seconds"]} | after]
    return {"steps": steps, "budget": steps, **figures, "curve": points}


def stamp() -> dict[str, Any]:
    about = machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {key: about[key] for key in ("processor", "cores", "versions", "load")},
    }


def configured(
    arm: Arm, task: Task, home: Path, folder: Path, seed: int, teacher: Path, steps: int, *, unseen: bool = False
) -> Config:
    """The configuration of an arm's run; `unseen`: without evaluations on the way."""
    sections = arm.sections(task) | {
        "student": {"model": str(home / "run/student")},
        "teacher": {"model": str(teacher)},
    }
    for section, options in asked(task, home, steps, every_passes=arm.every).items():
        sections[section] = options | sections.get(section, {})
    sections["data"]["train"] = str(home / ("solved.jsonl" if arm.solved else "prompts.jsonl"))
    if unseen:
        sections["evaluation"] = {"tasks": [], "kl_prompts": 0}
    sections["training"] = {"max_steps": steps} | sections.get("training", {})
    return config_of(task, folder, seed, **sections)


def curve_of(result: DistillResult, begun: float) -> tuple[list[dict[str, float]], float]:
    """The figures of each evaluation, after so many steps and seconds of the processor; and the seconds of evaluation."""
    curve, spent = [], 0.0
    for line in Store(result.run_dir).read_metrics():
        if isinstance(line, EvaluationLine):
            now = plain(line.figures)
            began, ended = now.pop("cpu_begun"), now.pop("cpu_ended")
            curve.append({"step": line.step, "cpu_seconds": round(began - begun - spent, 3)} | now)
            spent += ended - began
    return curve, spent


def evaluated(task: Task, home: Path, model: Path, teacher: Path, seed: int) -> dict[str, float]:
    """Figures of a model on the held-out problems."""
    sections = asked(task, home) | {"student": {"model": str(model)}, "teacher": {"model": str(teacher)}}
    sections["data"]["train"] = str(home / "prompts.jsonl")
    config = config_of(task, home / "evaluation", seed, **sections)
    return plain(run.evaluate(config, str(model), display=QUIET)[1])


def plain(figures: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/verified/"): round(value, 5) for name, value in figures.items()}


def judge_of(task: Task, home: Path) -> Any:
    """A function from a part's responses to whether they are right."""
    tokenizer = models.load_tokenizer(
        config_of(task, home, 0, student={"model": str(home / "run/student")}, data={"train": ""}).student
    )
    rows = [json.loads(line) for line in (home / "prompts.jsonl").read_text().splitlines()]
    checks = {row["prompt"]: row.get("answer", "") for row in rows}

    def judge(table: pa.Table) -> list[bool]:
        prompts, texts = (
            tokenizer.batch_decode(table[name].to_pylist(), skip_special_tokens=True)
            for name in ("prompt_ids", "response_ids")
        )
        return [verified(task.family, checks[prompt], text) for prompt, text in zip(prompts, texts, strict=True)]

    return judge


def generated(result: DistillResult, task: Task, home: Path) -> dict[str, Any]:
    """Tokens written by student and teacher, and, of the generations that are still there, how right the filter was."""
    store, judge = Store(result.run_dir), judge_of(task, home)
    written: dict[int, float] = {}
    for line in store.read_metrics():
        if isinstance(line, SelectionLine):
            written[line.generation] = line.figures["selection/response_tokens"]
    rows = kept = right = right_kept = references = 0
    for file in sorted(result.run_dir.glob("generations/*/manifest.json")):
        index = json.loads(file.read_text())["generation"]
        manifest = store.manifest(index)
        assert manifest is not None
        tokens = manifest.response_tokens or 0
        if "reference" in manifest.selection.verdicts:
            references += tokens
            continue
        written.setdefault(index, tokens)
        for part in sorted(store.parts(index)):
            table = store.read_part(index, part, ["prompt_ids", "response_ids", "verdict"])
            for good, verdict in zip(judge(table), table["verdict"].to_pylist(), strict=True):
                rows, kept, right = rows + 1, kept + (verdict in KEPT), right + good
                right_kept += good and verdict in KEPT
    filtered = {"rows": rows, "kept": kept, "right": right, "right_kept": right_kept} if rows else None
    return {"generated": {"student": sum(written.values()), "references": references}, "filter": filtered}


__all__ = ["TEACHER", "Cell", "Results", "measure"]
