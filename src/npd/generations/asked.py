"""What a run asks of its teachers besides reading, and by which means: so that it can be refused before anything begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from npd.config import Config
from npd.evaluation import Benchmark
from npd.registry import ENGINES


class Writing(NamedTuple):
    """Options that have somebody write, as the fields of `npd.scoring.Question`; empty: nothing does."""

    writes: str = ""
    files: str = ""
    lends: str = ""


def of_teacher(config: Config, key: str | None, tasks: Sequence[Benchmark], here: str, *, refreshes: bool) -> Writing:
    """Of a teacher by its key in `Config.all_teachers`, in a command that trains.

    Args:
        here: the engine that writes in the trainer's process.
        refreshes: does the student write generations? Else its snapshots are no teacher's weights.
    """
    references = config.data.references == "teacher" and (not refreshes or config.schedule.references > 0)
    asked = config.evaluation.teacher and key is None and bool(tasks)
    writes = "data.references: teacher" if references else "evaluation.teacher" if asked else ""
    lent = next((task for task in tasks if task.borrows), None) if asked else None
    lends = lent.borrows if lent is not None else ""
    if refreshes and config.given_teachers[key].is_student:  # a snapshot, which is a directory
        return Writing(writes, "", lends)
    engines = [config.rollout.engine] if references and refreshes else []
    engines += [here] if asked or (references and not refreshes) else []
    reading = next((engine for engine in engines if ENGINES[engine].reads_files), None)
    if reading is not None:
        return Writing(writes, f"rollout.engine {reading}", lends)
    return Writing(writes, lends if lent is not None and lent.files else "", lends)


def of_student(config: Config, tasks: Sequence[Benchmark], here: str, *, compared: bool) -> str:
    """The option by which a student that is evaluated by itself is taken as a directory; nothing where it is not.

    Args:
        compared: is the KL to the teachers measured, on what the student writes?
    """
    writes = compared or any(not task.borrows for task in tasks)
    if writes and ENGINES[here].reads_files:
        return f"rollout.engine {here}"
    return next((task.borrows for task in tasks if task.borrows and task.files), "")
