"""When a run's student is evaluated, and that what was measured is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from npd.config import Config
from npd.observe.console import show_evaluation
from npd.observe.display import Display
from npd.observe.events import Events, SpanName
from npd.records import EvaluationLine, Line, TeacherLine
from npd.store import Store
from npd.train.loop import Position


class Measures(Protocol):
    """What is measured of the student along the way."""

    def __bool__(self) -> bool: ...

    def due(self, *, last: bool, found: Mapping[str, float] | None) -> Sequence[Any]:
        """What is to be measured in an evaluation that gave `found` already; None: it is yet to come."""

    def slow(self, *, last: bool) -> bool:
        """Is any of it slow?"""

    def __call__(self, step: int, student: nn.Module, measures: Sequence[Any]) -> dict[str, float]:
        """Figures of the student as it is after a step."""

    def of_teacher(self) -> dict[str, float]:
        """The teacher's figures on the same tasks."""


class Evaluations:
    """A run's evaluations: before training, after every so many passes, and at the end."""

    def __init__(
        self,
        config: Config,
        store: Store,
        measures: Measures,
        at: Position,
        events: Events,
        display: Display,
        log: Callable[[Line], None],
    ) -> None:
        self.config, self.store, self.measures, self.at = config, store, measures, at
        self.events, self.display, self.log = events, display, log

    def due(self, *, last: bool = False) -> bool:
        """Is the student evaluated at this place, on whichever process?"""
        passes = self.at.generation * self.config.schedule.passes + self.at.passes
        regular = self.at.batch == 0 and passes % self.config.evaluation.every_passes == 0
        return bool(self.measures) and (last or regular)

    def slow(self, *, last: bool = False) -> bool:
        """Is it an evaluation that takes so long that training is checkpointed before it?"""
        return self.due(last=last) and self.measures.slow(last=last)

    def pending(self, *, last: bool) -> bool:
        """On the main process: is anything due here that was not measured before?"""
        return bool(self.measures.due(last=last, found=self._found()))

    def run(self, student: nn.Module, *, last: bool) -> None:
        """On the main process, measure what is due here and was not measured before of the student, in one piece."""
        found = self._found()
        measures = self.measures.due(last=last, found=found)
        step = self.at.step
        with self.events.span(SpanName.EVALUATE, step=step):
            self._evaluate_teacher()
            figures = self.measures(step, student, measures)
        # Of one step the last line holds all.
        self.log(EvaluationLine(step, {**(found or {}), **figures}))
        show_evaluation(f"step {step}", figures, self.display)

    def _evaluate_teacher(self) -> None:
        """The teacher's own figures on the tasks, once a run, where evaluation.teacher asks for them."""
        if not self.config.evaluation.teacher or any(isinstance(line, TeacherLine) for line in self.store.read_metrics()):
            return
        if figures := self.measures.of_teacher():
            self.log(TeacherLine(self.at.step, figures))
            show_evaluation("teacher", figures, self.display)

    def _found(self) -> dict[str, float] | None:
        """What was measured at this step; None: nothing."""
        lines = [line for line in self.store.read_metrics() if isinstance(line, EvaluationLine) and line.step == self.at.step]
        return lines[-1].figures if lines else None
