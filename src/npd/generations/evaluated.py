"""Whom an evaluation asks: the student with the rollout's engine, and the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import torch

from npd.config import Sampling
from npd.errors import UserError
from npd.evaluation import Gap, Lent
from npd.generations.models import Models
from npd.rollout import Weights
from npd.scoring.contexts import teacher_contexts


class Evaluated:
    """A student under evaluation: the rollout's engine writes with its weights, its model is compared with the teachers.

    Args:
        around: context in which the engine works, for instance with the trainer out of its way.
        autocast: type of the matrix products where the model itself computes; None: that of its weights.
        aside: context in which others compute on the device with files of the weights.
    """

    def __init__(
        self,
        models: Models,
        weights: Weights,
        around: Callable[[], Any],
        autocast: torch.dtype | None = None,
        aside: Callable[[], Any] = nullcontext,
    ) -> None:
        self.models, self.weights, self.around, self.autocast = models, weights, around, autocast
        self.aside = aside

    @contextmanager
    def lend(self, title: str, total: int, unit: str, *, files: bool) -> Iterator[Lent]:
        mine = self.autocast is not None and not files
        with self.models.display.task(title, total, unit) as advance:
            if files:
                path = self.weights.path()
                with self.aside():
                    self.models.end_engine()
                    yield Lent(path, advance)
            else:
                with torch.autocast("cuda", self.autocast) if mine else nullcontext():
                    yield Lent(self.weights.model(), advance)

    def write(self, table: pa.Table, sampling: Sampling, seed: int, title: str) -> pa.Table:
        total = len(table) * sampling.samples_per_prompt
        mine = self.autocast is not None and not self.models.engine_kind.holds_weights
        with (
            self.around(),
            torch.autocast("cuda", self.autocast) if mine else nullcontext(),
            self.models.display.task(title, total, "responses") as advance,
        ):
            answered = self.models.engine_with(self.weights).answer(table, sampling, seed, advance)
            if self.models.placement.shared_gpu:
                self.models.release()
        return answered

    def gap(self, answered: pa.Table) -> Gap:
        config, model = self.models.config, self.weights.model()
        contexts, responses = answered["prompt_ids"].to_pylist(), answered["response_ids"].to_pylist()
        read = teacher_contexts(answered)
        keys = [config.teacher_of(source) for source in answered["source"].to_pylist()]
        student = self.models.prefill(model, self.autocast)
        kl, agreed, tokens, exact = 0.0, 0, 0, True
        reverse: list[float | None] = []
        training = model.training
        model.eval()
        for key in dict.fromkeys(keys):
            mine = [i for i, k in enumerate(keys) if k == key]
            teacher = self.models.teacher(key)
            exact = exact and teacher.exact
            told = {"told": [read[i] for i in mine]} if any(read[i] != contexts[i] for i in mine) else {}
            pieces = teacher.distance(
                student, [contexts[i] for i in mine], [responses[i] for i in mine], config.scoring.top_k, **told
            )
            for piece in pieces:
                kl, agreed, tokens = kl + piece.kl, agreed + piece.agreed, tokens + piece.tokens
                reverse.append(piece.reverse)
        model.train(training)
        known = [value for value in reverse if value is not None]
        return Gap(kl, agreed, tokens, exact, sum(known) if len(known) == len(reverse) else None)


class AskedTeacher:
    """The teacher under evaluation: what it can do is what the student aims at. It is asked as the student is."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def write(self, table: pa.Table, sampling: Sampling, seed: int, title: str) -> pa.Table:
        with self.models.display.task(title, len(table) * sampling.samples_per_prompt, "responses") as advance:
            return self.models.teacher(None).write(table, sampling, seed, advance)

    def gap(self, answered: pa.Table) -> Gap:
        return Gap(0.0, len(answered), len(answered), True, 0.0)

    @contextmanager
    def lend(self, title: str, total: int, unit: str, *, files: bool) -> Iterator[Lent]:
        teacher: Any = self.models.teacher(None)
        if not hasattr(teacher, "path" if files else "model"):
            raise UserError(
                f"evaluation.teacher asks for the weights of {self.models.config.all_teachers[None].model}, which a teacher "
                "of its kind does not give; set evaluation.teacher: false."
            )
        with self.models.display.task(f"the teacher: {title}", total, unit) as advance:
            if files:
                self.models.end_engine()
                yield Lent(teacher.path(), advance)
            else:
                with getattr(teacher, "reading", nullcontext)():  # weights that others hold may be in another state
                    yield Lent(teacher.model(), advance)
