"""metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from npd.records.generations import DEGENERATE, DISCONNECT, UNDEFINED, Manifest
from npd.records.record import Record, number_of, whole


def for_people(figure: str) -> bool:
    """Is this figure one to show, rather than an interval's end, a standard error or a count?"""
    return not figure.endswith(("_low", "_high", "_stderr", "_tokens"))


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
        return cls(whole(raw.get("step")), {key: value for key, value in values.items() if not math.isnan(value)})

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
        if summary.verified:
            figures["accuracy"] = (summary.correct or 0) / summary.verified
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
