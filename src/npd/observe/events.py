"""Spans: what each process did when."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from npd.errors import NpdError
from npd.store import explained_full_disk, json_lines

TRACEBACK_LINES = 60
MARKS = ("started", "ended", "failed")  # of a command's work on a run: not spans, but moments


class Events:
    """Appends {name, start, end, role, process, thread, ...} to events.jsonl; times in seconds since the epoch.

    `role` says what the process is for: trainer (of several processes the first; the others are trainer-1, ...), refresh-0,
    ... . Spans of a thread may lie inside each other.
    """

    def __init__(self, path: Path, role: str = "trainer") -> None:
        self.path, self.role = path, role

    @contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        start, began = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self.write(name, start, start + time.perf_counter() - began, **facts)

    def write(self, name: str, start: float, end: float, **facts: Any) -> None:
        """A span whose times are known."""
        where = {"role": self.role, "process": os.getpid(), "thread": threading.current_thread().name}
        line = {"name": name, "start": start, "end": end, **where, **facts}
        # One write, so that lines of two processes never mix.
        with explained_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_events(path: Path, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Every whole line, or those of one name; what a crash cut short, or is no span, is left out."""
    start = "" if name is None else f'{{"name": "{name}",'
    return (span for line in json_lines(path, start) if (span := as_span(line)) is not None)


def as_span(event: Any) -> dict[str, Any] | None:
    """A line with all that `Events` writes; None if it has no name, or no times a clock can have."""
    if not isinstance(event, dict) or not isinstance(event.get("name"), str):
        return None
    start, end = number_of(event.get("start")), number_of(event.get("end"))
    if not 0 <= start <= end < 1e11:
        return None
    process = event.get("process")
    where = {"role": str(event.get("role", "trainer")), "thread": str(event.get("thread", "MainThread"))}
    return event | where | {"process": process if isinstance(process, int) else 0}


def number_of(value: Any) -> float:
    """A figure as a line has it; NaN for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def own_seconds(spans: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds per span name of one thread's spans, each without the spans inside it, so that they add up."""
    totals: defaultdict[str, float] = defaultdict(float)
    around: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda s: (s["start"], -s["end"])):
        while around and around[-1]["end"] <= span["start"]:
            around.pop()
        seconds = span["end"] - span["start"]
        totals[span["name"]] += seconds
        if around:
            totals[around[-1]["name"]] -= min(seconds, around[-1]["end"] - span["start"])
        around.append(span)
    return dict(totals)


def seconds_by_role(source: Path | Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Role -> span name -> seconds, over all restarts of a run; `wall` is from a process's first span to its last, and time
    in which two processes of a role work counts once.

    What other threads do beside a process's work is not in its sum.
    """
    processes: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    extents: dict[tuple[str, int, int], tuple[float, float]] = {}
    starts: Counter[tuple[str, int]] = Counter()
    events = read_events(source) if isinstance(source, Path) else source
    for event in sorted(events, key=lambda e: (e["start"], e["name"] != "started")):
        process = event.get("role", "trainer"), event["process"]
        starts[process] += event["name"] == "started"  # a number that another process had before, as in a container
        if event.get("thread", "MainThread") == "MainThread" and event["name"] not in MARKS:
            processes[process].append(event)
            key = *process, starts[process]
            start, end = extents.get(key, (event["start"], event["end"]))
            extents[key] = start, max(end, event["end"])
    roles: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (role, _), spans in processes.items():
        for name, seconds in own_seconds(spans).items():
            roles[role][name] += seconds
    until: dict[str, float] = {}
    for (role, *_), (start, end) in sorted(extents.items(), key=lambda item: item[1]):
        roles[role]["wall"] += max(0.0, end - max(start, until.get(role, start)))
        until[role] = max(end, until.get(role, end))
    return {role: dict(seconds) for role, seconds in roles.items()}


def failure_facts(error: BaseException) -> dict[str, object]:
    """What a `failed` event says: the kind of error, its message, whether npd explains it, and the end of its traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    explained = isinstance(error, NpdError)
    facts: dict[str, object] = {"error": type(error).__name__, "message": str(error), "explained": explained}
    return facts if explained else facts | {"traceback": "\n".join(lines[-TRACEBACK_LINES:])}


def mark(events: Events, name: str, **facts: object) -> None:
    """A moment of a command's work, on record if that is possible."""
    now = time.time()
    with suppress(OSError, NpdError):  # a full disk, of which there will be a better message
        events.write(name, now, now, **facts)
