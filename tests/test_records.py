"""What stands on disk: as it was written before there were records, and whatever a damaged file has."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import replace
from typing import Any

import pytest
from fake_run import step_line
from hypothesis import given
from hypothesis import strategies as st

from npd.errors import RunError, UserError
from npd.records import (
    EngineCheck,
    EvaluationLine,
    Failure,
    GenerationEnd,
    Line,
    Manifest,
    PartEntry,
    Progress,
    SelectionLine,
    SelectionSummary,
    StepLine,
    TeacherLine,
    WorkerEnd,
    as_line,
    as_span,
    for_people,
)
from npd.records.workers import MOST_SAID

MANIFEST = """{
 "generation": 1, "rows": 3,
 "parts": [{"file": "part-00000.parquet", "rows": 3, "bytes": 4211, "sha256": "ab12"}],
 "policy_version": 1,
 "selection": {
  "rows": 3, "verdicts": {"degenerate": 1, "proximal": 2},
  "delta_ifd_quantiles": {"0.05": -0.1, "0.25": 0.0, "0.5": 0.125, "0.75": 0.2, "0.95": 0.5}, "bounds": [-Infinity, 0.75],
  "sources": {"a": {"rows": 3, "verdicts": {"proximal": 3}, "delta_ifd_quantiles": {}, "bounds": [-1.0, 0.75]}}
 },
 "prompts": {"read": 4, "used": 3, "left_out": ["1 left out, empty prompt"]},
 "response_tokens": 21, "length_stops": 1,
 "teachers": {"teacher": 2, "teachers.b": 1},
 "engine": {"samples": 2, "tokens": 9, "mean_difference": -0.001, "mean_abs_difference": 0.002},
 "removed": true, "of_a_later_version": [1]
}"""
LINES = [
    '{"step": 3, "generation": 0, "pass": 1, "tokens": 40, "loss": 0.5, "ce": 1.0, "kd": 0.25, "near_policy_kl": null, '
    '"lr": 1e-05, "grad_norm": 2.0, "fill": 0.75, "tokens_per_second": 99.5, "published": 1, "publish_seconds": 0.5, '
    '"near_policy_kl_is_proxy": true, "reference_tokens": 7, "of_a_later_version": "x"}',
    '{"step": 0, "eval": true, "eval/sums/accuracy": 0.5, "eval/kl_to_teacher": 0.25}',
    '{"step": 0, "teacher": true, "teacher/sums/accuracy": 0.75}',
    '{"step": 4, "selection": true, "selection/generation": 0.0, "selection/kept": 0.5}',
    '{"step": 9, "generation": 0, "generation_ended": "kl_budget", "passes": 0.5, "near_policy_kl_is_proxy": true, '
    '"near_policy_kl_smoothed": 0.125}',
    '{"step": 9, "generation": 1, "generation_ended": "passes", "passes": 2.0, "near_policy_kl_smoothed": null}',
]
SPAN = '{"name": "train", "start": 1.5, "end": 2.5, "role": "trainer", "process": 7, "thread": "MainThread", "generation": 0}'


def test_a_manifest_is_read_and_written_as_it_stands():
    manifest = Manifest.from_json(json.loads(MANIFEST))
    assert json.dumps(manifest.to_json()) == json.dumps(json.loads(MANIFEST))
    assert manifest.parts == (PartEntry("part-00000.parquet", 3, 4211, "ab12"),)
    assert manifest.selection.kept == 2
    assert manifest.selection.bounds == (-math.inf, 0.75)
    assert manifest.selection.sources["a"].rows == 3
    assert manifest.engine == EngineCheck(2, 9, -0.001, 0.002)
    assert manifest.more == {"of_a_later_version": [1]}


def test_what_a_manifest_need_not_have_is_left_out():
    manifest = Manifest(0, 0, (), 0, SelectionSummary(0, {}, {}))
    assert list(manifest.to_json()) == ["generation", "rows", "parts", "policy_version", "selection"]
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("key", ["generation", "rows", "parts", "policy_version", "selection"])
@pytest.mark.parametrize("value", [None, "x", True, [3], 1 << 60])
def test_a_manifest_without_what_it_must_have_is_refused(key, value):
    with pytest.raises(ValueError, match=f"it lacks {key}"):
        Manifest.from_json(json.loads(MANIFEST) | {key: value})


@pytest.mark.parametrize("line", LINES)
def test_lines_are_read_and_written_as_they_stand(line):
    record = as_line(json.loads(line))
    assert record is not None
    assert json.dumps(record.to_json()) == line


def test_lines_are_of_their_kinds():
    step, evaluation, teacher, selection, budget, passes = (as_line(json.loads(line)) for line in LINES)
    assert isinstance(step, StepLine)
    assert (step.passes, step.published, step.reference_tokens, step.near_policy_kl) == (1, 1, 7, None)
    assert evaluation == EvaluationLine(0, {"eval/sums/accuracy": 0.5, "eval/kl_to_teacher": 0.25})
    assert teacher == TeacherLine(0, {"teacher/sums/accuracy": 0.75})
    assert isinstance(selection, SelectionLine)
    assert selection.generation == 0
    assert isinstance(budget, GenerationEnd)
    assert (budget.reason, budget.passes, budget.near_policy_kl_smoothed) == ("kl_budget", 0.5, 0.125)
    assert isinstance(passes, GenerationEnd)
    assert passes.near_policy_kl_smoothed is None
    assert as_line({"step": 4, "of_a_later_version": 1}) == Line(4)


def test_a_step_is_read_as_far_as_it_can_be():
    line = as_line({"step": 3, "loss": "x", "tokens": 1.5, "generation": 10**30, "near_policy_kl_is_proxy": 1, "lr": 2})
    assert isinstance(line, StepLine)
    assert math.isnan(line.loss)
    assert math.isnan(line.ce)
    assert (line.tokens, line.generation, line.near_policy_kl_is_proxy, line.lr) == (None, None, False, 2.0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(LINES), st.data())
def test_whatever_stands_in_a_line_it_is_a_record_or_none(text, data):
    line: dict[str, Any] = json.loads(text)
    for key in data.draw(st.lists(st.sampled_from([*line]), unique=True)):
        line[key] = data.draw(anything)
    record = as_line(line)
    assert (record is None) <= (type(line["step"]) is not int or abs(line["step"]) > 1 << 53 or "generation_ended" in line)
    if record is not None:
        assert record.step == line["step"]
        record.to_json()


@given(anything)
def test_whatever_a_line_is_it_is_no_error(raw):
    assert as_line(raw) is None
    assert as_span(raw) is None
    for kind in (Manifest, Progress, Failure, WorkerEnd):
        with pytest.raises(ValueError, match=r"it lacks|not an object"):
            kind.from_json(raw)


def test_a_span_is_read_and_written_as_it_stands():
    span = as_span(json.loads(SPAN))
    assert span is not None
    assert json.dumps(span.to_json()) == SPAN
    assert span.facts == {"generation": 0}
    assert span.seconds == 1.0
    older = as_span({"name": "x", "start": 1, "end": 2})
    assert older is not None
    assert (older.role, older.process, older.thread) == ("trainer", 0, "MainThread")


def test_figures_for_people():
    names = ["eval/a/accuracy", "eval/a/accuracy_low", "eval/a/accuracy_high", "eval/kl_tokens", "eval/a/pass@2"]
    assert [name for name in names if for_people(name)] == ["eval/a/accuracy", "eval/a/pass@2"]


def test_a_failure_says_what_its_error_does():
    error = UserError("The part is damaged.", "Delete it.")
    error.role = "refresh-0"
    explained = Failure.of(error)
    assert explained.to_json() == {
        "error": "UserError",
        "message": "The part is damaged. Delete it.",
        "explained": True,
        "blames": "refresh-0",
    }
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as caught:
        failure = Failure.of(caught)
    assert (failure.error, failure.message, failure.explained, failure.blames) == ("ZeroDivisionError", "by zero", False, "")
    assert "test_a_failure_says" in failure.traceback
    assert Failure.from_json(failure.to_json()) == failure


@pytest.mark.parametrize(
    "error", [UserError("What. Ünlucky\n\n", "How."), RunError("\U0001f4a5" * MOST_SAID, "x" * MOST_SAID)]
)
def test_the_end_of_a_worker_comes_through_a_pipe(tmp_path, error):
    with (tmp_path / "end").open("wb") as file:
        WorkerEnd.of(error).tell(file.fileno())
    with (tmp_path / "end").open("rb") as file:
        end = WorkerEnd.hear(file.fileno())
    assert end is not None
    told = end.error("refresh-1")
    assert type(told) is type(error)
    assert (str(told), told.what, told.remedy, told.role) == (str(error), error.what, error.remedy, "refresh-1")
    assert (tmp_path / "end").stat().st_size < 1 << 16  # or it would wait in a pipe for somebody who waits for its end
    read, write = os.pipe()
    WorkerEnd.of(UserError("short\udcff")).tell(write)  # of a file's name that is no text
    os.close(write)
    assert WorkerEnd.hear(read) == WorkerEnd("user", "short?")
    os.close(read)


def test_a_worker_is_brief():
    end = WorkerEnd.of(RunError("x" * 300_000, "y" * 300_000))
    assert (end.what, end.remedy) == ("x" * MOST_SAID, "y" * MOST_SAID)


def test_nobody_waits_for_who_outlives_a_worker():
    """A process that a worker forked has its end of the pipe too, and may live on."""
    read, write = os.pipe()
    WorkerEnd.of(RunError("gone")).tell(write)
    late = threading.Timer(20, os.close, [write])
    late.start()
    try:
        assert WorkerEnd.hear(read) == WorkerEnd("run", "gone")
        assert WorkerEnd.hear(read) is None
        assert late.is_alive(), "the other end had to be closed first"
    finally:
        late.cancel()
        os.close(read)


@pytest.mark.parametrize("said", ["", '{"kind": "user", "wh', "null", '{"kind": 3, "what": "x"}', "\udcff"])
def test_a_worker_that_said_nothing_whole_said_nothing(tmp_path, said):
    (tmp_path / "end").write_bytes(said.encode("utf-8", "surrogateescape"))
    with (tmp_path / "end").open("rb") as file:
        assert WorkerEnd.hear(file.fileno()) is None


def test_unknown_keys_of_a_step_survive():
    line = replace(step_line(3), more={"divergence/tail": 0.5})
    assert as_line(line.to_json()) == line
