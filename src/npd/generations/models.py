"""The models that make generations: the student as a snapshot has it, the engine that writes with it, the teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from npd.config import Config, ModelConfig, Sampling, StudentConfig, TeacherConfig
from npd.errors import UserError
from npd.generations.itself import BelowAdapters, OfSnapshot, follows_snapshots, is_base
from npd.models import (
    ADAPTER,
    Switchable,
    Vocabulary,
    load_model,
    load_model_config,
    load_tokenizer,
    move,
    shared_vocabulary,
    snapshot_config,
    stop_ids_of,
    template_difference,
    tensors_of,
)
from npd.observe.display import Display
from npd.placement import Placement
from npd.records import EngineCheck
from npd.registry import ENGINES
from npd.rollout import Engine, EngineSetting, Weights
from npd.scoring import Held, Identity, Prefill, Teacher, TeacherSetting, teacher_kind
from npd.scoring.contexts import written_behind
from npd.scoring.routed import Routed
from npd.store import Store

FIRST = 0  # the snapshot that reads and writes what belongs to no generation, where a teacher is a snapshot


class Tokens(NamedTuple):
    """What is known of a run's models before weights are loaded."""

    tokenizer: Any
    """The student's."""
    vocabulary: Vocabulary
    student: Any
    """The student's own configuration."""
    teachers: dict[str | None, Identity]
    """By their keys in `Config.all_teachers`."""
    notes: list[str]
    """What the user should know of how their chat templates fit."""


def load_tokenizers(config: Config) -> Tokens:
    """The student's tokenizer and configuration, and what its teachers share with it.

    Raises:
        UserError: they cannot be loaded, or do not fit each other.
    """
    tokenizer = load_tokenizer(config.student)
    student = load_model_config(config.student)
    stop_ids = list(stop_ids_of(config.student))
    teachers = {
        key: teacher_kind(teacher).identify(teacher, tokenizer, config.student.model)
        for key, teacher in config.all_teachers.items()
    }
    alike = [identity for identity in teachers.values() if not identity.aligned]
    for identity in alike:
        stop_ids += identity.stop_ids
    known = [identity.config for identity in alike if identity.config is not None]
    options = config.data.template_options
    vocabulary = shared_vocabulary(tokenizer, student, *known, stop_ids=stop_ids, template_options=options)
    if len(known) < len(alike):  # how far another one's vocabulary is padded is not known
        vocabulary = replace(vocabulary, size=min(vocabulary.size, 1 + max(tokenizer.get_vocab().values())))
    if config.scoring.top_k > vocabulary.size:
        raise UserError(f"scoring.top_k is {config.scoring.top_k}, but the models share only {vocabulary.size} tokens.")
    notes = []
    for key, identity in teachers.items():
        if identity.aligned:  # it reads what its own template writes
            continue
        if identity.tokenizer is not None and (difference := template_difference(tokenizer, identity.tokenizer, options)):
            name = config.all_teachers[key].model
            notes.append(f"The chat template of {name} is another one than the student's: {difference}.")
    return Tokens(tokenizer, vocabulary, student, teachers, notes)


class Snapshot:
    """Weights of a published snapshot, for an engine."""

    def __init__(self, models: Models, version: int) -> None:
        self.models, self.version = models, version

    def path(self) -> Path:
        return self.models.snapshot(self.version)

    def model(self) -> PreTrainedModel:
        return self.models.student(self.version)


def no_texts(responses: list[list[int]]) -> list[str]:
    raise AssertionError("only models with a tokenizer are asked for texts")


def texts_of(tokens: Tokens) -> Callable[[list[list[int]]], list[str]]:
    """What gives the texts of responses, without special tokens."""
    return partial(tokens.tokenizer.batch_decode, skip_special_tokens=True)


class Models:
    """Loads each model when it is first asked for, and keeps it: of the student's snapshots, the one asked for last.

    Args:
        engine: the kind of engine that writes; None: the rollout's.
        longest_of_teacher: tokens of the longest prompt as teachers read it, where that is another.
        decode: the texts of responses without special tokens, for verifiers.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        vocabulary: Vocabulary,
        pad_id: int,
        longest_prompt: int,
        display: Display,
        placement: Placement,
        *,
        engine: str | None = None,
        longest_of_teacher: int = 0,
        decode: Callable[[list[list[int]]], list[str]] | None = None,
    ) -> None:
        self.config, self.store, self.vocabulary, self.pad_id = config, store, vocabulary, pad_id
        self.longest_prompt, self.display, self.placement = longest_prompt, display, placement
        self.longest_of_teacher = max(longest_prompt, longest_of_teacher)
        self.engine_kind: type[Engine] = ENGINES[engine or config.rollout.engine]
        self.decode = decode or no_texts
        self._student: tuple[int, PreTrainedModel] | None = None  # version, model
        self._whole: int | None = None  # the version whose checksums were compared last
        self._engine: Engine | None = None
        self._teachers: dict[str | None, Teacher] = {}
        self._read_with: dict[str | None, int] = {}  # of teachers that are snapshots, which
        self._base: Switchable | None = None  # of the student's adapters, where a teacher is that base
        self._on_base = any(is_base(config, key) for key in config.all_teachers)

    # -- teachers

    def teacher(self, key: str | None, version: int | None = None) -> Teacher:
        """A teacher by its key in `Config.all_teachers`, made ready when first asked for.

        Args:
            version: of one that is each generation's snapshot, which; None: that of the generation that is trained on.
        """
        if follows_snapshots(self.config, key):
            version = self._trained_on() if version is None else version
            if self._read_with.get(key, version) != version:
                self._teachers.pop(key).close()
            self._read_with[key] = version
        if key not in self._teachers:
            config, held = self._weights_of(key, version)
            setting = TeacherSetting(
                self.vocabulary,
                self.pad_id,
                self.placement.teacher,
                self.config.scoring.batch_tokens,
                self.display.say,
                partial(self._start_engine, longest_prompt=self.longest_of_teacher),  # which rests by being closed
                self.config.student,
                held,
            )
            self._teachers[key] = teacher_kind(config)(config, setting)
        return self._teachers[key]

    def _weights_of(self, key: str | None, version: int | None) -> tuple[TeacherConfig, Held | None]:
        """How a teacher's weights are loaded, and where this process has them anyway."""
        config, beside = self.config.all_teachers[key], self.placement.teacher == self.placement.rollout
        if not self.config.given_teachers[key].is_student:
            return config, BelowAdapters(self._base_of_student) if beside and is_base(self.config, key) else None
        held: Held | None = BelowAdapters(self._base_of_student) if is_base(self.config, key) else None
        if follows_snapshots(self.config, key):
            assert version is not None, "it was asked for"
            held = OfSnapshot(partial(self.student, version))
        first = version or 0
        if self.store.policy(first).is_dir():  # of `npd sft` there are no snapshots
            config = config.model_copy(update={"model": str(self.snapshot(first)), "revision": None, "adapter": None})
        return config, held if beside else None

    def _trained_on(self) -> int:
        """The snapshot that wrote the generation that is trained on."""
        current = self.store.current
        manifest = self.store.manifest(current)
        return current if manifest is None else manifest.policy_version

    def move_teachers(self, device: str) -> None:
        """Move those that are loaded here."""
        for teacher in self._teachers.values():
            teacher.move(device)
        if self._base is not None:
            move(tensors_of(self._base.base), device)
        if self._read_with and device == "cpu":
            self._student = None

    # -- the student

    def student(self, version: int) -> PreTrainedModel:
        """The student as a snapshot has it; the one used last stays loaded."""
        if self._student is None or self._student[0] != version:
            self._student = None  # before the next one takes its memory
            folder = self.snapshot(version)
            if self._on_base:
                base = self._base_of_student()
                base.take(folder / ADAPTER)
                self._student = version, base.base
            else:
                config = snapshot_config(self.config.student, folder)
                self._student = version, load_model(config, on=self.placement.rollout)
        return self._student[1]

    def _base_of_student(self) -> Switchable:
        if self._base is None:
            self._base = Switchable(load_model(self.config.student.base, on=self.placement.rollout))
        return self._base

    def snapshot(self, version: int) -> Path:
        """A snapshot's directory, whole.

        Raises:
            UserError: it is damaged, or no longer kept.
        """
        path = self.store.policy(version)
        if not path.is_dir():
            raise UserError(
                f"A part must be made again, but the snapshot {path} that writes it is no longer kept (checkpoint.keep "
                f"{self.config.checkpoint.keep}).",
                "Delete the run directory and start over, keeping more.",
            )
        if self._whole != version:
            self.store.check_model(path)
            self._whole = version
        return path

    def prefill(self, model: PreTrainedModel, autocast: torch.dtype | None = None) -> Prefill:
        """What reads with a model."""
        return Prefill(model, self.vocabulary, self.pad_id, self.config.scoring.batch_tokens, autocast)

    # -- who writes

    def engine(self, version: int) -> Engine:
        """What answers with a snapshot's weights."""
        weights = Snapshot(self, version)
        weights.path()
        weights.model()  # here: loading is no work for a thread beside the engine
        return self.engine_with(weights)

    def engine_with(self, weights: Weights) -> Engine:
        """What answers with these weights."""
        if self._engine is None:
            if self.engine_kind.holds_weights:
                # What shares the engine's device is loaded first: the engine takes a share of what is left.
                for key in self.config.all_teachers:
                    self.teacher(key)
            self._engine = self._start_engine(self.config.student, shares_device=self.placement.shared_gpu)
        self._engine.take(weights)
        return self._engine

    def _start_engine(
        self,
        model: ModelConfig,
        *,
        shares_device: bool = False,
        longest_prompt: int | None = None,
        vocabulary: Vocabulary | None = None,
        pad_id: int | None = None,
    ) -> Engine:
        base = self.store.policy(0)  # where fresh adapters have changed nothing yet; only a distillation has snapshots
        fresh = isinstance(model, StudentConfig) and model.lora is not None and not model.continues
        lora = fresh and base.is_dir()
        setting = EngineSetting(
            self.config,
            model,
            vocabulary or self.vocabulary,
            self.pad_id if pad_id is None else pad_id,
            self.placement.rollout,
            longest_prompt or self.longest_prompt,
            shares_device=shares_device,
            say=self.display.say,
            base=base if lora else None,
        )
        return self.engine_kind(setting)

    # -- letting go

    def release(self) -> None:
        """Let go of the student, and of the GPU's memory that student and engine took."""
        self._student = None
        for teacher in self._teachers.values():
            teacher.rest()
        if self._engine is not None:
            self._engine.rest()
        self.free()

    def end_engine(self) -> None:
        """End the engine, for another one in this process; it starts again when it is next asked for."""
        self.release()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def free(self) -> None:
        """Give memory of the GPU that nothing uses back to the system, for other processes and engines."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def stop(self) -> None:
        """End what teachers are asked in another thread."""
        for teacher in self._teachers.values():
            teacher.stop()

    def close(self) -> None:
        """Let go of everything."""
        for teacher in self._teachers.values():
            teacher.close()
        self._student, self._teachers, self._base = None, {}, None
        self.end_engine()


def engine_difference(table: pa.Table, prefill: Prefill) -> EngineCheck:
    """How far an engine's log-probabilities are from those of the same weights in transformers, nats per token."""
    contexts, responses = (table[name].to_pylist() for name in ("prompt_ids", "response_ids"))
    ours = np.concatenate([reading.logprobs for reading in prefill(contexts, responses)]).astype(np.float64)
    difference = np.concatenate(table["behavior_logprobs"].to_pylist()) - ours
    return EngineCheck(len(table), len(difference), float(difference.mean()), float(np.abs(difference).mean()))


def routed_writer(models: Models, sampling: Sampling) -> Routed:
    """Stage: each row is answered by the teacher of its source, behind its prompt as that teacher reads it."""

    def writer(key: str | None) -> Callable[..., pa.Table]:
        def write(table: pa.Table, seed: int, advance: Callable[[int], None]) -> pa.Table:
            teacher = models.teacher(key, FIRST)
            return written_behind(table, lambda asked: teacher.write(asked, sampling, seed, advance))

        return write

    return Routed(models.config.teacher_of, writer)
