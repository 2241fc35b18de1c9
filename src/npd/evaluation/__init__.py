"""What a student can do, and how far it is from its teacher: what a benchmark is, and who runs them.

Each kind of benchmark stands in a file of its own (see `npd.registry.BENCHMARKS`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import Config, Sampling, TaskConfig
from npd.intervals import wilson_interval
from npd.prompts import Chat, Prompts
from npd.registry import BENCHMARKS
from npd.schedule import derive_seed
from npd.verifiers import Verifier, pass_at_k

__all__ = [
    "Benchmark",
    "BenchmarkSetting",
    "Evaluator",
    "Figures",
    "Gap",
    "Lent",
    "Student",
    "VerifiedTask",
    "benchmark_kind",
    "benchmarks",
]

Figures = dict[str, float]


class Gap(NamedTuple):
    """How far a student is from its teacher on some responses."""

    kl: float
    """KL(teacher || student), nats summed over tokens."""
    agreed: int
    """Tokens at whose position both rank the same token first."""
    tokens: int
    exact: bool
    """Is `kl` the KL itself, or, with a teacher that gives its top-k alone, a lower bound?"""
    reverse: float | None = None
    """KL(student || teacher), nats summed over the same tokens; None with a teacher that gives its top-k alone."""


class Lent(NamedTuple):
    """Weights for whatever reads and writes by its own means."""

    weights: Any
    """A model of this process on its device, as it was left: its mode is the borrower's to give back; or the path of a
    directory in Hugging Face format."""
    advance: Callable[[int], None]
    """Is told how much more is done."""


class Student(Protocol):
    """Who is evaluated: the model that learns, by whatever engine writes with it, or the teacher."""

    def write(self, table: pa.Table, sampling: Sampling, seed: int, title: str) -> pa.Table:
        """Answer each prompt of a table (column prompt_ids), adding response_ids and finish_reason, S rows for each.

        `title` is what a person sees meanwhile.
        """

    def gap(self, answered: pa.Table) -> Gap:
        """The distance to the teachers of the rows' sources, on responses that `write` gave."""

    def lend(self, title: str, total: int, unit: str, *, files: bool) -> AbstractContextManager[Lent]:
        """Its weights as a model, or with `files` as a directory, for work of `total` units; what needs a device of its own
        asks for files, and then finds a device that is shared without the trainer."""


@dataclass(frozen=True)
class BenchmarkSetting:
    """What a benchmark works with."""

    config: Config
    chat: Chat
    """The student's tokenizer, and how it writes conversations."""
    held_out: Prompts | None = None
    """data.eval"""

    @property
    def sampling(self) -> Sampling:
        """How tasks are answered."""
        options = self.config.evaluation
        length = options.max_new_tokens or self.config.rollout.max_new_tokens
        return Sampling(length, options.temperature, samples_per_prompt=options.samples)


class Benchmark(ABC):
    """One measurement. Making one reads its problems, and so finds out whether it can be run at all.

    Raises:
        UserError: its options, or the data it needs, are wrong.
    """

    needs: ClassVar[str | None] = None
    """A column that every row of data.eval must have for it."""
    slow: ClassVar[bool] = False
    """Does it take so long that training is checkpointed before it?"""
    only_at_end: bool = False
    """Is it left out of a run's evaluations but the last one?"""
    borrows: ClassVar[str] = ""
    """The option that has it borrow the weights (`Student.lend`), and the student write nothing; empty: it does not."""
    files: bool = False
    """Does it borrow them as files?"""

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        self.task, self.setting, self.name = task, setting, task.name

    @classmethod
    def from_section(cls, setting: BenchmarkSetting) -> list[Benchmark]:
        """Those that the configuration asks for by a section of its own, not in evaluation.tasks."""
        return []

    @property
    def notes(self) -> list[str]:
        """What the user should know before it begins."""
        return []

    @property
    def plan(self) -> str:
        """What it asks and when, for the dry run; nothing where that goes without saying."""
        return ""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that it asks."""
        return 0

    @abstractmethod
    def __call__(self, student: Student) -> Figures:
        """Figures by metric name, such as TASK/accuracy with TASK/accuracy_low and TASK/accuracy_high."""


class VerifiedTask(Benchmark):
    """Problems, each with something that says whether a response solves it.

    Args:
        prompts: one prompt [tokens] a problem.
    """

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(task, setting)
        self.prompts = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
        self.verifier = Verifier()

    @abstractmethod
    def score(self, problem: int, text: str) -> float:
        """0..1 for a response's text."""

    @property
    def longest_prompt(self) -> int:
        return int(pc.max(pc.list_value_length(self.prompts["prompt_ids"])).as_py() or 0)

    def __call__(self, student: Student) -> Figures:
        """Accuracy with its 95% interval, and pass@k for every power of two up to evaluation.samples."""
        sampling, tokenizer = self.setting.sampling, self.setting.chat.tokenizer
        each = sampling.samples_per_prompt
        seed = derive_seed(self.setting.config.seed, "task", self.name)
        answered = student.write(self.prompts, sampling, seed, f"evaluate {self.name}")
        texts = tokenizer.batch_decode(answered["response_ids"].to_pylist(), skip_special_tokens=True)
        scores = [self.score(i // each, text) for i, text in enumerate(texts)]
        correct = np.asarray(scores).reshape(-1, each).sum(axis=1)
        accuracy = float(correct.mean() / each)
        low, high = wilson_interval(accuracy, len(correct))
        name = self.name
        figures = {f"{name}/accuracy": accuracy, f"{name}/accuracy_low": low, f"{name}/accuracy_high": high}
        k = 2
        while k <= each:
            figures[f"{name}/pass@{k}"] = float(np.mean([pass_at_k(each, int(c), k) for c in correct]))
            k *= 2
        return figures


def benchmark_kind(task: TaskConfig) -> type[Benchmark]:
    """The kind of a task: the one of its name, else the default, which knows many names."""
    return BENCHMARKS[task.name if task.name in BENCHMARKS else BENCHMARKS.default]


def benchmarks(setting: BenchmarkSetting) -> list[Benchmark]:
    """Every benchmark that a configuration asks for, with its problems.

    Raises:
        UserError: options of one, or the data it needs, are wrong.
    """
    named = [benchmark_kind(task)(task, setting) for task in setting.config.evaluation.tasks]
    taken = {type(one) for one in named}
    others = [kind for kind in BENCHMARKS.values() if isinstance(kind, type) and issubclass(kind, Benchmark)]
    others = [kind for kind in others if kind not in taken]
    return [*named, *(one for kind in others for one in kind.from_section(setting))]


class DistanceToTeacher:
    """KL(teacher || student) and KL(student || teacher), in nats per token, and how often both rank the same token first.

    Measured on the student's own samples at temperature 1, over the token ids that both models have. A teacher that gives
    its top-k alone leaves a lower bound of the first KL, which is called so, and nothing of the other.
    """

    slow = only_at_end = False
    name = ""

    def __init__(self, setting: BenchmarkSetting, prompts: pa.Table) -> None:
        self.setting, self.prompts = setting, prompts

    def __call__(self, student: Student) -> Figures:
        seed = derive_seed(self.setting.config.seed, "held-out")
        sampling = Sampling(self.setting.sampling.max_new_tokens)
        answered = student.write(self.prompts, sampling, seed, "evaluate distance to the teacher")
        gap = student.gap(answered)
        name = "kl_to_teacher" if gap.exact else "kl_to_teacher_at_least"
        figures = {name: gap.kl / gap.tokens}
        if gap.reverse is not None:
            figures["reverse_kl_to_teacher"] = gap.reverse / gap.tokens
        return figures | {"top1_agreement": gap.agreed / gap.tokens, "kl_tokens": gap.tokens}


Measure = Benchmark | DistanceToTeacher


class Evaluator:
    """Every task, and the held-out comparison with the teacher where there is one."""

    def __init__(self, setting: BenchmarkSetting, tasks: list[Benchmark]) -> None:
        self.tasks = tasks
        self.measures: list[Measure] = [*tasks]
        config, held_out = setting.config, setting.held_out
        if held_out is not None and config.has_teacher and config.evaluation.kl_prompts > 0:
            self.measures.append(DistanceToTeacher(setting, held_out.table.slice(0, config.evaluation.kl_prompts)))

    def __bool__(self) -> bool:
        return bool(self.measures)

    def __call__(self, student: Student, measures: Sequence[Measure] | None = None) -> Figures:
        """Figures by metric name: eval/TASK/accuracy with its interval, eval/TASK/pass@k, eval/kl_to_teacher, ...

        Args:
            measures: those to take, of `due`; None: all.
        """
        taken = self.measures if measures is None else measures
        return {f"eval/{name}": value for measure in taken for name, value in measure(student).items()}

    def due(self, *, last: bool, found: Mapping[str, float] | None = None) -> list[Measure]:
        """What is to be measured in an evaluation that gave `found` already (None: it is yet to come): everything, what
        is for the end alone only if it is the `last` one."""
        if found is None:
            return [measure for measure in self.measures if last or not measure.only_at_end]
        at_end = [measure for measure in self.measures if last and measure.only_at_end]
        return [measure for measure in at_end if not any(key.startswith(f"eval/{measure.name}/") for key in found)]

    def of_teacher(self, teacher: Student) -> Figures:
        """The teacher's figures on every task, as teacher/TASK/accuracy, ...: the ceiling that the student aims at."""
        return {f"teacher/{name}": value for task in self.tasks for name, value in task(teacher).items()}
