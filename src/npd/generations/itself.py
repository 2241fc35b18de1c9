"""Teachers that are the student itself, or the weights below its adapters: what is held once is read with as either."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from npd.config import Config, TeacherConfig
from npd.models import Switchable
from npd.store import Store


def is_base(config: Config, key: str | None) -> bool:
    """Are a teacher's weights those below the adapters that the student trains?

    Follows from the configuration alone: whoever makes a part then reads with the student in the same way.
    """
    student, teacher = config.student, config.all_teachers[key]
    if not student.adapts or config.given_teachers[key].snapshot != "start" or teacher.server or teacher.kind:
        return False
    if not (config.given_teachers[key].is_student or student.adapter is not None):
        return False  # a teacher that is named by its path is its own, as it always was
    names = ("model", "revision", "dtype", "attention", "trust_remote_code", "adapter")
    return all(getattr(teacher, name) == getattr(student.base, name) for name in names)


def follows_snapshots(config: Config, key: str | None) -> bool:
    """Is a teacher, in each generation, the snapshot that wrote it?"""
    given = config.given_teachers[key]
    return given.is_student and given.snapshot == "latest"


def itself(config: Config, key: str | None) -> str | None:
    """In words, who a teacher is that is the student itself; None where it is another."""
    if not config.given_teachers[key].is_student:
        return None
    return "each generation's own snapshot" if follows_snapshots(config, key) else "the student as it started"


class BelowAdapters:
    """A teacher's weights, held as the student's base (`npd.scoring.Held`)."""

    def __init__(self, held: Callable[[], Switchable]) -> None:
        self._held = held

    def model(self) -> PreTrainedModel:
        return self._held().base

    def reading(self) -> AbstractContextManager[None]:
        return self._held().without()


class OfSnapshot:
    """A teacher's weights, held as the student of a snapshot (`npd.scoring.Held`)."""

    def __init__(self, student: Callable[[], PreTrainedModel]) -> None:
        self.model = student

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()


def settled(config: Config, store: Store) -> Config:
    """A configuration whose teachers name weights of their own where they were the student itself: those of a run's first
    snapshot, or of its newest; of a run that has none yet, the student's as it starts."""

    def of(teacher: TeacherConfig) -> TeacherConfig:
        if not teacher.is_student:
            return teacher
        own, versions = teacher.of_student(config.student), store.policies()
        if versions:
            path = store.policy(versions[-1 if teacher.snapshot == "latest" else 0])
            own = own.model_copy(update={"model": str(path), "revision": None, "adapter": None})
        return own.model_copy(update={"snapshot": "start"})

    teacher = None if config.teacher is None else of(config.teacher)
    return config.model_copy(
        update={"teacher": teacher, "teachers": {key: of(each) for key, each in config.teachers.items()}}
    )
