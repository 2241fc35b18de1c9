from __future__ import annotations

import json
import multiprocessing
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.observe.events import Events, SpanName, own_seconds, read_events, seconds_by_role
from npd.records import Span


def span(name: str, start: float, end: float, **where: Any) -> Span:
    return Span(name, start, end, **where)


def test_spans_inside_and_beside_each_other():
    spans = [
        span("generation", 0, 10),
        span("generate", 1, 4),
        span("score", 4, 9),  # right after it
        span("load", 5, 7),  # inside that
        span("generation", 12, 13),
        span("nothing", 13, 13),
    ]
    expected = {"generation": 10 - 3 - 5 + 1, "generate": 3, "score": 3, "load": 2, "nothing": 0}
    for order in (spans, spans[::-1]):  # a span is written when it ends
        assert own_seconds(order) == pytest.approx(expected)
    assert own_seconds([]) == {}


@st.composite
def nested(draw: st.DrawFn, start: float = 0, end: float = 100, depth: int = 3) -> list[Span]:
    """Spans within a time, as `with` blocks of one thread make them."""
    count = draw(st.integers(0, 3))
    times = sorted(draw(st.lists(st.floats(start, end), min_size=2 * count, max_size=2 * count)))
    spans = []
    for a, b in zip(times[::2], times[1::2], strict=True):
        inner = draw(nested(a, b, depth - 1)) if depth else []
        spans += [*inner, span(draw(st.sampled_from("abc")), a, b)]
    return spans


@given(nested())
def test_own_times_add_up_to_the_time_covered(spans):
    own, covered, until = own_seconds(spans), 0.0, -1.0
    for s in sorted(spans, key=lambda s: s.start):
        covered += max(0.0, s.end - max(s.start, until))
        until = max(until, s.end)
    assert sum(own.values()) == pytest.approx(covered, abs=1e-9)
    assert all(seconds >= -1e-9 for seconds in own.values())
    if spans:
        assert sum(own.values()) <= max(s.end for s in spans) - min(s.start for s in spans) + 1e-9


def test_torn_lines_are_left_out(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    events = Events(path)
    events.write(SpanName.TRAIN, 0, 1, note="line\nbreak")
    with path.open("a") as file:
        file.write('{"name": "b", "sta\n\n')
    events.write(SpanName.WAIT, 1, 2)
    with path.open("a") as file:
        file.write('{"name": "d"')
    assert [event.name for event in read_events(path)] == ["train", "wait"]
    assert own_seconds(read_events(path)) == {"train": 1, "wait": 1}


def test_a_span_is_written_when_its_block_fails(tmp_path: Path):
    events = Events(tmp_path / "events.jsonl", "refresh-1")
    with pytest.raises(ZeroDivisionError), events.span(SpanName.PART), events.span(SpanName.SCORE, part=3):
        raise ZeroDivisionError
    inner, outer = read_events(events.path)
    assert (inner.name, inner.facts, inner.role, inner.thread) == ("score", {"part": 3}, "refresh-1", "MainThread")
    assert outer.start <= inner.start <= inner.end


def test_seconds_by_role(tmp_path: Path):
    """A trainer that was started twice, a refresh, and a thread that writes beside the trainer."""
    lines = [
        span("train", 0, 6, role="trainer", process=1, thread="MainThread"),
        span("checkpoint", 2, 3, role="trainer", process=1, thread="MainThread"),
        span("write", 1, 9, role="trainer", process=1, thread="publisher"),
        span("wait", 7, 8, role="trainer", process=1, thread="MainThread"),
        span("train", 100, 104, role="trainer", process=2, thread="MainThread"),
        span("generate", 1, 5, role="refresh-0", process=3, thread="MainThread"),
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line.to_json()) + "\n" for line in lines[::-1]))
    roles = seconds_by_role(path)
    assert roles == {
        "trainer": {"train": 9, "checkpoint": 1, "wait": 1, "wall": 12},
        "refresh-0": {"generate": 4, "wall": 4},
    }
    for seconds in roles.values():
        wall = seconds.pop("wall")
        assert sum(seconds.values()) <= wall


def test_processes_of_a_role_that_work_at_once_share_their_wall_clock():
    lines = [span("train", 0, 10, role="trainer", process=1), span("train", 1, 11, role="trainer", process=2)]
    lines.append(span("train", 20, 22, role="trainer", process=3))
    assert seconds_by_role(lines)["trainer"]["wall"] == 13


def test_a_process_with_the_number_of_one_before_is_another():
    """In a container a trainer that is started again may have the same one; the night between is not its work."""
    lines = [
        span("started", 0, 0, role="trainer", process=1),
        span("train", 0, 10, role="trainer", process=1),
        span("started", 1000, 1000, role="trainer", process=1),
        span("train", 1000, 1020, role="trainer", process=1),
    ]
    assert seconds_by_role(lines[::-1])["trainer"] == {"train": 30, "wall": 30}


def test_other_threads_are_told_apart(tmp_path: Path):
    events = Events(tmp_path / "events.jsonl")
    thread = threading.Thread(target=lambda: events.write(SpanName.WRITE, 0, 50), name="publisher")
    with events.span(SpanName.TRAIN):
        thread.start()
        thread.join()
    assert Counter(event.thread for event in read_events(events.path)) == {"publisher": 1, "MainThread": 1}
    assert set(seconds_by_role(events.path)["trainer"]) == {"train", "wall"}


def test_processes_lose_no_line_to_each_other(tmp_path: Path):
    path, count, writers = tmp_path / "events.jsonl", 150, 4

    def write(role: str) -> None:
        events = Events(path, role)
        for i in range(count):
            events.write(SpanName.STORE, i, i + 1, note="x" * (i * 7 % 2000))

    fork = multiprocessing.get_context("fork")  # a fresh interpreter would import torch first
    processes = [fork.Process(target=write, args=(f"refresh-{n}",)) for n in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * writers
    lines = path.read_text().splitlines()
    assert len(lines) == count * writers
    events = list(read_events(path))
    for n in range(writers):
        assert [event.start for event in events if event.role == f"refresh-{n}"] == list(range(count))
    assert all(seconds["store"] == seconds["wall"] == count for seconds in seconds_by_role(path).values())
