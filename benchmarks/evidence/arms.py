"""The arms: ways to go on from the same warm student, as sections of a configuration.

All take the same number of optimiser steps of about as many tokens, with the same learning rates. For accuracy after equal
seconds, those whose steps cost more or less than near-policy distillation's are run once more, with as many steps as its
seconds hold, over which the learning rate falls as far: `ARM@seconds`. All but plain SFT and mixing read no true reference;
all but those two and sequence-level KD read the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.tasks import Task

Sections = dict[str, dict[str, Any]]

BASE = "npd-none"
"""What arms are compared with, at equal steps and at equal seconds."""
AT_SECONDS = "@seconds"
PASSES = 7
"""Over a generation, before the next one is written."""
ENDLESS = 10_000
PER_PASS = 15
"""Steps of a pass over a task's prompts, about."""


@dataclass(frozen=True)
class Arm:
    title: str
    command: str
    """sft or distill"""
    sections: Callable[[Task], Sections]
    pace: float = 1.0
    """Steps of it that take the processor as long as a step of `BASE`, as the tuning tasks have shown."""
    solved: bool = False
    """Does it read only prompts that have a reference?"""
    every: int = 13
    """Passes between two evaluations; a step is a pass of strict on-policy."""


def _near(
    rule: str = "none", generations: int = 100, passes: int = PASSES, **sections: dict[str, Any]
) -> Callable[[Task], Sections]:
    """Near-policy distillation until its steps are done: a filter that drops much needs more generations for them."""
    own: Sections = {"schedule": {"generations": generations, "passes": passes}, "selection": {"rule": rule}}

    def made(task: Task) -> Sections:
        return {name: own.get(name, {}) | sections.get(name, {}) for name in {*own, *sections}}

    return made


def _references(task: Task) -> Sections:
    return {"schedule": {"passes": ENDLESS}}


def _answers(task: Task) -> Sections:
    return {"schedule": {"passes": ENDLESS}, "data": {"references": "teacher"}}


def _teachers_text(task: Task) -> Sections:
    """A hundredth of the tokens are the student's own: npd's distillation has some of them always."""
    schedule = {"generations": 1, "passes": ENDLESS, "prompts": max(1, task.prompts // 100), "references": 0.99}
    return {"schedule": schedule, "data": {"references": "teacher"}, "selection": {"rule": "none"}}


def _strict(task: Task) -> Sections:
    return {
        "schedule": {"generations": ENDLESS, "passes": 1, "prompts": max(1, task.prompts // PER_PASS)},
        "selection": {"rule": "none"},
        "training": {"batch_tokens": 1 << 20},
    }


ARMS: dict[str, Arm] = {
    "sft": Arm("more SFT", "sft", _references, pace=1.4, solved=True),
    "kd-sequence": Arm("sequence-level KD", "sft", _answers, pace=1.3),
    "kd-topk": Arm("top-k KD on teacher text", "distill", _teachers_text, pace=1.15),
    "npd": Arm("NPD, paper's settings", "distill", _near("delta_ifd")),
    "npd-adaptive": Arm("NPD, adaptive", "distill", _near("adaptive")),
    BASE: Arm("NPD, no filter", "distill", _near()),
    "npd-mixed": Arm("NPD, no filter, 30% references", "distill", _near(schedule={"references": 0.3}), every=9),
    "strict": Arm("strict on-policy", "distill", _strict, pace=0.2, every=13 * PER_PASS),
}

ABLATIONS: dict[str, Arm] = {
    "passes-all": Arm("no update: every pass over one generation", "distill", _near(generations=1, passes=ENDLESS)),
    "passes-20": Arm("an update after 20 passes", "distill", _near(passes=20)),
    "passes-14": Arm("an update after every 14 passes", "distill", _near(passes=14)),
    "passes-3": Arm("an update after every 3 passes", "distill", _near(passes=3), pace=0.75),
    "passes-1": Arm("an update after every pass", "distill", _near(passes=1), pace=0.4),
    "half-prompts": Arm("half the prompts a generation, 14 passes", "distill", lambda task: _half(task), every=26),
    "ppl-fixed": Arm(
        "Δ-IFD of perplexities, fixed band", "distill", _near("delta_ifd", selection={"ifd": "perplexity_ratio"})
    ),
    "right": Arm("only right responses (the verifier filters)", "distill", _near("verified"), every=26),
    "wrong": Arm("only wrong responses", "distill", _near("refuted")),
    "low-half": Arm("the half with the lowest Δ", "distill", _near("low_half"), every=26),
    "high-half": Arm("the half with the highest Δ", "distill", _near("high_half"), every=26),
    "random-half": Arm("any half", "distill", _near("random_half"), every=26),
    "delta-weighed": Arm("kept with a probability that rises with Δ", "distill", _near("weighed_by_delta"), every=26),
    "token-half": Arm(
        "λ 1, the half of the tokens with the largest KL",
        "distill",
        _near(loss={"kd_weight": 1.0, "divergence": "furthest_tokens"}),
    ),
    "token-weighed": Arm(
        "λ 1, tokens weighed by their KL", "distill", _near(loss={"kd_weight": 1.0, "divergence": "weighed_tokens"})
    ),
    "lambda-0.5": Arm("λ 0.5", "distill", _near(loss={"kd_weight": 0.5})),
    "lambda-1": Arm("λ 1", "distill", _near(loss={"kd_weight": 1.0})),
    "k-1": Arm("k 1", "distill", _near(scoring={"top_k": 1})),
    "k-3": Arm("k 3", "distill", _near(scoring={"top_k": 3})),
    "renormalize": Arm("mass renormalised", "distill", _near(loss={"top_k_mass": "renormalize"})),
    "tail": Arm("mass of the rest as one symbol", "distill", _near(loss={"top_k_mass": "tail"})),
    "mixed-0.6": Arm("60% references", "distill", _near(schedule={"references": 0.6}), every=5),
    "mixed-teacher": Arm(
        "30% teacher text", "distill", _near(schedule={"references": 0.3}, data={"references": "teacher"}), every=9
    ),
}
"""Each is `npd-none` but for one thing; run on the tuning tasks alone."""


def _half(task: Task) -> Sections:
    return _near(passes=14, schedule={"prompts": task.prompts // 2})(task)


EVERY_ARM: dict[str, Arm] = ARMS | ABLATIONS


def timed(arm: str) -> str:
    """The cells of an arm that stand for it at equal seconds."""
    return arm + AT_SECONDS if EVERY_ARM[arm].pace != 1 else arm
