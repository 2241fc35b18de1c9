"""Spans: what each process did when."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npd.store import explained_full_disk

MARKS = ("started", "ended", "failed")  # of a command's work on a run: not spans, but moments


class Events:
    """Appends {name, start, end, role, process, thread, ...} to events.jsonl; times in seconds since the epoch.

    `role` says what the process is for: trainer, refresh-0, ... . Spans of a thread may lie inside each other.
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
    """Every whole line, or those of one name; one that a crash cut short is left out."""
    start = "{" if name is None else f'{{"name": "{name}",'
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.startswith(start):
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


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
    """Role -> span name -> seconds, over all restarts of a run; `wall` is from a process's first span to its last.

    What other threads do beside a process's work is not in its sum.
    """
    processes: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in read_events(source) if isinstance(source, Path) else source:
        if event.get("thread", "MainThread") == "MainThread" and event["name"] not in MARKS:
            processes[event.get("role", "trainer"), event["process"]].append(event)
    roles: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (role, _), spans in processes.items():
        for name, seconds in own_seconds(spans).items():
            roles[role][name] += seconds
        roles[role]["wall"] += max(s["end"] for s in spans) - min(s["start"] for s in spans)
    return {role: dict(seconds) for role, seconds in roles.items()}
