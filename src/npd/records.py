"""The facts that a run keeps on disk about itself, one definition each, for whoever writes them and whoever reads them.

A record knows its JSON. Reading is lenient: a figure that is no number becomes NaN, what may be None and is of another type
becomes None, what need not be there and is of another type counts as missing, and keys that nobody knows are left alone.
Whatever else is missing or of another type is a ValueError, for the reader to say or to leave out.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from npd.errors import NpdError, RunError, UserError

PROXIMAL, DEGENERATE, DISCONNECT, UNDEFINED = "proximal", "degenerate", "disconnect", "undefined"
"""Verdicts of selection; a rule may have others for what it drops."""
KEPT = (PROXIMAL, "reference")
"""Verdicts of responses that are trained on."""
TRACEBACK_LINES = 60  # kept of a failure that npd has no explanation for
MOST_SAID = 4000  # characters of a worker's words: nobody reads the pipe before it has ended, and a pipe holds 64 KiB
MOST_WHOLE = 1 << 53  # beyond it a JSON number is not a count


def number_of(value: Any) -> float:
    """A figure as a line has it; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Record:
    """Base of frozen dataclasses that stand in a file as JSON objects.

    A field is written under its name, or under `key` in its metadata. One whose default is None, False, "" or empty is left
    out while it has that value. A field `more`, if there is one, holds all further keys.
    """

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """The record that a JSON value holds.

        Raises:
            ValueError: it is no object, or lacks a fact that a record of this kind must have.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"it is {type(raw).__name__}, not an object")
        found: dict[str, Any] = {}
        lacking: list[str] = []
        readers, known = _plan(cls)  # type: ignore[arg-type]
        for name, key, read, needed in readers:
            if needed or key in raw:
                try:
                    found[name] = read(raw.get(key))
                except ValueError:
                    lacking += [key] if needed else []
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        if "more" in cls.__dataclass_fields__:
            found["more"] = {key: value for key, value in raw.items() if key not in known}
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Types that JSON has, in the order of the fields."""
        out = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            optional = spec.default is not MISSING or spec.default_factory is not MISSING
            if spec.name != "more" and not (optional and (value is None or value is False or value in ("", (), {}))):
                out[spec.metadata.get("key", spec.name)] = _as_json(value)
        return out | getattr(self, "more", {})


def _as_json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple | list) else value


@cache
def _plan(cls: Any) -> tuple[list[tuple[str, str, Callable[[Any], Any], bool]], frozenset[str]]:
    """Of each field but `more`: its name, its key, what reads it, and whether a record must have it; and all keys."""
    hints = get_type_hints(cls)
    readers = []
    for spec in fields(cls):
        if spec.name != "more":
            needed = spec.default is MISSING and spec.default_factory is MISSING
            readers.append((spec.name, spec.metadata.get("key", spec.name), _reader(hints[spec.name]), needed))
    return readers, frozenset(key for _, key, *_ in readers)


def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type out of JSON; it raises ValueError for what is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if kind is float:
        return number_of
    if NoneType in inner:
        return _or_none(_reader(next(one for one in inner if one is not NoneType)))
    if origin is tuple:
        item, count = _reader(inner[0]), None if inner[-1] is Ellipsis else len(inner)
        return lambda value: tuple(item(one) for one in _of(list, value, count))
    if origin is dict:
        item = _reader(inner[1])
        return lambda value: {str(key): item(one) for key, one in _of(dict, value).items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_json
    return lambda value: _of(kind, value)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def lenient(value: Any) -> Any:
        try:
            return None if value is None else read(value)
        except ValueError:
            return None

    return lenient


def _of(kind: type, value: Any, count: int | None = None) -> Any:
    """The value, if it is of this very type (true is no number), and has `count` items."""
    wrong = type(value) is not kind or (isinstance(value, int) and abs(value) > MOST_WHOLE)
    if wrong or (count is not None and len(value) != count):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


# -- generations/g000/manifest.json


@dataclass(frozen=True)
class PartEntry(Record):
    """A part of a generation, as its manifest has it."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SelectionSummary(Record):
    """What selection made of a generation's responses: of all of them, or of those of one source."""

    rows: int
    verdicts: dict[str, int]
    """Responses by verdict."""
    delta_ifd_quantiles: dict[str, float]
    """Quantile ("0.05", "0.5", ...) -> Δ-IFD; empty where nothing was scored."""
    bounds: tuple[float, float] | None = None
    """The lowest and the highest Δ that any part was kept between; None where nothing says so."""
    sources: dict[str, SelectionSummary] = field(default_factory=dict)
    """The same for each source."""

    @property
    def kept(self) -> int:
        """Responses that are trained on."""
        return sum(self.verdicts.get(verdict, 0) for verdict in KEPT)


@dataclass(frozen=True)
class EngineCheck(Record):
    """How far an engine's log-probabilities were from those of the same weights in transformers, nats a token."""

    samples: int
    tokens: int
    mean_difference: float
    mean_abs_difference: float


@dataclass(frozen=True)
class Manifest(Record):
    """What a finished generation is; the last file of it that is written."""

    generation: int
    rows: int
    parts: tuple[PartEntry, ...]
    policy_version: int
    """The snapshot that wrote it; REFERENCE where none did."""
    selection: SelectionSummary
    prompts: dict[str, Any] = field(default_factory=dict)
    """How many rows of data.train were read and used, and why others were left out."""
    response_tokens: int | None = None
    length_stops: int | None = None
    """Responses that rollout.max_new_tokens cut off."""
    teachers: dict[str, int] = field(default_factory=dict)
    """Responses by the teacher that scored them, where there are several."""
    engine: EngineCheck | None = None
    """The worst check of the engines that wrote it."""
    removed: bool = False
    """Are its parts deleted (checkpoint.keep)?"""
    more: dict[str, Any] = field(default_factory=dict)


# -- metrics.jsonl


def for_people(figure: str) -> bool:
    """Is this figure one to show, rather than an interval's end or a count?"""
    return not figure.endswith(("_low", "_high", "_tokens"))


@dataclass(frozen=True)
class Line(Record):
    """A line of metrics.jsonl; of a kind that nobody here knows, if it is no more than this."""

    mark: ClassVar[str] = "step"
    """The key by which a line of this kind is known."""

    step: int
    """Optimiser steps that were done."""


@dataclass(frozen=True)
class StepLine(Line):
    """An optimiser step. Whole numbers are None where a damaged line has none."""

    mark: ClassVar[str] = "loss"

    generation: int | None
    passes: int | None = field(metadata={"key": "pass"})
    """Whole passes over the generation before it."""
    tokens: int | None
    """Response tokens trained in all."""
    loss: float
    """Mean over the step's response tokens, nats; so are its terms `ce` and `kd`."""
    ce: float
    kd: float
    near_policy_kl: float | None
    """Nats a token; None for a step on references alone."""
    lr: float
    grad_norm: float
    """Before clipping."""
    fill: float
    """Share of the rows' positions that hold a token."""
    tokens_per_second: float
    published: int | None = None
    """The snapshot that was published right before."""
    publish_seconds: float | None = None
    """How long training stood still for that."""
    near_policy_kl_is_proxy: bool = False
    """Was sampling tempered or truncated?"""
    reference_tokens: int | None = None
    """Response tokens of this step that no snapshot of the student wrote, if there are any."""
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FiguresLine(Line):
    """Figures under names that begin with a prefix; base of the three kinds below."""

    figures: dict[str, float]

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        values = {key: number_of(value) for key, value in raw.items() if key.startswith(f"{cls.mark}/")}
        return cls(_of(int, raw.get("step")), {key: value for key, value in values.items() if not math.isnan(value)})

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, self.mark: True, **self.figures}


@dataclass(frozen=True)
class EvaluationLine(FiguresLine):
    """The student's figures: eval/TASK/accuracy, ..."""

    mark: ClassVar[str] = "eval"


@dataclass(frozen=True)
class TeacherLine(FiguresLine):
    """The teacher's own figures on the evaluation tasks: teacher/TASK/accuracy, ..."""

    mark: ClassVar[str] = "teacher"


@dataclass(frozen=True)
class SelectionLine(FiguresLine):
    """A generation's selection: selection/kept, ..."""

    mark: ClassVar[str] = "selection"

    @property
    def generation(self) -> int:
        return int(self.figures.get("selection/generation", -1))

    @classmethod
    def of(cls, step: int, manifest: Manifest) -> SelectionLine:
        """The figures of a manifest, at the step at which they are logged."""
        summary = manifest.selection
        counts, rows, quantiles = summary.verdicts, summary.rows, summary.delta_ifd_quantiles
        figures: dict[str, float] = {
            "generation": manifest.generation,
            "responses": rows,
            "kept": summary.kept / rows,
            "response_tokens": manifest.response_tokens or 0,
            "cut_off": (manifest.length_stops or 0) / rows,
        }
        figures |= {verdict: counts.get(verdict, 0) / rows for verdict in (DEGENERATE, DISCONNECT, UNDEFINED)}
        figures |= {f"delta_{name}": quantiles[q] for name, q in QUANTILES_LOGGED.items() if q in quantiles}
        figures |= dict(zip(("lower", "upper"), summary.bounds or (), strict=False))
        return cls(step, {f"{cls.mark}/{name}": value for name, value in figures.items()})


QUANTILES_LOGGED = {"05": "0.05", "50": "0.5", "95": "0.95"}


@dataclass(frozen=True, kw_only=True)
class GenerationEnd(Line):
    """How training on a generation ended."""

    mark: ClassVar[str] = "generation_ended"

    generation: int
    reason: str = field(metadata={"key": mark})
    """passes, kl_budget, max_steps or max_tokens."""
    passes: float
    """How many were done."""
    near_policy_kl_is_proxy: bool = False
    near_policy_kl_smoothed: float | None
    """As schedule.kl_budget is held against; None where nothing was measured."""


_LINES = (StepLine, EvaluationLine, TeacherLine, GenerationEnd, SelectionLine)


def as_line(raw: Any) -> Line | None:
    """What a line of metrics.jsonl holds: a record of its kind; None if it has no step, or is damaged beyond reading."""
    try:
        kind = next((kind for kind in _LINES if kind.mark in raw), Line)
        return kind.from_json(raw)
    except (ValueError, TypeError, AttributeError):
        return None


# -- events.jsonl


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


# -- what a background worker says of itself


@dataclass(frozen=True)
class Progress(Record):
    """What is being done now, and how far it is."""

    name: str
    short: str
    """The name where the place is known."""
    total: float
    unit: str
    done: float = 0.0
    note: str = ""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""


@dataclass(frozen=True)
class WorkerEnd(Record):
    """Why a worker ended that can say so: it would go wrong again. One that ends without this died."""

    kind: str
    """user: what the user gave is wrong; run: the run failed."""
    what: str
    remedy: str = ""

    @classmethod
    def of(cls, error: NpdError) -> WorkerEnd:
        return cls("user" if isinstance(error, UserError) else "run", error.what[:MOST_SAID], error.remedy[:MOST_SAID])

    def error(self, role: str) -> NpdError:
        """The worker's error, for the process that tells of it."""
        error = (UserError if self.kind == "user" else RunError)(self.what, self.remedy)
        error.role = role
        return error

    def tell(self, descriptor: int) -> None:
        """Write it to a pipe or file; the reader has it once this end is closed."""
        data = (json.dumps(self.to_json()) + "\n").encode()
        while data:
            data = data[os.write(descriptor, data) :]

    @classmethod
    def hear(cls, descriptor: int) -> WorkerEnd | None:
        """Read to the end of a pipe or file; None if no worker has told anything whole."""
        data = b""
        while piece := os.read(descriptor, 1 << 16):
            data += piece
        try:
            return cls.from_json(json.loads(data))
        except ValueError:
            return None
