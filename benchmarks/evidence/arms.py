"""The arms: ways to go on from the same warm student, as sections of a configuration.

All take the same number of optimiser steps of about as many tokens, at the same constant learning rate. Those whose steps are
cheaper than near-policy distillation's go on for as many again, so that accuracy after equal seconds can be read from their
curve. All but plain SFT and mixing read no true reference; all but those two and sequence-level KD read the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.tasks import Task

Sections = dict[str, dict[str, Any]]

LONGER = 1.5
"""How many times the steps of the others the cheaper arms take."""
PASSES = 7
ENDLESS = 10_000


@dataclass(frozen=True)
class Arm:
    title: str
    command: str
    """sft or distill"""
    sections: Callable[[Task], Sections]
    longer: bool = False
    solved: bool = False
    """Does it read only prompts that have a reference?"""
    every: int = 4
    """Passes between two evaluations; a step is a pass of strict on-policy."""


def _near(
    rule: str = "none", generations: int = 20, passes: int = PASSES, **sections: dict[str, Any]
) -> Callable[[Task], Sections]:
    """Near-policy distillation until its steps are done: a filter that drops much starts a third generation for them."""
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
        "schedule": {"generations": ENDLESS, "passes": 1, "prompts": max(1, task.prompts // task.per_pass)},
        "selection": {"rule": "none"},
        "training": {"batch_tokens": 1 << 20},
    }


ARMS: dict[str, Arm] = {
    "sft": Arm("more SFT", "sft", _references, longer=True, solved=True),
    "kd-sequence": Arm("sequence-level KD", "sft", _answers, longer=True),
    "kd-topk": Arm("top-k KD on teacher text", "distill", _teachers_text, longer=True),
    "npd": Arm("NPD, paper's settings", "distill", _near("delta_ifd")),
    "npd-adaptive": Arm("NPD, adaptive", "distill", _near("adaptive")),
    "npd-none": Arm("NPD, no filter", "distill", _near()),
    "npd-mixed": Arm("NPD, no filter, 30% references", "distill", _near(schedule={"references": 0.3}), every=2),
    "strict": Arm("strict on-policy", "distill", _strict, every=50),
}

ABLATIONS: dict[str, Arm] = {
    "updates-0": Arm("no update: every pass over one generation", "distill", _near(generations=1, passes=40)),
    "updates-2": Arm("2 updates, after 5 passes each", "distill", _near(passes=5)),
    "updates-4": Arm("4 updates, after 3 passes each", "distill", _near(passes=3)),
    "passes-10": Arm("half the prompts a generation, 14 passes", "distill", lambda task: _half(task), every=8),
    "ppl-fixed": Arm(
        "Δ-IFD of perplexities, fixed band", "distill", _near("delta_ifd", selection={"ifd": "perplexity_ratio"}), every=20
    ),
    "right": Arm("only right responses (the verifier filters)", "distill", _near("verified"), every=8),
    "wrong": Arm("only wrong responses", "distill", _near("refuted")),
    "low-half": Arm("the half with the lowest Δ", "distill", _near("low_half"), every=8),
    "high-half": Arm("the half with the highest Δ", "distill", _near("high_half"), every=8),
    "random-half": Arm("any half", "distill", _near("random_half"), every=8),
    "lambda-0.5": Arm("λ 0.5", "distill", _near(loss={"kd_weight": 0.5})),
    "lambda-1": Arm("λ 1", "distill", _near(loss={"kd_weight": 1.0})),
    "k-1": Arm("k 1", "distill", _near(scoring={"top_k": 1})),
    "k-3": Arm("k 3", "distill", _near(scoring={"top_k": 3})),
    "renormalize": Arm("mass renormalised", "distill", _near(loss={"top_k_mass": "renormalize"})),
    "tail": Arm("mass of the rest as one symbol", "distill", _near(loss={"top_k_mass": "tail"})),
    "mixed-0.6": Arm("60% references", "distill", _near(schedule={"references": 0.6}), every=2),
    "mixed-teacher": Arm(
        "30% teacher text", "distill", _near(schedule={"references": 0.3}, data={"references": "teacher"}), every=2
    ),
}
"""Each is `npd-none` but for one thing; run on the tuning tasks alone."""


def _half(task: Task) -> Sections:
    return _near(passes=14, schedule={"prompts": task.prompts // 2})(task)


EVERY_ARM: dict[str, Arm] = ARMS | ABLATIONS
