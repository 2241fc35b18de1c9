"""What was expected, written before the first cell was run, and the comparison that decides.

A hypothesis is a difference of two arms, paired by seed, in points of accuracy after equal steps or equal seconds, on some
tasks; or the difference of two such differences. With its 95% interval over seeds it is

- *supported* where the interval lies on the side that the claim says,
- *refuted* where it lies on the other side, or, of a claim that something is within a margin, beyond it,
- *open* otherwise.

Where several tasks are named, their differences are averaged within a seed first, so that the interval stays one over seeds.
Nothing below may be changed once results stand; what is thought of later is added as a further hypothesis, with its date.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Equal = Literal["steps", "seconds", "start"]
"""start: where runs begin, which differs between runs of reinforcement learning."""


@dataclass(frozen=True)
class Contrast:
    """Mean over `tasks` of accuracy of `arm` minus that of `against`, of one stratum if named."""

    tasks: tuple[str, ...]
    arm: str
    against: str
    equal: Equal = "steps"
    stratum: str = ""


@dataclass(frozen=True)
class Hypothesis:
    name: str
    claim: str
    because: str
    first: Contrast
    second: Contrast | None = None
    """What `first` is compared with; None: with nothing."""
    above: float = 0.0
    """The claim is that the difference is above this, in points."""

    @property
    def refuted_by(self) -> str:
        return f"a difference whose whole 95% interval is below {self.above:g}"


TUNING, HELD_OUT = ("sums", "chains", "sorting"), ("coins", "mixed", "palindromes")
ALL = TUNING + HELD_OUT
RL = ("sums", "coins")
"""Where reinforcement learning goes on."""
ABLATED = ("sums", "sorting")
"""Tuning tasks."""

HYPOTHESES = (
    Hypothesis(
        "on-policy beats SFT",
        "NPD without a filter is ahead of more SFT on true references at equal steps, over all six tasks.",
        "the paper's headline; the teacher's distribution says more than one reference",
        Contrast(ALL, "npd-none", "sft"),
    ),
    Hypothesis(
        "on-policy beats teacher text",
        "NPD without a filter is ahead of sequence-level KD at equal steps, over all six tasks.",
        "the student's own mistakes are in its data, and the teacher's top-k stands beside them",
        Contrast(ALL, "npd-none", "kd-sequence"),
    ),
    Hypothesis(
        "whose text matters",
        "NPD without a filter is ahead of top-k KD on the teacher's text at equal steps: the loss alone is not what gains.",
        "exposure bias: both have the same targets, on different prefixes",
        Contrast(ALL, "npd-none", "kd-topk"),
    ),
    Hypothesis(
        "length",
        "The lead of NPD without a filter over top-k KD on teacher text is larger on chains of 7 to 12 steps than on those "
        "of 1 to 3.",
        "errors compound with length, and a student that learned from clean prefixes has never seen its own",
        Contrast(("chains",), "npd-none", "kd-topk", stratum="7-12 steps"),
        Contrast(("chains",), "npd-none", "kd-topk", stratum="1-3 steps"),
    ),
    Hypothesis(
        "many right answers",
        "The lead of NPD without a filter over sequence-level KD is larger on tasks with many right answers (coins, "
        "palindromes) than on those with one (sums, sorting).",
        "one sample of many right ones is a noisy target; a distribution is not",
        Contrast(("coins", "palindromes"), "npd-none", "kd-sequence"),
        Contrast(("sums", "sorting"), "npd-none", "kd-sequence"),
    ),
    Hypothesis(
        "capacity",
        "The lead of NPD without a filter over sequence-level KD is larger for the smaller student (coins at width "
        "64 and 96).",
        "a student that cannot imitate all of the teacher's text gains from learning where it goes itself",
        Contrast(("coins",), "npd-none", "kd-sequence"),
        Contrast(("coins-large",), "npd-none", "kd-sequence"),
    ),
    Hypothesis(
        "strong start",
        "The lead of NPD without a filter over sequence-level KD is larger from a strong start than from a weak one (sums).",
        "a weak student's own text is mostly wrong; a strong one's has the rare mistakes that are left",
        Contrast(("sums-strong",), "npd-none", "kd-sequence"),
        Contrast(("sums",), "npd-none", "kd-sequence"),
    ),
    Hypothesis(
        "teacher not far ahead",
        "Where the student starts near its imperfect teacher (sums-strong), more SFT on true references is ahead of NPD "
        "without a filter at equal steps.",
        "a student cannot learn from a teacher what that does not know, and references are right",
        Contrast(("sums-strong",), "sft", "npd-none"),
    ),
    Hypothesis(
        "the band gains",
        "NPD with the paper's band is ahead of NPD without a filter at equal steps, over all six tasks.",
        "the paper's +1.15 points",
        Contrast(ALL, "npd", "npd-none"),
    ),
    Hypothesis(
        "the band gains on poor prompts",
        "The gain by the paper's band is larger on mixed, where a quarter of the prompts are nonsense, than on the other "
        "five.",
        "there is something to remove",
        Contrast(("mixed",), "npd", "npd-none"),
        Contrast(tuple(task for task in ALL if task != "mixed"), "npd", "npd-none"),
    ),
    Hypothesis(
        "adaptive does no harm",
        "NPD with the adaptive rule is not behind NPD without a filter by more than a point, over all six tasks.",
        "its bounds follow the data",
        Contrast(ALL, "npd-adaptive", "npd-none"),
        above=-1.0,
    ),
    Hypothesis(
        "near-policy is cheap",
        "NPD without a filter is ahead of strict on-policy at equal seconds, over all six tasks.",
        "the paper's speed, at a quality that is nearly the same",
        Contrast(ALL, "npd-none", "strict", "seconds"),
    ),
    Hypothesis(
        "near-policy is nearly on-policy",
        "NPD without a filter is not behind strict on-policy by more than two points at equal steps, over all six tasks.",
        "the KL to the snapshot stays small",
        Contrast(ALL, "npd-none", "strict"),
        above=-2.0,
    ),
    Hypothesis(
        "mixing gains",
        "NPD with 30% true references is ahead of NPD without them at equal steps, over all six tasks.",
        "references are right where the teacher is not, and show what the student never samples",
        Contrast(ALL, "npd-mixed", "npd-none"),
    ),
    Hypothesis(
        "equal seconds",
        "Sequence-level KD is ahead of NPD without a filter at equal seconds, over all six tasks.",
        "its steps are cheaper, and these tasks are easy to imitate; it would speak against the method where text is cheap",
        Contrast(ALL, "kd-sequence", "npd-none", "seconds"),
    ),
    # 2026-11-26, with the cells of reinforcement learning, before the first of them was run
    Hypothesis(
        "a better start for RL",
        "After the same steps of GRPO, the student of NPD without a filter is ahead of that of more SFT (sums, coins).",
        "the paper's 68.73 after GRPO from NPD, against less from SFT",
        Contrast(RL, "grpo-npd-none", "grpo-sft"),
    ),
    Hypothesis(
        "a larger gain by RL",
        "GRPO adds more to the student of NPD without a filter than to that of more SFT (sums, coins).",
        "the paper's +4.36 against +3.58",
        Contrast(RL, "grpo-npd-none", "grpo-sft"),
        Contrast(RL, "grpo-npd-none", "grpo-sft", "start"),
    ),
    Hypothesis(
        "the band helps RL",
        "GRPO adds more to the student of NPD with the paper's band than to that of NPD without a filter (sums, coins).",
        "the paper's +1.88 of the gain by RL",
        Contrast(RL, "grpo-npd", "grpo-npd-none"),
        Contrast(RL, "grpo-npd", "grpo-npd-none", "start"),
    ),
    # 2026-11-26, after the first cells (at 1e-3, of sums and coins) had shown that the band keeps mostly wrong responses
    Hypothesis(
        "the low side",
        "The half of the responses with the lowest Δ teaches more than the half with the highest, at equal steps (sums, "
        "sorting).",
        "what the band drops below 0 was mostly right",
        Contrast(ABLATED, "low-half", "high-half"),
    ),
    # 2026-11-27, after all of the above, before the first cell of these arms: a changed rule, on tuning tasks
    Hypothesis(
        "weights in place of a band",
        "Keeping responses with a probability that rises with the rank of their Δ is ahead of keeping any half of them (sums "
        "and sorting).",
        "the half with the highest Δ was as good as all responses, any half of them behind",
        Contrast(ABLATED, "delta-weighed", "random-half"),
    ),
    Hypothesis(
        "a filter of tokens",
        "With λ 1, the half of the tokens on which teacher and student differ most teaches as much as all of them, but for a "
        "point (sums, sorting).",
        "where both agree the gradient is small already",
        Contrast(ABLATED, "token-half", "lambda-1"),
        above=-1.0,
    ),
    Hypothesis(
        "weighed tokens",
        "With λ 1, weighing tokens by how far apart teacher and student are gains over weighing all of them the same (sums, "
        "sorting).",
        "what decides a solution are few tokens, and there both differ",
        Contrast(ABLATED, "token-weighed", "lambda-1"),
    ),
    # 2026-11-28, after two seeds of updates after 3 to 20 passes and of strict on-policy; before the first cell of the arm
    Hypothesis(
        "renewed at every pass",
        "NPD without a filter that renews its student after every pass is ahead of one that does after every seven, at equal "
        "steps (sums, sorting).",
        "strict on-policy is ahead of seven passes, and the ablations point that way",
        Contrast(ABLATED, "passes-1", "npd-none"),
    ),
    Hypothesis(
        "a pass is fresh enough",
        "With an update after every pass, NPD without a filter is not behind strict on-policy by more than two points at "
        "equal steps (sums, sorting).",
        "within fifteen steps the student moves little",
        Contrast(ABLATED, "passes-1", "strict"),
        above=-2.0,
    ),
    # 2026-11-28, after three seeds of an update after every pass on sorting and one on sums, before the first cell of these
    *(
        Hypothesis(
            f"renewed {often}, at equal seconds",
            f"NPD without a filter that renews its student {often} is ahead of one that does after every seven, at equal "
            "seconds (sums, sorting).",
            "fresh text gains points, and costs seconds",
            Contrast(ABLATED, arm, "npd-none", "seconds"),
        )
        for often, arm in (("after every three passes", "passes-3"), ("at every pass", "passes-1"))
    ),
    # 2026-11-27, with the tuning tasks' cells, before the first of a held-out task (but for teachers and warm students)
    *(
        Hypothesis(
            f"the recipe against {name}",
            f"NPD with 30% true references and no filter, the recipe, is not behind {name} by more than a point at equal "
            "seconds, over the three held-out tasks.",
            "it was ahead of every other arm on each of the three tuning tasks",
            Contrast(HELD_OUT, "npd-mixed", arm, "seconds"),
            above=-1.0,
        )
        for name, arm in (
            ("more SFT", "sft"),
            ("sequence-level KD", "kd-sequence"),
            ("top-k KD on teacher text", "kd-topk"),
            ("NPD without references", "npd-none"),
            ("strict on-policy", "strict"),
        )
    ),
)
