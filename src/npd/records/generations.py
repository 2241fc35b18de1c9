"""generations/g000/manifest.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from npd.records.record import Record

PROXIMAL, DEGENERATE, DISCONNECT, UNDEFINED = "proximal", "degenerate", "disconnect", "undefined"
"""Verdicts of selection; a rule may have others for what it drops."""
INCORRECT, UNANIMOUS, UNVERIFIED = "incorrect", "unanimous", "unverified"
"""Verdicts of selection.reward on what the rule keeps: wrong; of a prompt whose samples are all right or all wrong; not
judged by any verifier."""
KEPT = (PROXIMAL, "reference")
"""Verdicts of responses that are trained on."""


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
    verified: int | None = None
    """Responses that a verifier judged; None where the generation has no column `reward`."""
    correct: int | None = None
    """Of these, the right ones."""
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
class AlignedPositions(Record):
    """Response tokens that a teacher with another tokenizer read, by what could be said of them."""

    exact: int
    """One token of the student's is one of the teacher's: its top-k."""
    merged: int
    """One is several, or begins one: what can be carried exactly."""
    left_out: int
    """Cross-entropy alone."""

    @property
    def total(self) -> int:
        return self.exact + self.merged + self.left_out


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
    aligned: AlignedPositions | None = None
    """Of the teachers with another tokenizer, if there are any."""
    removed: bool = False
    """Are its parts deleted (checkpoint.keep)?"""
    more: dict[str, Any] = field(default_factory=dict)
