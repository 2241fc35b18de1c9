"""From a finished arm to reinforcement learning: TRL's GRPOTrainer by examples/grpo.py, rewarded by the family's verifier.

A cell `grpo-ARM` runs the arm anew for the task's steps, without looking at it on the way, and goes on from its student. Its
curve has two points, before and after; `rewards` and `entropy` have a value for each step, on prompts that are trained on.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.evidence.problems import verified
from npd.rewards import text_of

STARTS = ("sft", "kd-sequence", "npd", "npd-none")
PREFIX = "grpo-"
GRPO_ARMS = tuple(PREFIX + start for start in STARTS)
STEPS, PROMPTS, SAMPLES = 100, 16, 8
"""Of GRPO: optimiser steps, prompts of a step, responses to each."""
LEARNING_RATE = 1e-4
WINDOW = 10
"""Steps over which rewards are averaged."""


def example() -> ModuleType:
    """examples/grpo.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("grpo_example", Path(__file__).parents[2] / "examples/grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reward_of(family: str) -> Callable[..., list[float | None]]:
    """The family's verifier as a reward function of TRL's."""

    def right(prompts: Any, completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
        return [float(verified(family, check, text_of(one))) for check, one in zip(answer, completions, strict=True)]

    return right


def reinforce(run_dir: Path, family: str, new_tokens: int, seed: int, steps: int) -> tuple[Path, dict[str, Any]]:
    """Go on from run_dir's student for so many steps; where the model is, and the rewards, entropy and seconds it took."""
    grpo = example()
    options = grpo.parse([str(run_dir), "--steps", str(steps), "--prompts", str(PROMPTS), "--samples", str(SAMPLES)])
    options.max_new_tokens, options.learning_rate, options.seed = new_tokens, LEARNING_RATE, seed
    begun = time.process_time()
    log = [line for line in grpo.train(options, reward_of(family)) if "reward" in line]
    return run_dir / "grpo", {
        "rewards": [round(line["rewards/right/mean"], 4) for line in log],
        "entropy": [round(line["entropy"], 4) for line in log],
        "lengths": [round(line["completions/mean_length"], 1) for line in log],
        "cpu_seconds": time.process_time() - begun,
    }


def steps_to(rewards: list[float], share: float) -> int | None:
    """After how many steps the last `WINDOW` of them had this share of right answers; None: never."""
    for step in range(WINDOW, len(rewards) + 1):
        if sum(rewards[step - WINDOW : step]) / WINDOW >= share:
            return step
    return None
