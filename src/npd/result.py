"""What a finished run is to whoever called it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DistillResult:
    """A finished run."""

    run_dir: Path
    student: Path
    """The finished model and tokenizer, for from_pretrained."""
    steps: int
    tokens: int
    """Response tokens trained."""
    before: dict[str, float]
    """Evaluation of the student as it started; empty if nothing is evaluated."""
    after: dict[str, float]
    """Evaluation of the finished student."""
    seconds: dict[str, float]
    """Seconds per kind of work over all processes: generate, score, train, wait, publish, checkpoint, evaluate, save."""
    by_role: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for the trainer and each refresh; `wall` is that process's wall-clock."""
    publications: dict[str, float] = field(default_factory=dict)
    """`count` snapshots, `blocked` seconds that training stood still for them, `written` seconds beside it."""
    advice: str = ""
    """What would make a run like this faster, if that is known."""
    engine_note: str = ""
    """Why evaluation was written by another engine than rollout.engine; nothing where it was not."""
    generations: list[dict[str, Any]] = field(default_factory=list)
    """How each generation ended: why (passes, kl_budget, max_steps, max_tokens), after how many passes, at which KL."""
