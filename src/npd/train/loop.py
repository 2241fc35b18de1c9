"""The schedule of a run, free of models: what is trained on next, when a snapshot is due, when a generation ends.

In its first pass over a generation the trainer takes parts as they land, lowest number first; later passes shuffle all of
it. Every decision follows from the position and from the order in which parts were taken, both kept in checkpoints, so a
resumed run decides alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import numpy as np

from npd.config import Config
from npd.packing import pack
from npd.schedule import SMOOTHING, derive_seed

BLOCK = 1 << 16  # samples packed at once in a pass over all of a generation

PASSES, KL_BUDGET, MAX_STEPS, MAX_TOKENS = "passes", "kl_budget", "max_steps", "max_tokens"


@dataclass
class Position:
    """Where in the run the trainer stands: everything before it is done. The loop alone changes it."""

    generation: int = 0
    passes: int = 0
    """Whole passes over the generation."""
    batch: int = 0
    """Steps into the next pass."""
    step: int = 0
    """Optimiser steps in all."""
    tokens: int = 0
    """Response tokens trained in all."""
    parts: list[int] = field(default_factory=list)
    """Parts of the generation taken so far, in that order."""
    references: int = 0
    """Reference responses used before this pass."""
    share: float = 0.0
    """Share of the next pass that is done."""
    published: int = 0
    """The newest snapshot asked for."""
    kl: float = 0.0
    """Near-policy KL of this generation's steps, summed over tokens; older steps weigh less."""
    kl_tokens: float = 0.0
    """The tokens of that sum, weighed alike."""

    @property
    def near_policy_kl(self) -> float | None:
        """Smoothed over the steps on this generation, nats per token; None while there is none."""
        return self.kl / self.kl_tokens if self.kl_tokens else None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], generations: int) -> Position:
        """As a checkpoint of a run of so many generations has it.

        Raises:
            KeyError: something is missing.
            ValueError: something is no place in such a run.
        """
        found = {field.name: facts[field.name] for field in fields(cls)}
        counts = [value for name, value in found.items() if name not in ("parts", "share", "kl", "kl_tokens")]
        sums = [found["share"], found["kl"], found["kl_tokens"]]
        if (
            not isinstance(found["parts"], list)
            or not all(type(count) is int and count >= 0 for count in [*counts, *found["parts"]])
            or not all(type(value) in (int, float) for value in sums)
            or found["generation"] >= generations
        ):
            raise ValueError(f"it stands nowhere in a run of {generations} generations")
        return cls(**found)

    def next_generation(self) -> None:
        self.generation += 1
        self.passes = self.batch = 0
        self.share = self.kl = self.kl_tokens = 0.0
        self.parts = []


class Trained(NamedTuple):
    """What a step tells the loop."""

    kl: float
    """Near-policy KL, summed over tokens."""
    kl_tokens: int
    """Tokens it was measured on: those that the student wrote."""


class Pool(NamedTuple):
    """Samples that are packed together."""

    indices: np.ndarray
    rows: int
    """What they stand for: responses of their parts, dropped ones included, or samples of a later pass."""
    last: bool
    """Are they the last of the pass?"""


class Work(Protocol):
    """What the loop has done: by the trainer with models, by a simulation with a clock."""

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each sample taken so far."""

    @property
    def response_lengths(self) -> np.ndarray:
        """[N] response tokens of each sample taken so far."""

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        """Begin a generation; its parts, its responses in all, and the indices of reference samples."""

    def next_part(self, taken: list[int]) -> int:
        """The lowest-numbered part that is there and not taken; waits for one."""

    def take(self, part: int) -> tuple[np.ndarray, int]:
        """Indices of a part's kept samples, and its responses in all."""

    def training(self) -> AbstractContextManager[object]:
        """Around a stretch of steps without waiting."""

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        """One optimiser step; `progress` is the share of the run that is then done, `steps` the share of the pass."""

    def publish(self, version: int) -> None:
        """Publish the weights as they are now as the snapshot that writes generation `version`."""

    def checkpoint(self) -> None: ...

    def pass_done(self) -> None: ...

    def generation_done(self, reason: str, passes: float) -> None: ...


class PassPlan:
    """Optimiser steps of one pass, from one pool of samples after another.

    Samples are shuffled before packing, so that equally long ones meet others each pass, and rows after it. Rows that do
    not fill a step wait for the next pool.
    """

    def __init__(self, capacity: int, batch_tokens: int, seed: int) -> None:
        self.capacity, self.per_step, self.seed = capacity, max(1, batch_tokens // capacity), seed
        self.rest = np.empty(0, np.int64)
        self.pools = 0

    def steps(self, indices: np.ndarray, lengths: np.ndarray, last: bool) -> Iterator[list[list[int]]]:
        """Steps: lists of rows, rows lists of sample indices; `lengths` [N] are those of all samples."""
        rng = np.random.default_rng(derive_seed(self.seed, self.pools))
        self.pools += 1
        shuffled = rng.permutation(np.concatenate([self.rest, indices]))
        packed = pack(lengths[shuffled].tolist(), self.capacity)
        order = rng.permutation(len(packed))
        whole = len(packed) if last else len(packed) // self.per_step * self.per_step
        self.rest = np.array([shuffled[i] for r in order[whole:] for i in packed[r]], np.int64)
        for start in range(0, whole, self.per_step):
            yield [[int(shuffled[i]) for i in packed[r]] for r in order[start : min(start + self.per_step, whole)]]


class Loop:
    """Generations and passes from a position to the end of the run."""

    def __init__(self, config: Config, work: Work, position: Position, *, generations: int, lead: float) -> None:
        self.config, self.work, self.at = config, work, position
        self.generations, self.lead = generations, lead
        position.published = max(position.published, position.generation)
        self.part_count = self.responses = 0
        self.references = self.kept = np.empty(0, np.int64)
        self._replay: list[tuple[np.ndarray, int]] = []  # parts that a resumed run had taken
        self._used, self._owed = position.references, 0.0  # reference samples that were mixed in; tokens that are due

    def run(self) -> None:
        while self.at.generation < self.generations:
            reason = self._limit() or self._generation()
            self.work.generation_done(reason, self.at.passes + self.at.share)
            if reason in (MAX_STEPS, MAX_TOKENS):
                return
            self.at.references = self._used  # those of a pass that was cut short count as well
            self.at.next_generation()
            if not self.finished:
                self._publish(self.at.generation)

    @property
    def finished(self) -> bool:
        return self._limit() is not None or self.at.generation >= self.generations

    @property
    def alone(self) -> bool:
        """Is nothing made beside training now? So it is from a generation's last part to the next snapshot."""
        return len(self.at.parts) == self.part_count and self.at.published <= self.at.generation

    def progress(self) -> float:
        """Share of the run that is done, 0..1: of its passes, steps or tokens, whichever will end it."""
        training, passes = self.config.training, self.config.schedule.passes
        shares = [(self.at.generation * passes + self.at.passes + self.at.share) / (self.generations * passes)]
        if training.max_steps is not None:
            shares.append(self.at.step / training.max_steps)
        if training.max_tokens is not None:
            shares.append(self.at.tokens / training.max_tokens)
        return min(1.0, max(shares))

    # -- a generation

    def _generation(self) -> str:
        """Train on a generation; why it ended."""
        self.part_count, self.responses, self.references = self.work.begin(self.at.generation)
        self.kept = np.empty(0, np.int64)
        resumed, self.at.parts = self.at.parts, []
        self._replay = [self._take(part) for part in resumed]
        while self.at.passes < self.config.schedule.passes:
            reason = self._pass()
            if reason:
                return reason
            self.at.passes, self.at.batch = self.at.passes + 1, 0
            self.at.share, self.at.references = 0.0, self._used
            self.work.pass_done()
        return PASSES

    def _pass(self) -> str | None:
        """Train from the current place to the end of the pass; a reason if the generation ends before it."""
        at = self.at
        seed = derive_seed(self.config.seed, "pass", at.generation, at.passes)
        plan = PassPlan(self.config.packing.length, self.config.training.batch_tokens, seed)
        pools = self._parts() if at.passes == 0 else self._blocks(seed)
        skip, self._used, self._owed, at.share = at.batch, at.references, 0.0, 0.0
        responses = given = trained = 0
        of_pass = self.responses if at.passes == 0 else len(self.kept)
        while True:
            if not skip:
                if reason := self._over():
                    return reason
                self._publish_if_due()  # before waiting
            pool = next(pools, None)
            if pool is None:
                return None
            indices = np.concatenate([pool.indices, self._mix(pool.indices)])
            responses, given = responses + pool.rows, given + len(indices)
            with self.work.training():
                for rows in plan.steps(indices, self.work.lengths, pool.last):
                    if not skip:
                        if reason := self._over():
                            return reason
                        self._publish_if_due()
                    samples = [i for row in rows for i in row]
                    trained += len(samples)
                    at.share = max(at.share, responses / of_pass * trained / given)
                    if skip:
                        skip -= 1
                    else:
                        self._step(rows, int(self.work.response_lengths[samples].sum()))

    def _step(self, rows: list[list[int]], tokens: int) -> None:
        at = self.at
        at.step, at.tokens, at.batch = at.step + 1, at.tokens + tokens, at.batch + 1
        done = self.work.step(rows, tokens, self.progress(), self.at.share)
        at.kl, at.kl_tokens = SMOOTHING * at.kl + done.kl, SMOOTHING * at.kl_tokens + done.kl_tokens
        if at.step % self.config.checkpoint.every_steps == 0:
            self.work.checkpoint()

    # -- samples

    def _take(self, part: int) -> tuple[np.ndarray, int]:
        indices, responses = self.work.take(part)
        self.at.parts.append(part)
        self.kept = np.concatenate([self.kept, indices])
        return indices, responses

    def _parts(self) -> Iterator[Pool]:
        """A generation's parts as they land; first those that a resumed run had taken."""
        for n in range(self.part_count):
            if n < len(self._replay):
                indices, responses = self._replay[n]
            else:
                indices, responses = self._take(self.work.next_part(self.at.parts))
            yield Pool(indices, responses, n == self.part_count - 1)
        self._replay = []

    def _blocks(self, seed: int) -> Iterator[Pool]:
        """All of a generation in random order."""
        shuffled = np.random.default_rng(derive_seed(seed, "shuffle")).permutation(np.sort(self.kept))
        for start in range(0, len(shuffled), BLOCK):
            block = shuffled[start : start + BLOCK]
            yield Pool(block, len(block), start + BLOCK >= len(shuffled))

    def _mix(self, indices: np.ndarray) -> np.ndarray:
        """Reference samples for as many tokens as schedule.references asks beside these samples'.

        They are taken in turn from an endless list: a fresh shuffle of all references each time round.
        """
        share, count = self.config.schedule.references, len(self.references)
        if not share or not count:
            return np.empty(0, np.int64)
        lengths = self.work.response_lengths
        chosen: list[int] = []
        self._owed += int(lengths[indices].sum()) * share / (1 - share)
        while True:
            lap, offset = divmod(self._used, count)
            if not chosen or offset == 0:
                order = np.random.default_rng(derive_seed(self.config.seed, "references", lap)).permutation(self.references)
            tokens = int(lengths[order[offset]])
            if self._owed < tokens / 2:
                return np.array(chosen, np.int64)
            chosen.append(order[offset])
            self._owed -= tokens
            self._used += 1

    # -- when a generation ends, and when the next one begins

    def _limit(self) -> str | None:
        training = self.config.training
        if training.max_steps is not None and self.at.step >= training.max_steps:
            return MAX_STEPS
        if training.max_tokens is not None and self.at.tokens >= training.max_tokens:
            return MAX_TOKENS
        return None

    def _over(self) -> str | None:
        budget, kl = self.config.schedule.kl_budget, self.at.near_policy_kl
        return self._limit() or (KL_BUDGET if budget is not None and kl is not None and kl > budget else None)

    def _publish_if_due(self) -> None:
        """Take the next snapshot `lead` passes before the end: of the passes, or of the same share of the KL budget."""
        schedule, at = self.config.schedule, self.at
        if not self.lead or at.generation + 1 >= self.generations:
            return
        due = at.passes + self.at.share >= schedule.passes - self.lead
        if schedule.kl_budget is not None and at.near_policy_kl is not None:
            due = due or at.near_policy_kl >= schedule.kl_budget * (1 - self.lead / schedule.passes)
        if due:
            self._publish(at.generation + 1)

    def _publish(self, version: int) -> None:
        if version > self.at.published:
            self.at.published = version
            self.work.publish(version)
