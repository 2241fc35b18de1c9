"""The student under evaluation while it is trained, and the room that generating takes on a GPU that is shared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from npd import models
from npd.config import Config, ModelConfig
from npd.evaluation import BenchmarkSetting, Evaluator, Measure, ahead
from npd.generations.evaluated import AskedTeacher, Evaluated
from npd.generations.producer import Workshop
from npd.preflight import Setup
from npd.train.trainer import Trainer


class LiveWeights:
    """The weights of the student that is trained, for an engine: the model itself, or files of it as it is after a step."""

    def __init__(self, trainer: Trainer, student: nn.Module, folder: Path) -> None:
        self.trainer, self.student, self.folder = trainer, student, folder

    def model(self) -> PreTrainedModel:
        if self.trainer.sharded:  # then it is a copy, gathered in CPU memory
            self.student.to(self.trainer.accelerator.device)
        return models.base_model(self.student)

    def path(self) -> Path:
        if not self.folder.exists():
            models.save_model(self.student, self.trainer.tokenizer, self.folder)
        return self.folder


class StudentMeasures:
    """Evaluates the student that is trained, through the same engine as its rollouts where that stands in this process."""

    def __init__(self, setup: Setup, shop: Workshop, trainer: Trainer) -> None:
        setting = BenchmarkSetting(setup.config, setup.chat, setup.held_out)
        self.evaluator = Evaluator(setting, setup.tasks)
        self.setup, self.shop, self.trainer = setup, shop, trainer
        self.teacher: dict[str, float] = {}  # its figures, once it was asked

    def __bool__(self) -> bool:
        return bool(self.evaluator)

    def due(self, *, last: bool, found: Mapping[str, float] | None) -> list[Measure]:
        return self.evaluator.due(last=last, found=found)

    def slow(self, *, last: bool) -> bool:
        return any(measure.slow for measure in self.evaluator.due(last=last))

    def __call__(self, step: int, student: nn.Module, measures: Sequence[Measure]) -> dict[str, float]:
        kept = self.shop.pipeline.models
        weights = LiveWeights(self.trainer, student, self.shop.store.path / "cache" / f"evaluated-{step:06d}")
        try:
            with teachers_at_hand(self.shop):
                evaluated = Evaluated(kept, weights, self._apart, self.trainer.evaluated_in, self._aside)
                figures = self.evaluator(evaluated, measures)
        finally:
            shutil.rmtree(weights.folder, ignore_errors=True)
        if step == 0 and self.teacher and learns_from_teacher(self.setup.config):
            assert self.setup.prompts is not None, "what trains has prompts"
            references = ahead.references_right(self.setup.prompts, self.setup.tokens.tokenizer)
            for note in ahead.notes(figures, self.teacher, references):
                self.shop.display.say(note)
        return figures

    def of_teacher(self) -> dict[str, float]:
        kept = self.shop.pipeline.models
        with self._apart(), teachers_at_hand(self.shop):
            figures = self.evaluator.of_teacher(AskedTeacher(kept))
            kept.release()  # what it wrote with
        self.teacher = figures
        return figures

    def _apart(self) -> AbstractContextManager[None]:
        """Around an engine's writing: one with weights of its own needs the trainer's room on a device that is shared."""
        apart = self.shop.placement.shared_gpu and self.shop.pipeline.models.engine_kind.holds_weights
        return self.trainer.parked() if apart else nullcontext()

    def _aside(self) -> AbstractContextManager[None]:
        """Around what others compute on a device that is shared."""
        return self.trainer.parked() if self.shop.placement.shared_gpu else nullcontext()


def learns_from_teacher(config: Config) -> bool:
    return config.loss.kd_weight > 0 or config.data.references == "teacher"


@contextmanager
def room_for_a_refresh(trainer: Trainer, shop: Workshop) -> Iterator[None]:
    """On a GPU that is shared, models are there in turns: the trainer's leave it, and the teacher afterwards."""
    if not shop.placement.shared_gpu:
        yield
        return
    with trainer.parked():
        with teachers_at_hand(shop):
            yield
        shop.pipeline.models.release()


@contextmanager
def teachers_at_hand(shop: Workshop) -> Iterator[None]:
    """On a GPU that is shared, teachers are there only meanwhile."""
    kept = shop.pipeline.models
    if shop.placement.shared_gpu:
        kept.move_teachers(shop.placement.teacher)
    yield
    if shop.placement.shared_gpu:
        kept.move_teachers("cpu")
        kept.free()


class ModelWeights:
    """A model that is evaluated by itself, for an engine."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._model: PreTrainedModel | None = None

    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = models.load_model(self.config)
        return self._model

    def path(self) -> Path:
        path = models.whole_directory_of(self.config)
        if path is None:
            raise models.no_directory(self.config, "rollout.engine")
        if path != Path(self.config.model):  # of a Hub id only the configuration is sure to be in the cache
            self.model()
        return path
