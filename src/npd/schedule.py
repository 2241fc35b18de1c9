"""When a generation starts and ends, and which prompts it answers."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from npd.config import ScheduleConfig, TrainingConfig

SMOOTHING = 0.9
"""Weight of the past in the smoothed near-policy KL, a step."""


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for one purpose, such as ("rollout", version, part), from the run's seed."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generation_size(count: int, schedule: ScheduleConfig) -> int:
    """Prompts that a generation answers, of `count` there are."""
    return count if schedule.prompts == "all" else schedule.prompts


def prompts_of_generation(count: int, generation: int, schedule: ScheduleConfig, seed: int, part: slice) -> np.ndarray:
    """Indices of the prompts that a slice of a generation answers.

    Generations take windows of an endless list: a fresh shuffle of all prompts each time round. So each part is a random
    sample of the prompts, in whatever order the file has them.
    """
    size = generation_size(count, schedule)
    positions = np.arange(*part.indices(size)) + generation * size
    laps, offsets = np.divmod(positions, count)
    indices = np.empty(len(positions), np.int64)
    for lap in np.unique(laps):
        shuffle = np.random.default_rng(derive_seed(seed, "prompts", int(lap))).permutation(count)
        indices[laps == lap] = shuffle[offsets[laps == lap]]
    return indices


def parts_of_generation(size: int, part_size: int) -> list[slice]:
    """Slices of at most `part_size` of `size` prompts, as equal as can be: a rule that follows a part's data has enough."""
    count = -(-size // part_size)
    return [slice(size * p // count, size * (p + 1) // count) for p in range(count)]


def learning_rate(progress: float, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to the final rate; `progress` is the share of the run that is done, 0..1."""
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    done = min(1.0, (progress - config.warmup_ratio) / (1 - config.warmup_ratio))
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))
