"""What the study brings to npd as plug-ins: held-out problems judged by their verifier, rules and divergences to compare."""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pyarrow as pa
from torch import Tensor

from benchmarks.evidence.problems import verified
from npd.config import Sampling, SelectionConfig, TaskConfig
from npd.evaluation import BenchmarkSetting, Student, VerifiedTask
from npd.losses.divergences import forward_kl
from npd.records import PROXIMAL, StepLine
from npd.registry import BENCHMARKS, DIVERGENCES, RULES
from npd.schedule import derive_seed
from npd.selection import Judgement, Rule
from npd.store import Store
from npd.verifiers import pass_at_k

SAMPLES, SAMPLED = 8, 100
"""Responses to each of so many problems, for pass@k and the KL to the teacher."""


class Verified(VerifiedTask):
    """The prompts of data.eval, whose `answer` is the verifier's check, and whose `source` is the problem's stratum.

    Greedy accuracy each time; once a run, at the first evaluation from step `options.whole_from` on, also pass@k, the KL to
    the teacher and how often both rank the same token first, all on the same samples at temperature 1. Figures have the
    processor's seconds of this process when it began and when it ended, so that evaluation is no part of what a run took.
    """

    needs = "answer"

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        assert setting.held_out is not None, "the study sets data.eval"
        self.table = setting.held_out.table.slice(0, task.size)
        self.family, self.whole_from = task.options["family"], task.options["whole_from"]
        self.checks, self.strata = self.table["answer"].to_pylist(), self.table["source"].to_pylist()
        super().__init__(task, setting, self.table["prompt_ids"].to_pylist())

    def score(self, problem: int, text: str) -> float:
        return float(verified(self.family, self.checks[problem], text))

    def __call__(self, student: Student) -> dict[str, float]:
        begun = time.process_time()
        length = self.setting.sampling.max_new_tokens
        right, answered = self._asked(student, self.prompts, Sampling(length, 0.0))
        figures = {"accuracy": right.mean(), "length": np.mean([len(ids) for ids in answered["response_ids"].to_pylist()])}
        strata = defaultdict(list)
        for stratum, one in zip(self.strata, right, strict=True):
            strata[stratum].append(one)
        figures |= {f"of {name}": np.mean(ones) for name, ones in strata.items()}
        steps = [line.step for line in Store(self.setting.config.run_dir).read_metrics() if isinstance(line, StepLine)]
        if max([0, *steps]) >= self.whole_from:
            self.whole_from = 1 << 30
            sampling = Sampling(length, samples_per_prompt=SAMPLES)
            right, answered = self._asked(student, self.table.slice(0, SAMPLED), sampling)
            counts = right.reshape(-1, SAMPLES).sum(1)
            figures |= {f"pass@{k}": np.mean([pass_at_k(SAMPLES, int(c), k) for c in counts]) for k in (1, 2, 4, 8)}
            gap = student.gap(answered)
            figures |= {"kl_to_teacher": gap.kl / gap.tokens, "agreement": gap.agreed / gap.tokens}
        figures |= {"cpu_begun": begun, "cpu_ended": time.process_time()}
        return {f"{self.name}/{name}": float(value) for name, value in figures.items()}

    def _asked(self, student: Student, prompts: pa.Table, sampling: Sampling) -> tuple[np.ndarray, pa.Table]:
        """Which responses are right, and the table of them."""
        seed = derive_seed(self.setting.config.seed, "task", self.name, sampling.samples_per_prompt)
        answered = student.write(prompts, sampling, seed, "evaluate")
        texts = self.setting.chat.tokenizer.batch_decode(answered["response_ids"].to_pylist(), skip_special_tokens=True)
        each = sampling.samples_per_prompt
        return np.array([self.score(i // each, text) for i, text in enumerate(texts)]), answered


class ByVerifier(Rule):
    """Keeps the responses that the family's verifier finds right, or those that it finds wrong: what a filter could know at
    best. `judged` is set before a run.
    """

    reads_free = False
    bounds_of = "the verifier's"
    right: ClassVar[bool] = True
    judged: ClassVar[Callable[[pa.Table], list[bool]]]
    """A part's responses -> right?"""

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        verdicts = [PROXIMAL if right == self.right else "filtered" for right in ByVerifier.judged(table)]
        return Judgement(np.array(verdicts), None)


class ByRefutation(ByVerifier):
    right = False


class Half(Rule):
    """Keeps the half of a part that `keys` puts first: what a side of Δ is worth, at an equal number of responses."""

    bounds_of = "the half's"

    def keys(self, table: pa.Table) -> np.ndarray:
        delta: np.ndarray = np.nan_to_num(table["delta_ifd"].to_numpy(), nan=np.inf)
        return delta

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        place = np.argsort(np.argsort(self.keys(table), kind="stable"))
        return Judgement(np.where(place < (len(table) + 1) // 2, PROXIMAL, "filtered"), None)


class HighHalf(Half):
    def keys(self, table: pa.Table) -> np.ndarray:
        return -super().keys(table)


class RandomHalf(Half):
    reads_free = False

    def keys(self, table: pa.Table) -> np.ndarray:
        return drawn(table)


class WeighedByDelta(Half):
    """Keeps responses with a probability that rises with the rank of their Δ, from 0 to 1: weights, over many generations."""

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        place = np.argsort(np.argsort(self.keys(table), kind="stable"))
        kept = drawn(table) * len(table) < place + 0.5
        return Judgement(np.where(kept, PROXIMAL, "filtered"), None)

    def keys(self, table: pa.Table) -> np.ndarray:
        delta: np.ndarray = np.nan_to_num(table["delta_ifd"].to_numpy(), nan=-np.inf)
        return delta


def drawn(table: pa.Table) -> np.ndarray:
    """A number from 0 to 1 of each response, by its tokens alone."""
    texts = (bytes(str(ids), "ascii") for ids in table["response_ids"].to_pylist())
    return np.array([zlib.crc32(text) for text in texts]) / 2**32


class FurthestTokens:
    """The forward KL of the half of a forward pass's tokens where it is largest: a filter of tokens, not of responses."""

    on_teacher_support = True

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        each = forward_kl(teacher, student)
        far = each.detach().sum(-1, keepdim=True)
        return each * (far >= far.median())


class WeighedTokens:
    """The forward KL, each token's weighed by KL / (KL + mean KL), from 0 where both agree to 1: a soft filter of tokens."""

    on_teacher_support = True

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        each = forward_kl(teacher, student)
        far = each.detach().sum(-1, keepdim=True).clamp(min=0)
        return each * (far / (far + far.mean()).clamp(min=1e-9))


RULES.register("verified", ByVerifier)
RULES.register("refuted", ByRefutation)
RULES.register("low_half", Half)
RULES.register("high_half", HighHalf)
RULES.register("random_half", RandomHalf)
RULES.register("weighed_by_delta", WeighedByDelta)
DIVERGENCES.register("furthest_tokens", FurthestTokens())
DIVERGENCES.register("weighed_tokens", WeighedTokens())
BENCHMARKS.register("verified", Verified)
