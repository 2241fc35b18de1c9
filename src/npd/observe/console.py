"""What a command says on a terminal beside its progress: every table, and every warning about a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from npd.observe.display import Display
from npd.observe.events import SpanName
from npd.records import EngineCheck, GenerationEnd, Manifest, for_people
from npd.result import DistillResult
from npd.store import REFERENCE

GENERATIONS_SHOWN = 20

WORK = {
    SpanName.LOAD: "loaded",
    SpanName.GENERATE: "generated",
    SpanName.SCORE: "scored",
    SpanName.STORE: "stored",
    SpanName.TRAIN: "trained",
    SpanName.CHECKPOINT: "checkpointed",
    SpanName.VERIFY: "verified",
    SpanName.WAIT: "waited",
    SpanName.PUBLISH: "published",
    SpanName.EVALUATE: "evaluated",
    SpanName.SAVE: "saved",
}


class CostTable(NamedTuple):
    """What a run would take on devices that need not be here."""

    title: str
    rows: list[list[str]]
    """[what, how much]"""
    notes: list[str]


def show_plan(
    command: str, run_dir: str, rows: list[list[str]], notes: Iterable[str], display: Display, costs: CostTable | None = None
) -> None:
    """What a run will do, as [what, how much] rows, and notes below; what it would take on other devices at the end."""
    display.table(f"npd {command}: the plan for {run_dir}", ["what", "how much"], rows)
    for note in notes:
        display.say(note)
    if costs is not None:
        display.table(costs.title, ["what", "how much"], costs.rows)
        for note in costs.notes:
            display.say(note)
        return display.say("The configuration, tokenizers and data are in order.")
    display.say("Nothing was run. The configuration, tokenizers and data are in order.")


def show_generation(manifest: Manifest, display: Display) -> None:
    """A finished generation: verdicts, quantiles of Δ and the bounds that its rule gave, per source."""
    if display.busy:  # one of many short generations
        return
    summary = manifest.selection
    names = sorted({verdict for one in summary.sources.values() for verdict in one.verdicts})
    bounded, judged = summary.bounds is not None, bool(summary.verified)
    rows = []
    for label, one in [("all", summary), *(summary.sources.items() if len(summary.sources) > 1 else ())]:
        shown = [one.delta_ifd_quantiles[q] for q in ("0.05", "0.5", "0.95") if one.delta_ifd_quantiles]
        quantiles = " ".join(f"{q:.2f}" for q in shown) or "-"
        counts = [str(one.verdicts.get(name, 0)) for name in names]
        bounds = [" ".join(f"{b:.2f}" for b in one.bounds or ()) or "-"] if bounded else []
        right = [f"{(one.correct or 0) / one.verified:.1%}" if one.verified else "-"] if judged else []
        rows.append([label or "(none)", str(one.rows), *counts, *right, quantiles, *bounds])
    name = "References" if manifest.generation == REFERENCE else f"Generation {manifest.generation}"
    title = f"{name}: {manifest.response_tokens or 0:,} response tokens, {manifest.length_stops or 0} stopped by length"
    columns = [
        "source",
        "responses",
        *names,
        *(["right"] if judged else []),
        "delta 5/50/95%",
        *(["kept from, to"] if bounded else []),
    ]
    display.table(title, columns, rows)
    if (aligned := manifest.aligned) is not None and aligned.total:
        display.say(
            f"Read with the teacher's own tokenizer: {aligned.exact:,} tokens met one of its own "
            f"({aligned.exact / aligned.total:.1%}), {aligned.merged:,} several or the beginning of one "
            f"({aligned.merged / aligned.total:.1%}), {aligned.left_out:,} are left to cross-entropy "
            f"({aligned.left_out / aligned.total:.1%})."
        )


def warn_of_engine(check: EngineCheck, bound: float, display: Display) -> None:
    """Say so if an engine is further from transformers than its kernels explain; `bound` in nats a token."""
    if not check.mean_abs_difference <= bound:
        display.say(
            f"Warning: the engine's log-probabilities differ from the snapshot's in transformers by "
            f"{check.mean_abs_difference:.3g} nats per token on average (rollout.check_bound {bound:g}, "
            f"{check.tokens} tokens of {check.samples} responses). Precision and kernels explain some 0.01: it "
            "may answer with other weights, or in a precision that is too low for this model."
        )


def warn_of_age(generation: int, passes: float, display: Display) -> None:
    """Say that a generation was too old before all of it was read; `passes` is how much was trained on."""
    display.say(
        f"Generation {generation} passed schedule.kl_budget in its first pass, after {passes:.2f} passes: its "
        "responses were too old before all were read. A smaller schedule.lead, or a larger budget, wastes less."
    )


def show_evaluation(who: str, figures: Mapping[str, float], display: Display) -> None:
    """The figures of an evaluation, in a line."""
    shown = [f"{name.partition('/')[2]} {value:.4g}" for name, value in figures.items() if for_people(name)]
    display.say(f"{who}: {', '.join(shown)}")


def show_figures(title: str, columns: Mapping[str, Mapping[str, float]], display: Display) -> None:
    """Evaluation figures as a table, an accuracy with its interval, one with a standard error with that."""
    names = list(dict.fromkeys(key for figures in columns.values() for key in figures if for_people(key)))
    rows = [[name.removeprefix("eval/"), *(_figure(figures, name) for figures in columns.values())] for name in names]
    if rows:
        display.table(title, ["figure", *columns], rows)


def _figure(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    if name.endswith("/accuracy"):
        return f"{figures[name]:.1%} [{figures[name + '_low']:.1%}, {figures[name + '_high']:.1%}]"
    error = figures.get(f"{name}_stderr")
    return f"{figures[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def show_result(result: DistillResult, display: Display) -> None:
    """What a finished run was: figures, how its generations ended, and where each process's time went."""
    show_figures(f"{result.run_dir}", {"before": result.before, "after": result.after}, display)
    ended = [GenerationEnd.from_json(line) for line in result.generations[-GENERATIONS_SHOWN:]]
    rows = [
        [
            str(end.generation),
            f"{end.passes:.2f}",
            end.reason,
            "-" if end.near_policy_kl_smoothed is None else f"{end.near_policy_kl_smoothed:.4f}",
        ]
        for end in ended
    ]
    told = len(result.generations) > 1 or any(end.reason != "passes" for end in ended)
    if told and any(end.near_policy_kl_smoothed is not None for end in ended):
        title = f"Generations (the last {len(ended)})" if len(ended) < len(result.generations) else "Generations"
        proxy = " (proxy)" * any(end.near_policy_kl_is_proxy for end in ended)
        display.table(title, ["generation", "passes", "ended by", f"near-policy KL{proxy}"], rows)
    trained = result.seconds.get(SpanName.TRAIN, 0.0)
    rate = f", {result.tokens / trained:,.0f} tokens/s while training" if trained else ""
    display.say(f"{result.steps} optimiser steps on {result.tokens:,} response tokens{rate}.")
    for role, seconds in result.by_role.items():
        if role.startswith("trainer-"):  # which does what the trainer does
            continue
        display.say(f"{role}: {spent(seconds)} of {seconds['wall']:.0f} s.")
    if count := int(result.publications.get("count", 0)):
        blocked, written = (result.publications[name] for name in ("blocked", "written"))
        display.say(
            f"{count} snapshots published: training stood still for {blocked:.2f} s, they took {written:.2f} s to write."
        )
    if result.engine_note:
        display.say(result.engine_note)
    if result.advice:
        display.say(result.advice)
    display.say(f"The student is in {result.student}.")


def spent(seconds: Mapping[str, float]) -> str:
    """Shares of a process's wall-clock, such as "generated 38%, scored 7%"."""
    wall = seconds["wall"] or 1.0
    shares = {label: seconds[name] / wall for name, label in WORK.items() if seconds.get(name, 0.0) > 0.0005 * wall}
    return ", ".join(f"{label} {share:.1%}" if share < 0.01 else f"{label} {share:.0%}" for label, share in shares.items())
