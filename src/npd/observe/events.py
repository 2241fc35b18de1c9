"""Spans: what each process did when."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npd.store import explained_full_disk


class Events:
    """Appends {name, start, end, process, ...} to events.jsonl; times in seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        start, began = time.time(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            line = {"name": name, "start": start, "end": start + seconds, "process": os.getpid(), **facts}
            # One write, so that lines of two processes never mix.
            with explained_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def seconds_by_name(path: Path) -> dict[str, float]:
    """Seconds per span name over all processes and restarts of a run."""
    totals: dict[str, float] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            totals[event["name"]] = totals.get(event["name"], 0.0) + event["end"] - event["start"]
    return totals
