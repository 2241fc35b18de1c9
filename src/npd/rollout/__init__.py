"""Responses by the student: what an engine is. Each engine stands in a file of its own (see `npd.registry.ENGINES`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import pyarrow as pa
from transformers import PreTrainedModel

from npd.config import Config, ModelConfig, Sampling
from npd.errors import RunError, UserError
from npd.models import Vocabulary

__all__ = ["Engine", "EngineSetting", "Pace", "Progress", "Request", "Weights"]

Progress = Callable[[int, int], None]
"""Is told a request's number and how many of its responses are finished; what it raises ends the work."""


class Pace(NamedTuple):
    """How near an engine comes, on an accelerator, to what its memory allows."""

    bandwidth: float
    """Share of the device's bandwidth at which a step of decoding reads weights and cache."""
    layer_seconds: float
    """What a layer of a step takes at least, however little it reads: its kernels have to be launched."""
    source: str


class Request(NamedTuple):
    """Prompts that are to be answered."""

    number: int
    """By which the answer is known."""
    table: pa.Table
    """Column prompt_ids; every other column is kept."""
    seed: int


class Weights(Protocol):
    """Weights to answer with, as files and as a model; each is made when it is first asked for."""

    def path(self) -> Path:
        """A directory in Hugging Face format; other weights have another path."""

    def model(self) -> PreTrainedModel:
        """A model of this process, on its device."""


@dataclass(frozen=True)
class EngineSetting:
    """What an engine is started with."""

    config: Config
    model: ModelConfig
    """How its weights are loaded: the student's options, or a teacher's."""
    vocabulary: Vocabulary
    pad_id: int
    device: str
    longest_prompt: int
    """Tokens."""
    shares_device: bool = False
    """Must it give its device to others between generations?"""
    say: Callable[[str], None] = lambda text: None
    """Is told what a person should know meanwhile."""
    base: Path | None = None
    """Weights that adapters are trained on, where an engine may take adapters alone; None: it takes whole weights."""


class Engine(ABC):
    """Writes responses with weights that it is given.

    The log-probabilities that it returns are natural, of the model's own distribution at temperature 1, whatever the
    sampling; ids of the student alone, at `vocabulary.size` and above, are never written; a response ends with one of
    `vocabulary.stop_ids`, which is part of it, or at the length asked for.
    """

    continuous: ClassVar[bool] = False
    """Does it ask for further requests while it answers one?"""
    exact: ClassVar[bool] = False
    """Is it transformers itself, so that there is nothing to compare it with?"""
    takes_first_gpus: ClassVar[bool] = False
    """Does it run on the first GPUs that its process sees, whatever device it is told?"""
    reads_files: ClassVar[bool] = False
    """Does it take weights as a directory (`Weights.path`)? A GGUF file is none, nor are weights and an adapter."""
    holds_weights: ClassVar[bool] = False
    """Has it a copy of the weights of its own, which takes memory besides the model in this process?"""
    pace: ClassVar[Pace] = Pace(
        0.6, 1.1e-3, "0.6 of the bandwidth assumed; a layer's time measured: 64 at once, 30 layers, 1,851 tokens/s"
    )
    """What a plan takes it for."""

    def __init__(self, setting: EngineSetting) -> None:
        self.setting = setting

    @classmethod
    def lacks(cls, config: Config) -> str:
        """What has to be installed before it can write, as a sentence or two; nothing where all is there. Loads nothing."""
        return ""

    @classmethod
    def check(cls, config: Config) -> None:
        """See that it knows its options, as far as that can be told where it need not be installed; loads nothing.

        Raises:
            UserError: it does not.
        """

    @classmethod
    def require(cls, config: Config) -> None:
        """See that it can write in this environment.

        Raises:
            UserError: it is not installed.
        """
        if missing := cls.lacks(config):
            raise UserError(missing)

    @classmethod
    def check_device(cls, config: Config, device: str) -> None:
        """See that it can stand on a device.

        Raises:
            UserError: it can't.
        """

    @classmethod
    def check_shared(cls, config: Config, device: str, *, processes: int, trains: bool) -> None:
        """See that it can stand in a process that also trains (`trains`) or scores, of `processes` that do.

        Raises:
            UserError: it can't.
        """

    @classmethod
    def devices(cls, options: Mapping[str, Any]) -> int:
        """Devices that one engine takes."""
        return 1

    @abstractmethod
    def take(self, weights: Weights) -> None:
        """Answer with these weights from now on."""

    @abstractmethod
    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Answer requests, each as soon as it is whole: (number, its table with the columns of `add_answers`).

        Rows keep their order, and a row's responses follow each other. What is drawn depends on the weights, the table, the
        sampling and the seed alone.

        Raises:
            RunError: the engine failed.
        """

    def answer(
        self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Callable[[int], None] | None = None
    ) -> pa.Table:
        """One table; `progress` is told of newly finished responses."""
        told = 0

        def tell(number: int, finished: int) -> None:
            nonlocal told
            if progress is not None and finished > told:
                progress(finished - told)
            told = finished

        answers = list(self.stream([Request(0, table, seed)], sampling, tell) or ())
        if len(answers) != 1:
            raise RunError(
                f"The engine {type(self).__name__} gave {len(answers)} answers to one request.", "Mend the engine."
            )
        return answers[0][1]

    def rest(self) -> None:
        """Give the device to others until the next `take`."""

    def close(self) -> None:
        """Let go of everything."""
