"""When a generation starts and ends, and which prompts it answers."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from npd.config import ScheduleConfig, TrainingConfig


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for one purpose, such as ("rollout", version, part), from the run's seed."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompts_of_generation(count: int, generation: int, schedule: ScheduleConfig, seed: int) -> list[int]:
    """Indices of the prompts that a generation answers.

    With a number of prompts, generations take windows of an endless list: a fresh shuffle of all prompts each time round.
    """
    if schedule.prompts == "all":
        return list(range(count))
    start, indices = generation * schedule.prompts, []
    for position in range(start, start + schedule.prompts):
        lap, offset = divmod(position, count)
        indices.append((lap, offset))
    shuffles = {lap: np.random.default_rng(derive_seed(seed, "prompts", lap)).permutation(count) for lap, _ in indices}
    return [int(shuffles[lap][offset]) for lap, offset in indices]


def learning_rate(progress: float, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to the final rate; `progress` is the share of the run that is done, 0..1."""
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    done = min(1.0, (progress - config.warmup_ratio) / (1 - config.warmup_ratio))
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))
