"""events.jsonl."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

from npd.errors import NpdError
from npd.records.record import Record, number_of

TRACEBACK_LINES = 60  # kept of a failure that npd has no explanation for


@dataclass(frozen=True)
class Span:
    """What a thread of a process did from `start` to `end`, seconds since the epoch; a mark is a moment."""

    name: str
    start: float
    end: float
    role: str = "trainer"
    process: int = 0
    thread: str = "MainThread"
    facts: dict[str, Any] = field(default_factory=dict)
    """Further keys: generation, part, ..."""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def to_json(self) -> dict[str, Any]:
        where = {"role": self.role, "process": self.process, "thread": self.thread}
        return {"name": self.name, "start": self.start, "end": self.end, **where, **self.facts}


def as_span(raw: Any) -> Span | None:
    """What a line of events.jsonl holds; None if it has no name, or no times a clock can have."""
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        return None
    start, end = number_of(raw.get("start")), number_of(raw.get("end"))
    if not 0 <= start <= end < 1e11:
        return None
    process = raw.get("process")
    known = ("name", "start", "end", "role", "process", "thread")
    return Span(
        raw["name"],
        start,
        end,
        str(raw.get("role", "trainer")),
        process if type(process) is int else 0,
        str(raw.get("thread", "MainThread")),
        {key: value for key, value in raw.items() if key not in known},
    )


@dataclass(frozen=True)
class Failure(Record):
    """The facts of a `failed` mark."""

    error: str
    """The exception's type."""
    message: str
    explained: bool
    """Does the message say how to mend it?"""
    blames: str = ""
    """The role whose failure this one only tells of."""
    traceback: str = ""
    """The end of it, where nothing is explained."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        if isinstance(error, NpdError):
            return cls(type(error).__name__, str(error), True, error.role or "")
        lines = "".join(traceback.format_exception(error)).splitlines()
        return cls(type(error).__name__, str(error), False, traceback="\n".join(lines[-TRACEBACK_LINES:]))
