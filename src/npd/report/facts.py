"""What a run directory tells, read by whoever looks: nothing is changed, and what can't be read is named, not fatal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from npd.errors import UserError
from npd.observe.events import MARKS, SpanName
from npd.records import (
    EvaluationLine,
    Failure,
    FiguresLine,
    GenerationEnd,
    Manifest,
    Span,
    StepLine,
    TeacherLine,
    as_line,
    as_span,
    number_of,
)
from npd.store import REFERENCE, Store, json_lines
from npd.store.files import opened, read_facts
from npd.store.names import GENERATION, LOG, REFERENCES
from npd.store.schema import COLUMNS

LIGHT = [
    "sample_id",
    "source",
    "finish_reason",
    "student_nll",
    "teacher_nll",
    "ifd_student",
    "ifd_teacher",
    "delta_ifd",
    "verdict",
    "reward",
]
MOST_TOKENS = 80_000_000  # response tokens whose parts are read; of a larger run, evenly spaced parts
LOG_LINES = 40
MOST_FIGURE = 1e15  # what is larger is no figure of a run, and no plot could show it
SIGNALLED, INTERRUPTED = ("SystemExit",), ("KeyboardInterrupt", "Abort")  # errors that end a run somebody stopped
ALIVE_SECONDS = 120.0  # a process of another machine is taken to live for so long after its last sign

Kind = Literal["finished", "running", "failed", "stopped", "between"]


@dataclass(frozen=True)
class Status:
    kind: Kind
    sentence: str
    failed: Span | None = None
    """The mark of the failure that ended it, if one was written."""
    failure: Failure | None = None
    """What that says."""


@dataclass
class RunFacts:
    """A run as its files have it."""

    path: Path
    status: Status
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[StepLine] = field(default_factory=list)
    """Optimiser steps, in order."""
    evaluations: list[EvaluationLine] = field(default_factory=list)
    teacher: dict[str, float] = field(default_factory=dict)
    """The teacher's own figures on the evaluation tasks."""
    ended: list[GenerationEnd] = field(default_factory=list)
    events: list[Span] = field(default_factory=list)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    parts: dict[int, dict[int, int]] = field(default_factory=dict)
    """generation -> part -> response tokens, from the footers of the files that are there."""
    responses: pa.Table = field(default_factory=lambda: pa.table({}))
    """One row a response: LIGHT columns, `generation`, `part`, `row` and `tokens`."""
    parts_read: int = 0
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Last lines of each log."""
    missing: list[str] = field(default_factory=list)
    """What could not be read, and what that means; one sentence each."""
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def option(self, dotted: str, default: Any = None) -> Any:
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    def series(self, name: str) -> np.ndarray:
        """[steps] of a metric; NaN where a step has none."""
        key = f"metric {name}"
        if key not in self._arrays:
            values = np.array([number_of(getattr(line, name, None)) for line in self.steps], np.float64)
            self._arrays[key] = np.where(np.abs(values) < MOST_FIGURE, values, np.nan)
        return self._arrays[key]

    def column(self, name: str) -> np.ndarray:
        """[responses] of a column of `responses`."""
        if name not in self.responses.column_names:
            return np.empty(0)
        if name not in self._arrays:
            self._arrays[name] = self.responses[name].to_numpy(zero_copy_only=False)
        return self._arrays[name]


def gather(run_dir: str | Path, going_on: bool | None = None) -> RunFacts:
    """Read all of a run that a report shows; `going_on` where the caller knows better than the run's lock.

    Raises:
        UserError: this is no run's directory.
    """
    store = Store(run_dir)
    if not (store.path / "config.yaml").is_file():
        what = "holds no run of npd (no config.yaml)" if store.path.is_dir() else "is no directory"
        raise UserError(f"{store.path} {what}; give the run_dir of `npd distill`, `npd sft` or `npd refresh`.")
    facts = RunFacts(store.path, Status("between", ""))
    _read_config(store, facts)
    _read_events(store, facts)
    _read_metrics(store, facts)
    _read_generations(store, facts)
    for _, log in LOG.within(store.path / "logs"):
        if log.is_file():
            with suppress(OSError):
                facts.logs[log.name] = last_lines(log)
    facts.status = judge(store, facts.events, in_use(store) if going_on is None else going_on)
    facts.events += open_spans(store, facts)
    return facts


INSIDE_TRAINING = (SpanName.CHECKPOINT, SpanName.PUBLISH, SpanName.RESTART)  # spans that lie in a span of training
UNDER_WAY = "under way"
"""A span that no process writes: whatever is being done now."""


def open_spans(store: Store, facts: RunFacts) -> list[Span]:
    """What the trainer has been doing since its last whole span, of a run that goes on or was killed: a span is written
    when it ends, and one of training may take hours. Steps that were logged meanwhile say that it trained."""
    begun = next((e for e in reversed(facts.events) if e.name in MARKS and e.role == "trainer"), None)
    if facts.status.kind not in ("running", "stopped") or begun is None or begun.name != SpanName.STARTED:
        return []
    where = ("trainer", begun.process, "MainThread")
    spans = [e for e in facts.events if e.start >= begun.start and e.name not in MARKS]
    ends = [(e.end, e.name) for e in spans if (e.role, e.process, e.thread) == where]
    since = max([begun.start, *(end for end, name in ends if name not in INSIDE_TRAINING)])
    last = max([since, *(end for end, _ in ends)])
    now, logged = time.time(), 0.0
    with suppress(OSError):
        logged = min(now, store.metrics.stat().st_mtime)
    found = [Span(SpanName.TRAIN, since, logged, *where)] if facts.steps and logged > last else []
    last = max(last, logged if found else last)
    if facts.status.kind == "running" and now > last:
        found.append(Span(UNDER_WAY, last, now, *where))
    return found


def _read_events(store: Store, facts: RunFacts) -> None:
    strange = 0
    for event in json_lines(store.path / "events.jsonl"):
        span = as_span(event)
        strange += span is None
        facts.events += [span] if span is not None else []
    if strange:
        facts.missing.append(f"{strange:,} lines of events.jsonl are no spans and left out.")


def _read_config(store: Store, facts: RunFacts) -> None:
    try:
        facts.config_text = read_facts(store.path / "config.yaml")
        tree = yaml.safe_load(facts.config_text)
        facts.config = {str(key): value for key, value in dict(tree).items()}
    except Exception as error:  # whatever a damaged file makes of it
        facts.missing.append(f"config.yaml cannot be read ({type(error).__name__}); options are shown as text, if at all.")
        return
    provenance = facts.config.pop("provenance", None)
    if not isinstance(provenance, dict):
        facts.missing.append("config.yaml has no provenance: which command and which versions made the run is not known.")
        return
    facts.command, versions = str(provenance.get("command", "")), provenance.get("versions")
    if isinstance(versions, dict):
        facts.versions = {str(name): str(version) for name, version in versions.items()}


def _read_metrics(store: Store, facts: RunFacts) -> None:
    strange = 0
    for raw in json_lines(store.metrics):
        line = as_line(raw)
        strange += line is None
        if isinstance(line, StepLine):
            facts.steps.append(line)
        elif isinstance(line, EvaluationLine):
            same = facts.evaluations and facts.evaluations[-1].step == line.step  # the last of a step holds all
            facts.evaluations[-1 if same else len(facts.evaluations) :] = [replace(line, figures=_figures(line))]
        elif isinstance(line, TeacherLine):
            facts.teacher = _figures(line)
        elif isinstance(line, GenerationEnd):
            facts.ended.append(line)
    if strange:
        facts.missing.append(f"{strange:,} lines of metrics.jsonl have no step and are left out.")
    if not facts.steps:
        facts.missing.append("metrics.jsonl has no optimiser step yet: there are no training curves.")


def _figures(line: FiguresLine) -> dict[str, float]:
    return {name: value for name, value in line.figures.items() if abs(value) < MOST_FIGURE}


def generations_of(store: Store) -> list[int]:
    """Generations that have a directory, references first."""
    folder = store.path / "generations"
    numbers = [number for number, path in GENERATION.within(folder) if path.is_dir()]
    return [REFERENCE] * (folder / REFERENCES).is_dir() + numbers


def part_tokens(path: Path) -> int:
    """Response tokens of a part, from its footer: no column is read."""
    metadata = pq.read_metadata(path)
    index = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.startswith("response_ids"))
    return sum(metadata.row_group(group).column(index).num_values for group in range(metadata.num_row_groups))


def _read_generations(store: Store, facts: RunFacts) -> None:
    removed, unfinished = [], []
    for generation in generations_of(store):
        try:
            manifest = store.manifest(generation)
        except UserError as error:
            facts.missing.append(error.what)
            manifest = None
        if manifest is not None:
            facts.manifests[generation] = manifest
        tokens = facts.parts.setdefault(generation, {})
        for part in sorted(store.parts(generation)):
            if store.part(generation, part).exists() and not store.part(generation, part).is_file():
                facts.missing.append(f"{store.part(generation, part)} is no file and left out.")
                continue
            try:
                tokens[part] = part_tokens(store.part(generation, part))
            except FileNotFoundError:  # tidied away meanwhile
                continue
            except (OSError, pa.ArrowException, StopIteration) as error:
                facts.missing.append(f"{store.part(generation, part)} is damaged and left out ({type(error).__name__}).")
        if manifest is not None and not tokens:
            removed.append(generation)
        elif manifest is None and generation != REFERENCE:
            unfinished.append(generation)
    if removed:
        facts.missing.append(
            f"The responses of generations {ranges(removed)} were removed by checkpoint.keep; counts and quantiles are their "
            "manifests'."
        )
    if unfinished:
        facts.missing.append(f"Generations {ranges(unfinished)} have no manifest yet; what is there of them is shown.")
    if not facts.parts:
        facts.missing.append("There are no responses yet.")
    _read_responses(store, facts)


def ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0–2, 5"."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def _read_responses(store: Store, facts: RunFacts) -> None:
    there = [(g, part, tokens) for g, parts in facts.parts.items() for part, tokens in parts.items()]
    total = sum(tokens for *_, tokens in there)
    if total > MOST_TOKENS:
        count = max(1, int(len(there) * MOST_TOKENS / total))
        chosen = np.unique(np.linspace(0, len(there) - 1, count).round().astype(int))
        facts.missing.append(
            f"Of {len(there):,} parts {len(chosen):,}, evenly spaced, are read for histograms and samples; counts per "
            "verdict are the manifests', of all."
        )
        there = [there[i] for i in chosen]
    pieces = []
    for generation, part, _ in there:
        try:
            table = store.read_part(generation, part, [*LIGHT, "response_ids"])
        except FileNotFoundError:
            continue
        except UserError as error:
            facts.missing.append(f"{error.what} It is left out.")
            continue
        n = len(table)
        lengths = pc.fill_null(pc.list_value_length(table["response_ids"]), 0)
        columns = {name: table[name] for name in LIGHT}
        columns |= {"generation": pa.array(np.full(n, generation, np.int32)), "part": pa.array(np.full(n, part, np.int32))}
        columns |= {"row": pa.array(np.arange(n, dtype=np.int32)), "tokens": lengths}
        pieces.append(pa.table(columns))
        facts.parts_read += 1
    empty = pa.schema(
        [COLUMNS.field(name) for name in LIGHT] + [(n, pa.int32()) for n in ("generation", "part", "row", "tokens")]
    )
    facts.responses = pa.concat_tables(pieces).combine_chunks() if pieces else empty.empty_table()


def last_lines(log: Path, count: int = LOG_LINES) -> list[str]:
    with opened(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        return file.read().decode("utf-8", "replace").strip().splitlines()[-count:]


# -- how it stands


def judge(store: Store, events: list[Span], held: bool | None) -> Status:
    """Whether a run is finished, going on, failed, or was stopped without a word; `held`: does a process work on it?"""
    marks = [event for event in events if event.name in MARKS and event.role == "trainer"]
    if marks and marks[-1].name == SpanName.ENDED:  # an `npd refresh` leaves the training as it found it
        marks = [event for event in marks if event.facts.get("command") != "refresh"]
    last = max((event.end for event in events), default=None)
    when = f" Its last sign is of {clock(last)}." if last is not None else ""
    newest = marks[-1].name if marks else None
    if held or (held is None and last is not None and time.time() - last < ALIVE_SECONDS):
        return Status("running", "The run goes on; this is how it stood when the report was written.")
    if newest == SpanName.FAILED:
        failed, failure = blamed(events, marks)
        return Status("failed", f"The run {how_it_ended(failure)} at {clock(failed.end)}.", failed, failure)
    if store.finished:
        return Status("finished", "The run is finished.")
    if newest == SpanName.STARTED:
        return Status(
            "stopped",
            "The run stopped without a word: its process was killed, ran out of memory, or the machine went down." + when,
        )
    if any(event.name == SpanName.TRAIN for event in events):
        return Status("stopped", "The run is not finished, and nothing works on it." + when)
    return Status("between", "Nothing is trained here yet, and nothing works on it." + when)


def blamed(events: list[Span], marks: list[Span]) -> tuple[Span, Failure]:
    """The failure that ended a run: the trainer's, or that of a refresh, which the trainer only told of."""
    told, failure = marks[-1], failure_of(marks[-1])
    begun = max((mark.start for mark in marks if mark.name == SpanName.STARTED), default=0.0)
    theirs = (e for e in reversed(events) if e.name == SpanName.FAILED and e.role == failure.blames and e.start >= begun)
    blamed = next(theirs, None)
    return (told, failure) if blamed is None else (blamed, failure_of(blamed))


def failure_of(mark: Span) -> Failure:
    """What a `failed` mark says, as far as it says anything."""
    try:
        return Failure.from_json(mark.facts)
    except ValueError:
        return Failure("", "", explained=False)


def how_it_ended(failure: Failure) -> str:
    if failure.error in SIGNALLED:
        return "was stopped by a signal"
    return "was stopped by hand" if failure.error in INTERRUPTED else "failed"


def in_use(store: Store) -> bool | None:
    """Does a process hold the run's lock? None where locks don't say."""
    path = store.path / ".lock"
    if not path.is_file():
        return False
    try:
        import fcntl

        with opened(path, "r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False


def clock(seconds: float) -> str:
    """A time of events.jsonl as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def tail(path: Path, size: int = 1 << 14) -> Iterator[str]:
    """Whole lines at the end of a file, newest first."""
    with suppress(OSError, UserError), opened(path, "rb") as file:
        start = max(0, path.stat().st_size - size)
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").split("\n")
        yield from reversed(lines[1:-1] if start else lines[:-1])


def newest(path: Path, size: int = 1 << 14) -> Iterator[Any]:
    """What the whole lines of JSON at the end of a file hold, newest first; what is none is left out."""
    for text in tail(path, size):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        yield value
