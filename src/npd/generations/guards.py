"""Guard rails: what does not go together well, seen from the configuration at the start or measured at a generation's end.

A warning changes nothing. It is shown on the terminal once in a run, and stands in events.jsonl and in the report.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npd.config import Config
from npd.errors import UserError
from npd.losses import divergence_of
from npd.observe.display import Display
from npd.observe.events import Events, SpanName, read_events
from npd.store import REFERENCE, Store, recorded

LEAST_MASS = 0.9
"""Of the teacher's probability, on average, in its top-k: with less, the forward KL leaves out a tenth of what it says."""
FOREIGN = 0.3
"""Nats a token by which references may be less likely under the teacher than what it writes itself."""
STALE = 2.0
"""Passes, after its snapshot was taken, from which a response is old for a divergence that weighs by the student."""
ENOUGH = 200  # tokens from which a mean is believed


def warn(about: str, text: str, events: Events, display: Display, **where: int) -> None:
    """Put a warning on record, and show it unless the run showed one about the same thing before."""
    told = any(event.facts.get("about") == about for event in read_events(events.path, SpanName.WARNING))
    events.mark(SpanName.WARNING, about=about, text=text, **where)
    if not told:
        display.say(f"Warning: {text}")


# -- seen from the configuration


def weighs_by_student(config: Config) -> bool:
    """Does the divergence hang on what the student gives tokens to which the teacher gives nothing?"""
    return not getattr(divergence_of(config.loss.divergence, config.loss.options), "on_teacher_support", False)


def notes(config: Config) -> list[str]:
    """What should be known before a distillation begins."""
    return [*_staleness(config), *_warm_up(config)]


def _staleness(config: Config) -> list[str]:
    schedule = config.schedule
    age = schedule.passes + schedule.lead * (schedule.generations > 1)
    bounded = schedule.kl_budget is not None and math.isfinite(schedule.kl_budget)
    if age <= STALE or bounded or not weighs_by_student(config):
        return []
    return [
        f"loss.divergence {config.loss.divergence} is an expectation under the student, and responses are trained on "
        f"until {age:g} passes after their snapshot was taken (schedule.passes {schedule.passes}, lead {schedule.lead:g}); "
        "it bears stale responses worse than the forward KL does. Fewer passes in more generations, a lead of 0, or "
        "schedule.kl_budget (such as 0.1) keep them near."
    ]


def _warm_up(config: Config) -> list[str]:
    """Was the student warmed up by `npd sft` on what another teacher wrote?"""
    run_dir = Path(config.student.model).parent
    try:
        theirs = recorded(run_dir) if (run_dir / "config.yaml").is_file() else None
    except (UserError, OSError):  # whatever it is, it is no run of npd
        return []
    if theirs is None or theirs.command != "sft" or (theirs.tree.get("data") or {}).get("references") != "teacher":
        return []
    wrote = (theirs.tree.get("teacher") or {}).get("model")
    if wrote is None or any(wrote == teacher.model for teacher in config.all_teachers.values()):
        return []
    return [
        f"The student was warmed up in {run_dir} on what {wrote} wrote, and another teacher scores now. Reusing "
        "rollouts with a teacher that did not write the warm-up's data was found to bias what is learnt (arXiv:2604.13010): "
        "warm up on this teacher's own answers (`npd sft` with data.references: teacher), or refresh more often."
    ]


# -- measured


def look_at(generation: int, config: Config, store: Store, events: Events, display: Display) -> None:
    """Measure a finished generation, on its first part, and warn of what should not be so."""
    if not config.loss.kd_weight or not config.has_teacher or store.vocabulary_size is None:
        return
    try:
        table = store.read_part(generation, 0, ["source", "response_ids", "teacher_nll", "topk_logprobs"])
    except (UserError, FileNotFoundError):  # whoever takes it will say so
        return
    if table["topk_logprobs"].null_count or table["teacher_nll"].null_count:
        return
    aligned = any(teacher.align for teacher in config.all_teachers.values())
    found = measured(table, store.vocabulary_size, aligned=aligned)
    if found is None or found.tokens < ENOUGH:
        return
    if generation == REFERENCE and config.data.references == "given" and found.surprise > found.entropy + FOREIGN:
        warn(
            "references",
            f"the references seem not to be the teacher's: it takes {found.surprise:.2f} nats a token to read them, where "
            f"what it writes itself would take about {found.entropy:.2f} (bound: {FOREIGN} more). References of another "
            "author draw the student away from the teacher that scores its responses (arXiv:2604.13010); "
            "data.references: teacher lets the teacher write them.",
            events,
            display,
            generation=generation,
        )
    if config.loss.top_k_mass != "tail" and not weighs_by_student(config) and found.mass < LEAST_MASS:
        warn(
            "top-k mass",
            f"the teacher's top-k hold {found.mass:.0%} of its probability on average (bound: {LEAST_MASS:.0%}), and "
            f"loss.top_k_mass {config.loss.top_k_mass} leaves out the rest. Raise scoring.top_k (now "
            f"{config.scoring.top_k}), or set loss.top_k_mass: tail.",
            events,
            display,
            generation=generation,
        )


class Measured(NamedTuple):
    """A part, read by the teacher; nats a token, over its tokens."""

    tokens: int
    surprise: float
    """What the responses' own tokens cost under the teacher: -log p_T(y_t)."""
    entropy: float
    """What the teacher's own would cost: at most the entropy of its distributions there, the rest outside the top-k spread
    evenly. What it writes itself (at temperature 1 or below) costs no more, on average."""
    mass: float
    """Of its probability, in its top-k; of a teacher with another tokenizer where it is more than the label's own."""


def measured(table: pa.Table, vocabulary: int, *, aligned: bool = False) -> Measured | None:
    """Figures of a part with columns response_ids, teacher_nll and topk_logprobs; None where there is no top-k.

    With `aligned`, positions of which nothing or the label alone could be carried tell nothing of a top-k's mass.
    """
    lengths: npt.NDArray[np.int64] = np.array([len(ids) for ids in table["response_ids"].to_pylist()], np.int64)
    tokens = int(lengths.sum())
    flat = table["topk_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    if not tokens or not len(flat) or len(flat) % tokens:
        return None
    logp = flat.reshape(tokens, -1)
    p = np.exp(logp)
    rest = np.clip(1.0 - p.sum(axis=1), 0.0, 1.0)
    others = max(1, vocabulary - logp.shape[1])
    with np.errstate(all="ignore"):
        inside = np.where(p > 0, -p * logp, 0.0).sum(axis=1)
        outside = np.where(rest > 0, -rest * (np.log(rest) - math.log(others)), 0.0)
    surprise = float((table["teacher_nll"].to_numpy().astype(np.float64) * lengths).sum() / tokens)
    told = (p > 0).sum(axis=1) >= min(2, logp.shape[1]) if aligned else np.ones(tokens, bool)
    mass = float(np.minimum(p[told].sum(axis=1), 1.0).mean()) if told.any() else 1.0
    return Measured(tokens, surprise, float((inside + outside).mean()), mass)
