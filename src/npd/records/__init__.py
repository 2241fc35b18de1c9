"""The facts that a run keeps on disk about itself, one definition each, for whoever writes them and whoever reads them."""

from npd.records.events import Failure, Span, as_span
from npd.records.generations import (
    DEGENERATE,
    DISCONNECT,
    INCORRECT,
    KEPT,
    PROXIMAL,
    UNANIMOUS,
    UNDEFINED,
    UNVERIFIED,
    AlignedPositions,
    EngineCheck,
    Manifest,
    PartEntry,
    SelectionSummary,
)
from npd.records.metrics import (
    EvaluationLine,
    FiguresLine,
    GenerationEnd,
    Line,
    SelectionLine,
    StepLine,
    TeacherLine,
    as_line,
    for_people,
)
from npd.records.record import Record, number_of
from npd.records.workers import Progress, WorkerEnd

__all__ = [
    "DEGENERATE",
    "DISCONNECT",
    "INCORRECT",
    "KEPT",
    "PROXIMAL",
    "UNANIMOUS",
    "UNDEFINED",
    "UNVERIFIED",
    "AlignedPositions",
    "EngineCheck",
    "EvaluationLine",
    "Failure",
    "FiguresLine",
    "GenerationEnd",
    "Line",
    "Manifest",
    "PartEntry",
    "Progress",
    "Record",
    "SelectionLine",
    "SelectionSummary",
    "Span",
    "StepLine",
    "TeacherLine",
    "WorkerEnd",
    "as_line",
    "as_span",
    "for_people",
    "number_of",
]
