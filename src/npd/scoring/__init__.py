"""Likelihoods and teacher top-k: what a teacher is, and the two stages that read.

Each kind of teacher stands in a file of its own (see `npd.registry.TEACHERS`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.errors import RunError, UserError
from npd.models import Vocabulary
from npd.prompts import Chat
from npd.registry import TEACHERS
from npd.scoring.alignment import EXACT, MERGED
from npd.scoring.contexts import teacher_contexts
from npd.scoring.distance import Distance, at_least
from npd.scoring.health import Health, wrong_readings
from npd.scoring.prefill import AlignedReading, Prefill, Reading
from npd.store.schema import ALIGNED

__all__ = [
    "Held",
    "Identity",
    "Prefill",
    "Question",
    "Reader",
    "Reading",
    "ScoreStudent",
    "ScoreTeacher",
    "Teacher",
    "TeacherSetting",
    "check_asked",
    "teacher_kind",
]

Advance = Callable[[int], None]


class Reader(Protocol):
    """Reads responses behind their contexts."""

    vocabulary: Vocabulary

    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]: ...


class Identity(NamedTuple):
    """What is known of a teacher before it is asked anything."""

    config: PreTrainedConfig | None = None
    """Its own configuration; None where it is not at hand: then ids end where the student's tokenizer ends."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end its responses, besides the student's."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Its own, with the chat template that it was made for; None where that is not at hand."""
    aligned: bool = False
    """Does it read with that, and not with the student's? Then it shares no token ids with the student."""


@dataclass(frozen=True)
class Question:
    """What a run will ask of a teacher, so that it can be checked before anything is generated."""

    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    vocabulary: Vocabulary
    top_k: int
    prompt: int
    """Tokens of the longest prompt, as teachers read it."""
    response: int
    """Tokens of the longest response."""
    option: str
    """The option that bounds `response`."""
    own: bool = False
    """Is `tokenizer` the teacher's own, so that a server is to have the same one?"""
    writes: str = ""
    """The option that has it write; nothing where it only reads."""
    files: str = ""
    """The option whose means of writing take its weights as a directory; nothing where there are none."""
    lends: str = ""
    """The option that has others compute with its weights by means of their own."""
    prompt_ids: tuple[int, ...] = ()
    """The first prompt, as the teacher reads it; nothing where there is none."""
    chat: Chat | None = None
    """What writes conversations for the teacher; None where no prompt went through a chat template."""


@dataclass(frozen=True)
class TeacherSetting:
    """What a teacher works with."""

    vocabulary: Vocabulary
    pad_id: int
    device: str
    batch_tokens: int
    """Tokens in one packed prefill batch."""
    say: Callable[[str], None] = lambda text: None
    """Is told what a person should know meanwhile."""
    start_engine: Callable[..., Any] | None = None
    """Starts an engine (`npd.rollout.Engine`) that writes with the weights of a model here: of a `ModelConfig`, and where its
    tokens are not the student's, of its own `vocabulary` and `pad_id`."""
    student: ModelConfig | None = None
    """Whose tokenizer responses are in; None where only ids are known."""
    held: Held | None = None
    """Its weights, where this process has them anyway; None: they are its own to load."""


class Held(Protocol):
    """Weights of a teacher that another part of this process has loaded, and reads with as well."""

    def model(self) -> PreTrainedModel:
        """The model, on its device; only within `reading` it is the teacher."""

    def reading(self) -> AbstractContextManager[object]:
        """Around everything that is computed as the teacher."""


class Teacher(ABC):
    """Reads responses behind their contexts, and can write."""

    elsewhere: ClassVar[bool] = False
    """Is its work done by another machine or process, so that an engine may generate meanwhile?"""
    exact: ClassVar[bool] = False
    """Is `distance` the KL itself, and not a lower bound of it?"""

    def __init__(self, config: TeacherConfig, setting: TeacherSetting) -> None:
        self.config, self.setting = config, setting
        self.vocabulary = setting.vocabulary
        self.health = Health()

    @classmethod
    def suits(cls, config: TeacherConfig) -> bool:
        """Is a teacher of this kind meant, where `kind` does not say?"""
        return False

    @classmethod
    def runs_elsewhere(cls, config: TeacherConfig) -> bool:
        """Is the work of this teacher done by another machine or process?"""
        return cls.elsewhere

    @classmethod
    def identify(cls, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, student: str) -> Identity:
        """Compare the tokenizers where that needs nobody else; `student` is the student's name.

        Raises:
            UserError: it cannot be found, or its tokens are not the student's.
        """
        return Identity()

    @classmethod
    def check(cls, config: TeacherConfig, identity: Identity, question: Question) -> list[str]:
        """See that it can do what a run will ask; weights are not loaded.

        Returns:
            What the user should know.

        Raises:
            UserError: it can't.
        """
        return []

    @classmethod
    def plan(cls, config: TeacherConfig, identity: Identity) -> str:
        """What `--dry-run` says of it."""
        return config.model

    @abstractmethod
    def read(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]:
        """Log-probabilities of every response token, and the `top_k` best tokens at its position.

        Contexts are at least one token. Probabilities are over the teacher's whole vocabulary; top-k ids lie below
        `vocabulary.size`, `top_k` different ones at each position. `progress` is told of response tokens read.

        Raises:
            UserError, RunError: it can't be read with.
        """

    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]:
        return self.read(contexts, responses, top_k, progress)

    def write(self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Advance | None = None) -> pa.Table:
        """Answer each prompt, adding response_ids and finish_reason; `progress` is told of finished responses.

        Raises:
            UserError, RunError: it can't.
        """
        raise UserError(f"The teacher {self.config.model} only reads; it can't write references or answer tasks.")

    def distance(
        self,
        student: Prefill,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int,
        told: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Distance]:
        """KL(teacher || student) on responses, piece by piece; here a lower bound, from the teacher's top-k.

        `told`: what the teacher reads in place of the contexts; given only where it is something else.
        """
        return at_least(student, self.read(told or contexts, responses, top_k), contexts, responses)

    def context(self) -> int | None:
        """Tokens that it reads at once, at most; None: not known."""
        return None

    def move(self, device: str) -> None:
        """Move what is loaded here to a device."""

    def rest(self) -> None:
        """Let go of what writing took."""

    def stop(self) -> None:
        """End what another thread asks of it now."""

    def close(self) -> None:
        """Let go of everything."""


def teacher_kind(config: TeacherConfig) -> type[Teacher]:
    """The kind of teacher that a configuration means.

    Raises:
        UserError: there is no such kind.
    """
    if config.kind is not None and not config.align:
        return TEACHERS[config.kind]
    return TEACHERS.suiting(config)


def check_asked(kind: type[Teacher], config: TeacherConfig, question: Question) -> None:
    """See that a kind of teacher has the means for what a run asks of it besides reading.

    Raises:
        UserError: it has not.
    """
    lacking = f"which a teacher of its kind ({kind.__name__}) does not do"
    if question.writes and kind.write is Teacher.write:
        raise UserError(
            f"{question.writes} has the teacher {config.model} write, {lacking}.", "Choose another teacher, or change that."
        )
    if question.lends and not hasattr(kind, "path" if question.files == question.lends else "model"):
        raise UserError(
            f"evaluation.teacher and {question.lends} ask for the weights of {config.model}, {lacking}.",
            "Set evaluation.teacher: false.",
        )


# -- stages


def _mean_nll(readings: list[Reading]) -> pa.Array:
    return pa.array([-float(reading.logprobs.mean(dtype=np.float64)) for reading in readings], pa.float32())


class _Scorer:
    """Conditional and free reading of a table's responses by one model."""

    def __init__(self, reader: Reader, top_k: int = 0, *, free: bool = True) -> None:
        self.reader, self.top_k, self.free = reader, top_k, free

    def conditional(self, table: pa.Table, progress: Advance | None) -> list[Reading]:
        return self.reader(teacher_contexts(table), table["response_ids"].to_pylist(), self.top_k, progress)

    def free_nll(self, table: pa.Table, progress: Advance | None) -> pa.Array:
        """Mean nats per response token without the prompt, behind one start token; nulls where that is not wanted."""
        if not self.free:
            return pa.nulls(len(table), pa.float32())
        responses = table["response_ids"].to_pylist()
        return _mean_nll(self.reader([[self.reader.vocabulary.start_id]] * len(responses), responses, 0, progress))


class ScoreTeacher(_Scorer):
    """Stage: adds teacher_nll, teacher_nll_free, topk_ids, topk_logprobs, and of a teacher with another tokenizer `ALIGNED`.

    Responses are read behind the teacher's own prompts where a table has such (see `contexts`), without a prompt as ever.

    Raises:
        RunError: the teacher answers what no model can, or no longer as it did first.
    """

    def __call__(self, table: pa.Table, progress: Advance | None = None) -> pa.Table:
        readings = self.conditional(table, progress)
        self._see(table, readings)
        nll_free = self.free_nll(table, progress)
        if isinstance(self.reader, Teacher):  # last: what was read before a server was exchanged is not kept either
            contexts, responses = teacher_contexts(table), table["response_ids"].to_pylist()
            self.reader.health.check(self.reader, self.reader.config.model, contexts, responses, readings)
        aligned = [reading for reading in readings if isinstance(reading, AlignedReading)]
        if aligned:
            for name, kind in zip(ALIGNED.names, (EXACT, MERGED), strict=True):
                counts = [int((reading.kinds == kind).sum()) for reading in aligned]
                table = table.append_column(name, pa.array(counts, pa.int32()))
        return (
            table.append_column("teacher_nll", _mean_nll(readings))
            .append_column("teacher_nll_free", nll_free)
            .append_column("topk_ids", pa.array([r.topk_ids.ravel() for r in readings], pa.list_(pa.int32())))
            .append_column("topk_logprobs", pa.array([r.topk_logprobs.ravel() for r in readings], pa.list_(pa.float32())))
        )

    def _see(self, table: pa.Table, readings: list[Reading]) -> None:
        lengths = pc.list_value_length(table["response_ids"]).to_pylist()
        wrong = wrong_readings(readings, lengths, self.top_k, self.reader.vocabulary.size)
        if wrong is not None:
            name = self.reader.config.model if isinstance(self.reader, Teacher) else "model"
            raise RunError(
                f"The teacher {name} reads what no model can: {wrong}. Nothing of it is kept.",
                "See to its weights and their type (teacher.dtype float32 has room for what bfloat16 and float16 have not), "
                "then run the same command again.",
            )


class ScoreStudent(_Scorer):
    """Stage: adds student_nll and student_nll_free to the student's own responses.

    The first comes from the log-probabilities that the rollout kept: the same weights read the same tokens, so a second
    prefill of [x; y] would only repeat them.
    """

    def __call__(self, table: pa.Table, progress: Advance | None = None) -> pa.Table:
        nll = [-float(np.mean(values)) for values in table["behavior_logprobs"].to_pylist()]
        return table.append_column("student_nll", pa.array(nll, pa.float32())).append_column(
            "student_nll_free", self.free_nll(table, progress)
        )
