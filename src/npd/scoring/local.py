"""A teacher that is loaded in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npd import models
from npd.config import Sampling, TeacherConfig
from npd.errors import UserError
from npd.scoring import Advance, Identity, Question, Teacher, TeacherSetting
from npd.scoring.distance import Distance, exact
from npd.scoring.prefill import Prefill, Reading


class LocalTeacher(Teacher):
    """Reads in packed rows; writes through an engine, as the student does.

    Its weights are loaded at once, unless this process has them already (`TeacherSetting.held`).
    """

    exact = True

    def __init__(self, config: TeacherConfig, setting: TeacherSetting) -> None:
        super().__init__(config, setting)
        self._held = setting.held
        self._model = None if setting.held is not None else models.load_model(config, on=setting.device)
        if self._model is not None and (note := models.reading_note(self._model, config)):
            setting.say(note)
        self._engine: Any = None

    @classmethod
    def suits(cls, config: TeacherConfig) -> bool:
        return config.server is None

    @classmethod
    def identify(cls, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, student: str) -> Identity:
        if config.server is not None:
            raise UserError(
                f"The teacher {config.model} is of kind {config.kind}, loaded here, but it has the server {config.server}; "
                "leave one of the two out."
            )
        theirs = models.load_tokenizer(config)
        models.check_compatible(tokenizer, theirs, (student, config.model))
        return Identity(models.load_model_config(config), tuple(models.stop_ids_of(config)), theirs)

    @classmethod
    def check(cls, config: TeacherConfig, identity: Identity, question: Question) -> list[str]:
        assert identity.config is not None, "a teacher that is loaded here has a configuration"
        if question.files and models.whole_directory_of(config) is None:
            raise models.no_directory(config, question.files, "The teacher")
        models.check_context(config.model, identity.config, question.prompt, question.response, question.option)
        return models.check_weights(config, identity.config) + models.check_adapter(config, identity.config)

    @classmethod
    def plan(cls, config: TeacherConfig, identity: Identity) -> str:
        count = models.parameter_count(identity.config, trust_remote_code=config.trust_remote_code)  # type: ignore[arg-type]
        held = count * models.resolve_dtype(config, trained=False).itemsize
        how = models.expected_reading(identity.config, config.attention)  # type: ignore[arg-type]
        return f"{count:,} parameters, {held / (1 << 30):.2f} GiB; reads {how}"

    @property
    def prefill(self) -> Prefill:
        return Prefill(self.model(), self.vocabulary, self.setting.pad_id, self.setting.batch_tokens, around=self.reading)

    def reading(self) -> AbstractContextManager[object]:
        """Around everything that is computed with `model()`."""
        return nullcontext() if self._held is None else self._held.reading()

    def read(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]:
        return self.prefill(contexts, responses, top_k, progress)

    def write(self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Advance | None = None) -> pa.Table:
        if self._engine is None:
            assert self.setting.start_engine is not None, "only a run's teachers write"
            self._engine = self.setting.start_engine(self.config)
        with self.reading():
            self._engine.take(self)
            # No snapshot of the student is behind what a teacher writes.
            return self._engine.answer(table, sampling, seed, progress).drop_columns("behavior_logprobs")

    def distance(
        self,
        student: Prefill,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int,
        told: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Distance]:
        return exact(student, self.prefill, contexts, responses, told)

    def context(self) -> int | None:
        return models.context_length(self.model().config)

    def model(self) -> PreTrainedModel:
        """Its weights as a model, for an engine."""
        if self._held is not None:
            return self._held.model()
        assert self._model is not None, "a teacher is not asked once it is closed"
        return self._model

    def path(self) -> Path:
        """Its weights as files, for an engine.

        Raises:
            UserError: they are a GGUF file, which not every engine reads, or weights and an adapter.
        """
        path = models.whole_directory_of(self.config)
        if path is None:
            raise models.no_directory(self.config, "rollout.engine", "The teacher")
        return path

    def move(self, device: str) -> None:
        if self._held is None:  # else whoever holds it moves it
            models.move(models.tensors_of(self.model()), device)

    def rest(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def close(self) -> None:
        self.rest()
        self._model = self._held = None
