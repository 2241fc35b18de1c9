"""The models that a refresh works with: the student as a snapshot has it, what answers with it, and the teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from npd.config import Config
from npd.errors import UserError
from npd.models import Vocabulary, load_model, load_model_config, resolve_dtype, snapshot_config
from npd.observe.display import Display
from npd.placement import Placement
from npd.records import EngineCheck
from npd.rollout import TransformersRollout
from npd.rollout.served import ServedRollout
from npd.scoring import Prefill, Reader, ServedPrefill
from npd.server import Server
from npd.store import REFERENCE, Store

if TYPE_CHECKING:
    from npd.rollout.vllm import VllmRollout


class Loaded:
    """Loads each model when it is first asked for, and keeps it: of the student's snapshots, the one asked for last."""

    def __init__(
        self,
        config: Config,
        store: Store,
        vocabulary: Vocabulary,
        pad_id: int,
        longest_prompt: int,
        display: Display,
        placement: Placement,
    ) -> None:
        self.config, self.store, self.vocabulary, self.pad_id = config, store, vocabulary, pad_id
        self.longest_prompt, self.display, self.placement = longest_prompt, display, placement
        self._student: tuple[int, PreTrainedModel | None] = (REFERENCE, None)
        self._whole = REFERENCE  # the version whose checksums were compared last
        self._vllm: VllmRollout | None = None
        self._teachers: dict[str | None, PreTrainedModel | Server] = {}

    def teacher(self, key: str | None) -> PreTrainedModel | Server:
        """A teacher by its key in `Config.all_teachers`: loaded when first asked for, or the server that has it."""
        if key not in self._teachers:
            config = self.config.all_teachers[key]
            if config.server is not None:
                self._teachers[key] = Server(config, self.display.say)
            else:
                self._teachers[key] = load_model(config, on=self.placement.teacher)
        return self._teachers[key]

    def reader(self, key: str | None) -> Reader:
        """What reads with a teacher."""
        teacher = self.teacher(key)
        return ServedPrefill(teacher, self.vocabulary) if isinstance(teacher, Server) else self.prefill(teacher)

    def writer(self, key: str | None) -> Callable[..., pa.Table]:
        """What lets a teacher write references."""
        options = self.config.rollout
        teacher = self.teacher(key)
        if not isinstance(teacher, Server):
            write = self._rollout(teacher, samples_per_prompt=1)
            # No snapshot of the student is behind what a teacher writes.
            return lambda *args: write(*args).drop_columns("behavior_logprobs")
        return ServedRollout(
            teacher,
            self.vocabulary,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
        )

    def move_teachers(self, device: str) -> None:
        """Move those that are loaded here."""
        for teacher in self._teachers.values():
            if not isinstance(teacher, Server):
                teacher.to(device)  # type: ignore[arg-type]

    def student(self, policy_version: int) -> PreTrainedModel:
        """The student as a snapshot has it; the one used last stays loaded."""
        version, model = self._student
        if model is None or version != policy_version:
            self._student = REFERENCE, None  # before the next one takes its memory
            path = self._snapshot(policy_version)
            model = load_model(snapshot_config(self.config.student, path), on=self.placement.rollout)
            self._student = policy_version, model
        return model

    def _snapshot(self, policy_version: int) -> Path:
        """A snapshot's directory, whole.

        Raises:
            UserError: it is damaged, or no longer kept.
        """
        path = self.store.policy(policy_version)
        if not path.is_dir():
            raise UserError(
                f"A part must be made again, but the snapshot {path} that writes it is no longer kept (checkpoint.keep "
                f"{self.config.checkpoint.keep}). Delete the run directory and start over, keeping more."
            )
        if self._whole != policy_version:
            self.store.check_model(path)
            self._whole = policy_version
        return path

    def release(self) -> None:
        """Let go of the student, and of the GPU's memory that student and engine took."""
        self._student = REFERENCE, None
        if self._vllm is not None:
            self._vllm.rest()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of everything."""
        self._student, self._teachers = (REFERENCE, None), {}
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None

    def engine(self, policy_version: int) -> TransformersRollout | VllmRollout:
        """What answers with a snapshot's weights."""
        if self.config.rollout.engine == "transformers":
            return self._rollout(self.student(policy_version))
        path = self._snapshot(policy_version)
        self.student(policy_version)  # here: loading is no work for a thread beside the engine
        if self._vllm is None:
            # What shares the engine's device is loaded first: the engine takes a share of what is left.
            for key in self.config.all_teachers:
                self.teacher(key)
            self._vllm = self._start_vllm(path)
        self._vllm.take(path)
        return self._vllm

    def stop(self) -> None:
        """End what teachers are asked in another thread."""
        for teacher in self._teachers.values():
            if isinstance(teacher, Server):
                teacher.stop()

    def _start_vllm(self, path: Path) -> VllmRollout:
        from npd.rollout.vllm import VllmRollout

        options, student = self.config.rollout, self.config.student
        if student.lora is not None:
            path = self.store.policy(0)  # where adapters have changed nothing yet
        return VllmRollout(
            path,
            load_model_config(snapshot_config(student, path)),
            self.vocabulary,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            samples_per_prompt=options.samples_per_prompt,
            context=self.longest_prompt + options.max_new_tokens,
            batch_size=options.batch_size,
            dtype=resolve_dtype(snapshot_config(student, path), trained=False, on=self.placement.rollout),
            lora_rank=student.lora.r if student.lora is not None else None,
            trust_remote_code=student.trust_remote_code,
            options=options.vllm,
            sleeps=self.placement.shared_gpu,
        )

    def _rollout(self, model: PreTrainedModel, samples_per_prompt: int | None = None) -> TransformersRollout:
        options = self.config.rollout
        return TransformersRollout(
            model,
            self.vocabulary,
            self.pad_id,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=options.batch_size,
            samples_per_prompt=samples_per_prompt or options.samples_per_prompt,
        )

    def prefill(self, model: PreTrainedModel) -> Prefill:
        return Prefill(model, self.vocabulary, self.pad_id, self.config.scoring.batch_tokens)


def engine_difference(table: pa.Table, prefill: Prefill) -> EngineCheck:
    """How far an engine's log-probabilities are from those of the same weights in transformers, nats per token."""
    contexts, responses = (table[name].to_pylist() for name in ("prompt_ids", "response_ids"))
    ours = np.concatenate([reading.logprobs for reading in prefill(contexts, responses)]).astype(np.float64)
    difference = np.concatenate(table["behavior_logprobs"].to_pylist()) - ours
    return EngineCheck(len(table), len(difference), float(difference.mean()), float(np.abs(difference).mean()))
