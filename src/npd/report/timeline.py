"""Spans as lanes of a timeline, and as a trace for chrome://tracing and Perfetto."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from npd.observe.events import MARKS
from npd.records import Span
from npd.report.output import check_output, write_output


class Stretch(NamedTuple):
    """A time in which a thread did one thing; seconds since the epoch."""

    name: str
    start: float
    end: float


def lanes(events: Iterable[Span]) -> dict[tuple[str, int, str], list[Span]]:
    """(role, process, thread) -> its spans in order of their start; the trainer's lanes first."""
    found: defaultdict[tuple[str, int, str], list[Span]] = defaultdict(list)
    for event in events:
        if event.name not in MARKS:
            found[event.role, event.process, event.thread].append(event)
    ordered = sorted(
        found, key=lambda k: (not k[0].startswith("trainer"), k[0], k[2] != "MainThread", min(e.start for e in found[k]))
    )
    return {key: sorted(found[key], key=lambda e: (e.start, -e.end)) for key in ordered}


def innermost(spans: list[Span]) -> list[Stretch]:
    """One thread's spans as stretches that do not overlap: at any time the innermost span counts."""
    out: list[Stretch] = []
    open_spans: list[tuple[str, float]] = []  # name and end
    at = 0.0

    def close(until: float) -> None:
        nonlocal at
        while open_spans and open_spans[-1][1] <= until:
            add(*open_spans.pop())
        if open_spans:
            add(open_spans[-1][0], until)

    def add(name: str, end: float) -> None:
        nonlocal at
        if end > at:
            out.append(Stretch(name, at, end))
            at = end

    for span in sorted(spans, key=lambda e: (e.start, -e.end)):
        close(span.start)
        at = max(at, span.start)
        # A clock that was set back may let a span end after the one around it; it then ends with that.
        open_spans.append((span.name, min(span.end, open_spans[-1][1]) if open_spans else span.end))
    close(float("inf"))
    return out


def coarser(stretches: list[Stretch], resolution: float) -> list[Stretch]:
    """Join what is too short to be seen: neighbours of one name less than `resolution` seconds apart, and then whatever
    remains shorter than that goes to its longest neighbour in the same resolution's time."""
    joined: list[Stretch] = []
    for s in stretches:
        if joined and joined[-1].name == s.name and s.start - joined[-1].end < resolution:
            joined[-1] = Stretch(s.name, joined[-1].start, s.end)
        else:
            joined.append(s)
    out: list[Stretch] = []
    group: list[Stretch] = []

    def flush() -> None:
        if group:
            totals: defaultdict[str, float] = defaultdict(float)
            for s in group:
                totals[s.name] += s.end - s.start
            out.append(Stretch(max(totals, key=totals.__getitem__), group[0].start, group[-1].end))
            group.clear()

    for s in joined:
        if group and (s.end - group[0].start > resolution or s.end - s.start >= resolution):
            flush()
        if s.end - s.start >= resolution:
            out.append(s)
        else:
            group.append(s)
    flush()
    return out


def chrome_trace(events: Iterable[Span]) -> dict[str, Any]:
    """Spans in the Trace Event Format: complete events ("X") in microseconds since the first, one track a thread.

    Marks such as `failed` are instants ("i"); further facts of a span are its `args`.
    """
    events = list(events)
    origin = min((event.start for event in events), default=0.0)
    processes: dict[tuple[str, int], int] = {}  # processes of two machines may have one number
    threads: dict[tuple[int, str], int] = {}
    trace: list[dict[str, Any]] = []

    def name(kind: str, pid: int, tid: int, text: str) -> None:
        trace.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}})

    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        role, process, thread = event.role, event.process, event.thread
        if (role, process) not in processes:
            processes[role, process] = len(processes) + 1
            name("process_name", processes[role, process], 0, f"{role} (process {process})")
        pid = processes[role, process]
        if (pid, thread) not in threads:
            threads[pid, thread] = len(threads) + 1
            name("thread_name", pid, threads[pid, thread], thread)
        entry: dict[str, Any] = {
            "name": event.name,
            "cat": role,
            "pid": pid,
            "tid": threads[pid, thread],
            "ts": (event.start - origin) * 1e6,
            "args": event.facts,
        }
        if event.name in MARKS:
            entry |= {"ph": "i", "s": "g"}
        else:
            entry |= {"ph": "X", "dur": max(0.0, event.seconds) * 1e6}
        trace.append(entry)
    return {"traceEvents": trace, "displayTimeUnit": "ms", "otherData": {"origin_seconds_since_epoch": origin}}


def write_trace(events: Iterable[Span], path: Path) -> int:
    """Write a trace file; the number of spans and marks in it.

    Raises:
        UserError: it cannot be written.
    """
    check_output(path, "trace.json")
    trace = chrome_trace(events)
    write_output(path, json.dumps(trace), "--trace")
    return sum(entry["ph"] != "M" for entry in trace["traceEvents"])
