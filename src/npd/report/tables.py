"""A run's figures as numbers and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from npd.config import flat
from npd.intervals import wilson_interval
from npd.observe.events import SpanName, seconds_by_role
from npd.records import KEPT, EngineCheck, number_of
from npd.report.facts import UNDER_WAY, RunFacts
from npd.report.figures import evaluated, label, number, smooth_near_policy, verdicts_of
from npd.report.samples import Browser
from npd.report.shares import interval, interval_note, percent, point
from npd.store import REFERENCE

MOST_ROWS = 30  # of a table; of more, the first and the last

WORK: tuple[str, ...] = (
    SpanName.TRAIN,
    SpanName.GENERATE,
    SpanName.SCORE,
    SpanName.WAIT,
    SpanName.EVALUATE,
    SpanName.LOAD,
    SpanName.CHECKPOINT,
    SpanName.PUBLISH,
    SpanName.SAVE,
    SpanName.STORE,
    SpanName.VERIFY,
    SpanName.CHECK,
    SpanName.FINISH,
    UNDER_WAY,
)
"""What a process's time is split into; the rest is "other"."""
NAMES: dict[str, str] = {SpanName.LOAD: "load models"}


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    title: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A part of a whole, for a bar."""

    name: str
    share: float
    """0..1"""
    value: str


@dataclass(frozen=True)
class Bar:
    title: str
    shares: list[Share] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"{self.title}: " + ", ".join(f"{s.name} {s.value}" for s in self.shares)


def verdict_counts(run: RunFacts, generation: int | None = None) -> Counter[str]:
    """Responses per verdict: of finished generations by their manifests, of others by what is there."""
    counts: Counter[str] = Counter()
    of, verdicts = run.column("generation"), run.column("verdict")
    for g in {*run.manifests, *np.unique(of).tolist()}:
        if (generation is not None and g != generation) or (generation is None and g == REFERENCE and len(run.parts) > 1):
            continue
        counts += Counter(run.manifests[g].selection.verdicts if g in run.manifests else verdicts[of == g].tolist())
    return counts


def kept(counts: Counter[str]) -> int:
    return sum(counts[verdict] for verdict in KEPT)


def wall_seconds(run: RunFacts) -> float:
    """The trainer's wall-clock over all its processes: time in which nothing worked on the run is not in it."""
    return seconds_by_role(run.events).get("trainer", {}).get("wall", 0.0)


def trained_tokens(run: RunFacts) -> int:
    tokens = run.series("tokens")
    return int(np.nanmax(tokens)) if np.isfinite(tokens).any() else 0


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def tiles(run: RunFacts) -> list[Tile]:
    """The headline: before and after, the teacher's ceiling, speed, kept share, staleness."""
    out = []
    for key in evaluated([run]):
        having = [line for line in run.evaluations if key in line.figures]
        first, last = having[0], having[-1]
        if "pass@" in key or key.endswith("top1_agreement"):
            continue
        ceiling = interval(run.teacher, key.replace("eval/", "teacher/", 1))
        beside = f"; teacher {ceiling}" if ceiling != "–" else ""
        name = key.removeprefix("eval/").replace("/accuracy", " accuracy")
        name = name.replace("reverse_kl_to", "reverse KL to the").replace("kl_to_teacher", "KL to the teacher")
        if first is last:
            out.append(Tile(name, interval(last.figures, key), f"at step {last.step}{beside}"))
        else:
            before, after = interval(first.figures, key), interval(last.figures, key)
            head = f"{point(first.figures, key)} → {point(last.figures, key)}"
            told = f"before {before}, after {after}{beside}"
            detail = told if "[" in after or "±" in after else f"nats a token, before and after{beside}"
            out.append(Tile(name, head, detail))
    wall, tokens = wall_seconds(run), trained_tokens(run)
    if wall and tokens:
        trained, speeds = np.diff(run.series("tokens"), prepend=0.0), run.series("tokens_per_second")
        measured = np.isfinite(trained) & (speeds > 0)
        busy = float((trained[measured] / speeds[measured]).sum())  # of the steps that count: some may have been lost since
        inside = f"; {trained[measured].sum() / busy:,.0f} while training" if busy else ""
        out.append(Tile("Speed", f"{tokens / wall:,.0f} tokens/s", f"response tokens trained a second of wall-clock{inside}"))
    if wall:
        steps = f"{len(run.steps):,} steps on {tokens:,} response tokens" if run.steps else "no optimiser step yet"
        out.append(Tile("Wall-clock", duration(wall), steps))
    counts = verdict_counts(run)
    if counts and set(counts) != {"reference"}:
        n, k = counts.total(), kept(counts)
        low, high = wilson_interval(k / n, n)
        out.append(Tile("Kept responses", percent(k / n), f"{k:,} of {n:,}; 95% interval {percent(low)} to {percent(high)}"))
    smooth = smooth_near_policy(run)
    smooth = smooth[np.isfinite(smooth)]
    if len(smooth):
        budget = run.option("schedule.kl_budget")
        limited = isinstance(budget, int | float) and np.isfinite(budget)
        beside = f"budget {budget:g}" if limited else "no budget set"
        detail = f"nats a token, smoothed, at its highest; {number(float(smooth[-1]))} at the end; {beside}"
        out.append(Tile("Near-policy KL", number(float(smooth.max()), 3), detail))
    return out


def time_bars(run: RunFacts) -> list[Bar]:
    """Where each process's time went."""
    out = []
    by_role = seconds_by_role(run.events)
    for role in sorted(by_role, key=lambda name: (not name.startswith("trainer"), name)):
        seconds = by_role[role]
        wall = seconds.get("wall", 0.0)
        if not wall:
            continue
        shown = {name: seconds[name] for name in WORK if seconds.get(name, 0.0) > 0.0005 * wall}
        rest = wall - sum(shown.values())
        if rest > 0.001 * wall:
            shown["other"] = rest
        shares = [
            Share(NAMES.get(name, str(name)), spent / wall, f"{spent:.1f} s ({percent(spent / wall)})")
            for name, spent in shown.items()
        ]
        out.append(Bar(f"Time of {role}, {duration(wall)}", sorted(shares, key=lambda s: -s.share)))
    return out


def response_bars(run: RunFacts) -> list[Bar]:
    """Where responses and their tokens went."""
    out = []
    counts = verdict_counts(run)
    if n := counts.total():
        seen = [verdict for verdict in verdicts_of([run]) if counts[verdict]]
        shares = [Share(v, counts[v] / n, f"{counts[v]:,} ({percent(counts[v] / n)})") for v in seen]
        out.append(Bar(f"Responses, {n:,}", shares))
    tokens = token_counts(run)
    if total := sum(tokens.values()):
        shares = [Share(name, n / total, f"{n:,} ({percent(n / total)})") for name, n in tokens.items() if n]
        there = sum(n for g, parts in run.parts.items() if g != REFERENCE or len(run.parts) == 1 for n in parts.values())
        which = "on disk" if total >= there else f"of the parts that were read, out of {there:,} on disk"
        out.append(Bar(f"Response tokens {which}, {total:,}", shares))
    return out


def token_counts(run: RunFacts) -> dict[str, int]:
    """Response tokens of the responses that were read, kept and by why they were dropped."""
    verdict, tokens = run.column("verdict"), run.column("tokens")
    own = run.column("generation") != REFERENCE if len(run.parts) > 1 else np.ones(len(verdict), bool)
    return {v: int(tokens[own & (verdict == v)].sum()) for v in verdicts_of([run]) if (own & (verdict == v)).any()}


def generation_table(run: RunFacts, browser: Browser) -> Table | None:
    """One row a generation: what was written, what was kept, how it ended."""
    of, tokens, finish = run.column("generation"), run.column("tokens"), run.column("finish_reason")
    numbers = sorted({*run.manifests, *run.parts})
    if not numbers:
        return None
    shown = [g for g in middle_left_out(numbers) if g is not None]
    dropped = [v for v in verdicts_of([run]) if v not in KEPT and any(verdict_counts(run, g)[v] for g in shown)]
    ended = {end.generation: end for end in run.ended}
    rows = []
    for g in middle_left_out(numbers):
        if g is None:
            rows.append(["…"])
            continue
        manifest, mine = run.manifests.get(g), of == g
        counts = verdict_counts(run, g)
        n = counts.total()
        quantiles = manifest.selection.delta_ifd_quantiles if manifest else {}
        delta = " / ".join(f"{quantiles[q]:.3f}" for q in ("0.05", "0.5", "0.95")) if quantiles else "–"
        response_tokens = manifest.response_tokens if manifest else sum(run.parts.get(g, {}).values())
        cut = manifest.length_stops if manifest else int((finish[mine] == "length").sum())
        mass, agreed, measured = browser.mass.get(g, (None, None, 0))
        end = ended.get(g)
        rows.append(
            [
                "references" if g == REFERENCE else f"g{g}" + ("" if manifest else " (unfinished)"),
                f"{n:,}",
                percent(kept(counts) / n) if n else "–",
                *(f"{counts[v]:,}" for v in dropped),
                delta,
                f"{response_tokens:,}" if response_tokens is not None else "–",
                number(float(np.median(tokens[mine]))) if mine.any() else "–",
                percent(cut / n) if n and cut is not None else "–",
                "–" if mass is None else f"{mass:.4f}",
                "–" if agreed is None else percent(agreed),
                f"{end.reason} after {number(end.passes, 3)}" if end else "–",
                number(end.near_policy_kl_smoothed, 3) if end else "–",
            ]
        )
    columns = [
        "generation",
        "responses",
        "kept",
        *dropped,
        "Δ at 5 / 50 / 95%",
        "response tokens",
        "median length",
        "cut off",
        "top-k mass",
        "teacher's first choice",
        "ended by (passes)",
        "near-policy KL",
    ]
    rows = [row + [""] * (len(columns) - len(row)) for row in rows]
    measured = sum(count for *_, count in browser.mass.values())
    note = (
        "Top-k mass: mean probability that the teacher's stored top-k hold together. Teacher's first choice: share of "
        f"sampled tokens that are it. Both measured on {measured:,} tokens of the parts that samples are shown from."
    )
    return Table("Generations", columns, rows, note)


def middle_left_out(numbers: list[int], most: int = MOST_ROWS) -> list[int | None]:
    if len(numbers) <= most:
        return list(numbers)
    return [*numbers[: most // 2], None, *numbers[-most // 2 :]]


def source_table(run: RunFacts) -> Table | None:
    """One row a source: verdicts and quantiles of Δ, of the responses that were read."""
    sources = run.column("source")
    names = sorted({str(s) for s in sources})
    if len(names) < 2:
        return None
    verdict, delta, tokens = run.column("verdict"), run.column("delta_ifd").astype(float), run.column("tokens")
    rows = []
    for name in names[:MOST_ROWS]:
        mine = sources == name
        n, counts = int(mine.sum()), Counter(verdict[mine].tolist())
        low, high = wilson_interval(kept(counts) / n, n)
        d = delta[mine]
        d = d[np.isfinite(d)]
        q = " / ".join(f"{v:.3f}" for v in np.quantile(d, (0.05, 0.5, 0.95))) if len(d) else "–"
        share = f"{percent(kept(counts) / n)} [{100 * low:.1f}, {100 * high:.1f}]"
        others = ", ".join(f"{v} {c:,}" for v, c in sorted(counts.items()) if v not in KEPT)
        rows.append([name or "(none)", f"{n:,}", share, others or "–", q, number(float(np.median(tokens[mine])))])
    note = f"{len(names) - MOST_ROWS} more sources are not shown." if len(names) > MOST_ROWS else ""
    columns = ["source", "responses", "kept [95%]", "dropped", "Δ at 5 / 50 / 95%", "median length"]
    return Table("Sources", columns, rows, note)


def evaluation_table(runs: Sequence[RunFacts]) -> Table | None:
    """Evaluation figures before and after, with intervals, and the teacher's."""
    keys = evaluated(runs)
    if not keys:
        return None
    rows = []
    for key in keys:
        for i, run in enumerate(runs):
            if run.evaluations:
                ends = [interval(line.figures, key) for line in (run.evaluations[0], run.evaluations[-1])]
                ceiling = interval(run.teacher, key.replace("eval/", "teacher/", 1))
                rows.append([key.removeprefix("eval/"), label(runs, i), *ends, ceiling])
    columns = ["figure", "run", "before", "after", "teacher"]
    shown = [c for c in range(5) if (c != 1 or len(runs) > 1) and (c < 4 or any(row[c] != "–" for row in rows))]
    return Table(
        "Evaluation",
        [columns[c] for c in shown],
        [[row[c] for c in shown] for row in rows],
        interval_note(runs),
    )


def engine_table(run: RunFacts) -> Table | None:
    """How far the rollout engine's log-probabilities were from those of the same weights in transformers."""
    rows = []
    for event in [e for e in run.events if e.name == SpanName.ENGINE]:
        with suppress(ValueError):
            check, generation = EngineCheck.from_json(event.facts), number_of(event.facts.get("generation"))
            rows.append([number(value) for value in (generation, *check.to_json().values())])
    note = "Log-probabilities of the engine minus those of the snapshot in transformers, nats a token."
    columns = ["generation", *(spec.name.replace("_", " ") for spec in fields(EngineCheck))]
    return Table("Checks of the engine", columns, rows[-MOST_ROWS:], note) if rows else None


def run_table(runs: Sequence[RunFacts]) -> Table:
    """One row a run: what it cost and what came of it, for a comparison."""
    rows = []
    for i, run in enumerate(runs):
        wall, tokens = wall_seconds(run), trained_tokens(run)
        speeds = run.series("tokens_per_second")
        speeds = speeds[np.isfinite(speeds)]
        counts = verdict_counts(run)
        n = 0 if set(counts) == {"reference"} else counts.total()
        low, high = wilson_interval(kept(counts) / n, n) if n else (0.0, 1.0)
        smooth = smooth_near_policy(run)
        smooth = smooth[np.isfinite(smooth)]
        q = [f"{v:,.0f}" for v in np.quantile(speeds, (0.05, 0.5, 0.95))] if len(speeds) else []
        rows.append(
            [
                label(runs, i),
                run.status.kind,
                f"{len(run.steps):,}",
                f"{tokens:,}",
                duration(wall),
                f"{tokens / wall:,.0f}" if wall else "–",
                f"{q[1]} [{q[0]}, {q[2]}]" if q else "–",
                f"{percent(kept(counts) / n)} [{100 * low:.1f}, {100 * high:.1f}]" if n else "–",
                number(float(smooth.max()), 3) if len(smooth) else "–",
                number(run.steps[-1].loss) if run.steps else "–",
            ]
        )
    columns = [
        "run",
        "state",
        "steps",
        "tokens trained",
        "wall-clock",
        "tokens/s of wall-clock",
        "tokens/s of a step: median [5%, 95%]",
        "kept [95%]",
        "near-policy KL, highest",
        "last loss",
    ]
    return Table("Runs", columns, rows)


def differing_table(runs: Sequence[RunFacts]) -> Table:
    """Options and versions that are not alike in all runs."""
    trees = [flat(run.config | {"versions": run.versions, "command": run.command}) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree if key != "run_dir"))
    rows = []
    for key in keys:
        values = [as_yaml(tree[key]) if key in tree else "–" for tree in trees]
        if len(set(values)) > 1:
            rows.append([key, *values])
    note = "" if rows else "The runs have the same options and versions."
    return Table("What differs", ["key", *(label(runs, i) for i in range(len(runs)))], rows, note)


def as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
