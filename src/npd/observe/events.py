"""Spans: what each process did when."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from npd.errors import NpdError
from npd.records import Failure, Span, as_span
from npd.store import append_line, json_lines


class SpanName(StrEnum):
    """What is done, as events.jsonl names it."""

    LOAD = "load"
    PART = "part"
    """A part from scoring to its file; of references, from the first token."""
    GENERATE = "generate"
    SCORE = "score"
    STORE = "store"
    FINISH = "finish"
    """A generation's manifest."""
    CHECK = "check"
    """An engine against transformers; `engine` is a moment with what came of it."""
    ENGINE = "engine"
    VERIFY = "verify"
    WAIT = "wait"
    TRAIN = "train"
    CHECKPOINT = "checkpoint"
    PUBLISH = "publish"
    """Training stands still for a snapshot; `write` is how long it takes beside."""
    WRITE = "write"
    EVALUATE = "evaluate"
    SAVE = "save"
    MIRROR = "mirror"
    """Files copied to checkpoint.mirror, beside the training: `files`, `bytes`, `deleted`, and `lag`, the most seconds that
    one had been there before."""
    RESTART = "restart"
    """Of a background worker that died."""
    WARNING = "warning"
    """A moment: what a person should know of a run, as `text`, and in a word what it is `about`."""
    STARTED = "started"
    ENDED = "ended"
    FAILED = "failed"


MARKS = (SpanName.STARTED, SpanName.ENDED, SpanName.FAILED)
"""Of a command's work on a run: not spans, but moments."""


class Events:
    """Appends {name, start, end, role, process, thread, ...} to events.jsonl; times in seconds since the epoch.

    `role` says what the process is for: trainer (of several processes the first; the others are trainer-1, ...), refresh-0,
    ... . Spans of a thread may lie inside each other.
    """

    def __init__(self, path: Path, role: str = "trainer") -> None:
        self.path, self.role = path, role

    @contextmanager
    def span(self, name: SpanName, **facts: Any) -> Iterator[None]:
        """Around what is done, whether it succeeds or not."""
        start, began = time.time(), time.perf_counter()

        def write() -> None:
            self.write(name, start, start + time.perf_counter() - began, **facts)

        try:
            yield
        except BaseException:
            with suppress(OSError, NpdError):  # what went wrong first is what is told
                write()
            raise
        write()

    def write(self, name: SpanName, start: float, end: float, *, process: int | None = None, **facts: Any) -> None:
        """A span whose times are known, of this process or of another one."""
        thread = threading.current_thread().name
        span = Span(name, start, end, self.role, os.getpid() if process is None else process, thread, facts)
        append_line(self.path, span.to_json())

    def mark(self, name: SpanName, **facts: Any) -> None:
        """A moment of a command's work, on record if that is possible."""
        now = time.time()
        with suppress(OSError, NpdError):  # a full disk, of which there will be a better message
            self.write(name, now, now, **facts)

    def failed(self, error: BaseException, **facts: Any) -> None:
        """Put on record what a command's work failed with."""
        self.mark(SpanName.FAILED, **facts, **Failure.of(error).to_json())


def read_events(path: Path, name: SpanName | None = None) -> Iterator[Span]:
    """Every whole line, or those of one name; what a crash cut short, or is no span, is left out."""
    start = "" if name is None else f'{{"name": "{name}",'
    return (span for line in json_lines(path, start) if (span := as_span(line)) is not None)


def own_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds per span name of one thread's spans, each without the spans inside it, so that they add up."""
    totals: defaultdict[str, float] = defaultdict(float)
    around: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while around and around[-1].end <= span.start:
            around.pop()
        totals[span.name] += span.seconds
        if around:
            totals[around[-1].name] -= min(span.seconds, around[-1].end - span.start)
        around.append(span)
    return dict(totals)


def seconds_by_role(source: Path | Iterable[Span]) -> dict[str, dict[str, float]]:
    """Role -> span name -> seconds, over all restarts of a run; `wall` is from a process's first span to its last, and time
    in which two processes of a role work counts once.

    What other threads do beside a process's work is not in its sum.
    """
    processes: defaultdict[tuple[str, int], list[Span]] = defaultdict(list)
    extents: dict[tuple[str, int, int], tuple[float, float]] = {}
    starts: Counter[tuple[str, int]] = Counter()
    spans = read_events(source) if isinstance(source, Path) else source
    for span in sorted(spans, key=lambda s: (s.start, s.name != SpanName.STARTED)):
        process = span.role, span.process
        starts[process] += span.name == SpanName.STARTED  # a number that another process had before, as in a container
        if span.thread == "MainThread" and span.name not in MARKS:
            processes[process].append(span)
            key = *process, starts[process]
            start, end = extents.get(key, (span.start, span.end))
            extents[key] = start, max(end, span.end)
    roles: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (role, _), mine in processes.items():
        for name, seconds in own_seconds(mine).items():
            roles[role][name] += seconds
    until: dict[str, float] = {}
    for (role, *_), (start, end) in sorted(extents.items(), key=lambda item: item[1]):
        roles[role]["wall"] += max(0.0, end - max(start, until.get(role, start)))
        until[role] = max(end, until.get(role, end))
    return {role: dict(seconds) for role, seconds in roles.items()}
