"""The student under evaluation while it is trained, and the room that generating takes on a GPU that is shared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from transformers import PreTrainedModel

from npd import models
from npd.config import ModelConfig
from npd.errors import UserError
from npd.evaluation import BenchmarkSetting, Evaluator
from npd.generations.models import AskedTeacher, Evaluated
from npd.generations.producer import Workshop
from npd.preflight import Setup
from npd.train.trainer import Trainer


class LiveWeights:
    """The weights of the student that is trained, for an engine: the model itself, or files of it as it is after a step."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def model(self) -> PreTrainedModel:
        return self.trainer.base

    def path(self) -> Path:
        if not self.folder.exists():
            self.trainer.save_policy(self.folder)
        return self.folder


class StudentMeasures:
    """Evaluates the student that is trained, through the same engine as its rollouts where that stands in this process."""

    def __init__(self, setup: Setup, shop: Workshop, trainer: Trainer) -> None:
        setting = BenchmarkSetting(setup.config, setup.chat, setup.held_out)
        self.evaluator = Evaluator(setting, setup.tasks)
        self.shop, self.trainer = shop, trainer

    def __bool__(self) -> bool:
        return bool(self.evaluator)

    def __call__(self, step: int) -> dict[str, float]:
        kept = self.shop.pipeline.models
        weights = LiveWeights(self.trainer, self.shop.store.path / "cache" / f"evaluated-{step:06d}")
        try:
            with teachers_at_hand(self.shop):
                return self.evaluator(Evaluated(kept, weights, self._apart, self.trainer.evaluated_in))
        finally:
            shutil.rmtree(weights.folder, ignore_errors=True)

    def of_teacher(self) -> dict[str, float]:
        kept = self.shop.pipeline.models
        with self._apart(), teachers_at_hand(self.shop):
            figures = self.evaluator.of_teacher(AskedTeacher(kept))
            kept.release()  # what it wrote with
        return figures

    def _apart(self) -> AbstractContextManager[None]:
        """Around an engine's writing: one with weights of its own needs the trainer's room on a device that is shared."""
        apart = self.shop.placement.shared_gpu and self.shop.pipeline.models.engine_kind.holds_weights
        return self.trainer.parked() if apart else nullcontext()


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
            raise UserError(
                f"{self.config.model} is to write, but rollout.engine needs a directory of weights for that. Name one, or "
                "choose another engine."
            )
        if path != Path(self.config.model):  # of a Hub id only the configuration is sure to be in the cache
            self.model()
        return path
