"""What a generation is: a window of prompts in parts, and who writes the responses. Nothing here loads a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import Config, PlacementConfig
from npd.placement import names_producer
from npd.prompts import Prompts
from npd.schedule import derive_seed, generation_size, parts_of_generation, prompts_of_generation
from npd.store import REFERENCE


@dataclass(frozen=True)
class Generation:
    """A finished generation on disk."""

    index: int
    path: Path
    policy_version: int
    manifest: dict[str, Any]


class Generations:
    """The generations of a distillation: the student's own responses, and references that are mixed in if asked for."""

    def __init__(self, config: Config, prompts: Prompts) -> None:
        self.config, self.prompts = config, prompts

    @property
    def by_student(self) -> bool:
        """Does the student write responses, so that snapshots of it are needed?"""
        return True

    @property
    def mixed(self) -> bool:
        """Are reference responses mixed in?"""
        return self.config.schedule.references > 0

    @cached_property
    def verifies(self) -> bool:
        """Do responses get a reward, as there is something to verify them by?"""
        answers = self.prompts.table["answer"]
        return self.config.scoring.verify and answers.null_count < len(answers)

    def is_reference(self, generation: int) -> bool:
        """Are its responses references, which no snapshot of the student wrote?"""
        return generation == REFERENCE

    def size(self, generation: int) -> int:
        """Prompts of a generation."""
        if generation == REFERENCE:
            return len(self._reference_prompts)
        return generation_size(len(self.prompts), self.config.schedule)

    def parts(self, generation: int) -> list[slice]:
        """The parts of a generation, as slices of its prompts."""
        return parts_of_generation(self.size(generation), self.config.rollout.part_size)

    def per_prompt(self, generation: int) -> int:
        """Responses to each prompt."""
        return 1 if self.is_reference(generation) else self.config.rollout.samples_per_prompt

    def responses(self, generation: int) -> int:
        """Responses of a generation, dropped ones included."""
        return self.size(generation) * self.per_prompt(generation)

    def table(self, generation: int, part: int) -> pa.Table:
        """The prompts of a part."""
        here = self.parts(generation)[part]
        if generation == REFERENCE:
            return self.prompts.rows_at(self._reference_prompts[here])
        indices = prompts_of_generation(len(self.prompts), generation, self.config.schedule, self.config.seed, here)
        return self.prompts.rows_at(indices)

    @cached_property
    def _reference_prompts(self) -> np.ndarray:
        """Prompts whose reference responses are mixed in: as many as the whole run can use, once each."""
        schedule = self.config.schedule
        usable = usable_references(self.config, self.prompts)
        per_pass = schedule.references / (1 - schedule.references) * self.responses(0)
        wanted = math.ceil(1.1 * per_pass * schedule.passes * schedule.generations)  # they may be the shorter ones
        order = np.random.default_rng(derive_seed(self.config.seed, "reference prompts")).permutation(usable)
        return order[:wanted]


class ReferenceGenerations(Generations):
    """The one generation of a fine-tuning on references; `config` is that of `tuning`."""

    @property
    def by_student(self) -> bool:
        return False

    def is_reference(self, generation: int) -> bool:
        return True


def tuning(config: Config) -> Config:
    """A configuration as fine-tuning on references takes it: one generation of every prompt, cross-entropy alone.

    It is a run like any other then; nothing else need know. There are no snapshots, so a teacher that is the newest one is
    the student as it started, as it is for all that belongs to no generation.
    """
    schedule = config.schedule.model_copy(update={"generations": 1, "prompts": "all", "lead": 0.0, "references": 0.0})
    loss = config.loss.model_copy(update={"kd_weight": 0.0})
    elsewhere = names_producer(config.placement)
    placement: PlacementConfig = config.placement.model_copy(update={"rollout": "auto"} if elsewhere else {})
    started = {key: each.model_copy(update={"snapshot": "start"}) for key, each in config.given_teachers.items()}
    return config.model_copy(
        update={
            "schedule": schedule,
            "loss": loss,
            "placement": placement,
            "teacher": started.pop(None, None),
            "teachers": started,
        }
    )


def usable_references(config: Config, prompts: Prompts) -> np.ndarray:
    """Indices of the prompts that can have a reference response: with data.references given, those with a completion."""
    if config.data.references == "teacher":
        return np.arange(len(prompts))
    lengths = pc.fill_null(pc.list_value_length(prompts.table["completion_ids"]), 0).to_numpy()
    return np.flatnonzero((lengths > 0) & (lengths <= config.rollout.max_new_tokens))
