from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_events import nested, span

from npd.observe.events import own_seconds
from npd.records import Span
from npd.report.timeline import chrome_trace, coarser, innermost, lanes, write_trace

KNOWN = ("name", "start", "end", "role", "process", "thread")


@given(nested())
def test_innermost_stretches_tile_the_time_that_spans_cover(spans):
    stretches = innermost(spans)
    for a, b in itertools.pairwise(stretches):
        assert a.end <= b.start + 1e-12
    totals: Counter[str] = Counter()
    for s in stretches:
        assert s.end > s.start
        totals[s.name] += s.end - s.start  # type: ignore[assignment]
    own = own_seconds(spans)
    assert {n: t for n, t in totals.items() if t > 1e-9} == pytest.approx(
        {n: t for n, t in own.items() if t > 1e-9}, abs=1e-6
    )


@given(nested(), st.floats(0.01, 30))
def test_coarser_loses_no_long_stretch_and_invents_no_time(spans, resolution):
    before = innermost(spans)
    after = coarser(before, resolution)
    for a, b in itertools.pairwise(after):
        assert a.end <= b.start + 1e-9
    for s in before:
        if s.end - s.start >= resolution:
            assert any(a.name == s.name and a.start <= s.start and a.end >= s.end for a in after)
    if before:
        assert after[0].start == before[0].start
        assert after[-1].end == before[-1].end


def test_many_short_stretches_become_few():
    stretches = innermost([span("ab"[i % 2], i, i + 0.9) for i in range(10_000)])
    assert len(coarser(stretches, 100.0)) <= 110


facts = st.dictionaries(st.text(min_size=1).filter(lambda k: k not in KNOWN), st.integers() | st.text(), max_size=2)


@given(
    st.lists(
        st.builds(
            lambda name, role, process, start, length, more: Span(name, start, start + length, role, process, facts=more),
            st.text(min_size=1),
            st.sampled_from(["trainer", "refresh-0", "refresh-1"]),
            st.integers(1, 3),
            st.floats(0, 1e9),
            st.floats(0, 1e5),
            facts,
        ),
        max_size=20,
    )
)
def test_a_trace_has_every_span_with_its_times_and_facts(events):
    trace = json.loads(json.dumps(chrome_trace(events)))
    entries = [e for e in trace["traceEvents"] if e["ph"] != "M"]
    origin = trace["otherData"]["origin_seconds_since_epoch"]
    assert len(entries) == len(events)
    ordered = sorted(events, key=lambda e: (e.start, -e.end))
    for entry, event in zip(entries, ordered, strict=True):
        assert entry["name"] == event.name
        assert entry["cat"] == event.role
        assert entry["ts"] / 1e6 + origin == pytest.approx(event.start, abs=1e-4)
        if entry["ph"] == "X":
            assert entry["dur"] / 1e6 == pytest.approx(event.end - event.start, abs=1e-4)
        assert entry["args"] == event.facts
    # A process of one role is one track, whatever number another machine's process has.
    assert len({e["pid"] for e in entries}) == len({(e.role, e.process) for e in events})
    named = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name" and e["ph"] == "M"}
    assert all(named[e["pid"]].startswith(e["cat"]) for e in entries)


def test_lanes_and_marks(tmp_path):
    events = [
        span("started", 0, 0, role="trainer", process=1, thread="MainThread"),
        span("generate", 0, 3, role="refresh-0", process=2, thread="MainThread"),
        span("write", 1, 2, role="trainer", process=1, thread="publisher"),
        span("train", 0, 4, role="trainer", process=1, thread="MainThread"),
    ]
    assert list(lanes(events)) == [("trainer", 1, "MainThread"), ("trainer", 1, "publisher"), ("refresh-0", 2, "MainThread")]
    assert write_trace(events, tmp_path / "t.json") == 4
    kinds = Counter(e["ph"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"])
    assert kinds == {"M": 5, "X": 3, "i": 1}
