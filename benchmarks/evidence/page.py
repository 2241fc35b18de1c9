"""docs/evidence.md: its tables and plots, from the entries alone; its words stay as they are between the marks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence import plots
from benchmarks.evidence.analysis import (
    Entries,
    Entry,
    Mean,
    end,
    fate_of,
    once,
    over_seeds,
    paired,
    seeds_of,
)
from benchmarks.evidence.arms import ABLATIONS, ARMS, BASE, EVERY_ARM, timed
from benchmarks.evidence.cells import TEACHER, Cell
from benchmarks.evidence.grpo import PREFIX, STARTS, WINDOW, steps_to
from benchmarks.evidence.hypotheses import ABLATED, ALL, HYPOTHESES, RL
from benchmarks.evidence.tasks import TASKS
from benchmarks.tables import table


def write(entries: Entries, page: Path) -> None:
    """Make the page's blocks and its plots anew."""
    text = page.read_text()
    for name, make in BLOCKS.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        assert mark, f"{page} has no block {name}"
        after = rest[rest.index("<!-- end -->") :]
        text = f"{before}{mark}{make(entries)}\n{after}"
    page.write_text(text)
    plots.curves(entries, page.with_name("evidence-curves.svg"))
    plots.differences(entries, page.with_name("evidence-differences.svg"))


def shown(mean: Mean | None, spec: str, scale: float = 1.0) -> str:
    if mean is None:
        return ""
    return format(Mean(scale * mean.value, None if mean.half is None else scale * mean.half, mean.seeds), spec)


def brief(mean: Mean | None, digits: int, scale: float = 1.0) -> str:
    """A mean without its interval."""
    return "" if mean is None else f"{scale * mean.value:,.{digits}f}"


def there(entries: Entries, tasks: Sequence[str] = tuple(TASKS)) -> list[str]:
    return [task for task in tasks if any(cell.task == task for cell in entries)]


def at_start(entry: Entry) -> float:
    return 100 * float(entry["curve"][0]["accuracy"])


def after_steps(entry: Entry) -> float:
    return 100 * float(entry["curve"][-1]["accuracy"])


def tasks(entries: Entries) -> str:
    rows = []
    for name, task in TASKS.items():
        warm = next((arm for arm in (BASE, *ARMS) if seeds_of(entries, name, arm)), None)
        rows.append(
            [
                name,
                "held out" if task.held_out else "tuning",
                f"{task.size[0]} × {task.size[1]}",
                "128 × 4" if name == "chains" else f"{task.teacher_size[0]} × {task.teacher_size[1]}",
                brief(over_seeds(entries, name, TEACHER, at_start), 1),
                "" if warm is None else brief(over_seeds(entries, name, warm, at_start), 1),
                str(task.prompts),
                str(task.steps),
                str(len(seeds_of(entries, name, warm))) if warm else "0",
            ]
        )
    heads = ["task", "used for", "student", "teacher", "teacher %", "warm student %", "prompts", "steps", "seeds"]
    return table(heads, rows)


def accuracies(entries: Entries) -> str:
    return "\n\n".join(f"**{name}**\n\n{_accuracies(entries, name)}" for name in there(entries))


def _accuracies(entries: Entries, task: str) -> str:
    rows = []
    for name, arm in ARMS.items():
        if not seeds_of(entries, task, name):
            continue
        steps, seconds = (
            "" if name == BASE else shown(_mean(paired(entries, task, name, BASE, equal)), "+.1f")
            for equal in ("steps", "seconds")
        )
        rows.append(
            [
                arm.title,
                str(len(seeds_of(entries, task, name))),
                shown(over_seeds(entries, task, name, after_steps), ".1f"),
                steps,
                seconds,
                brief(_seconds(entries, task, name), 1),
                "" if timed(name) == name else brief(_seconds(entries, task, timed(name)), 1),
                *(brief(over_seeds(entries, task, name, lambda e, k=k: once(e, f"pass@{k}")), 1, 100) for k in (1, 8)),  # type: ignore[misc]
                brief(over_seeds(entries, task, name, lambda e: once(e, "kl_to_teacher")), 3),
                brief(over_seeds(entries, task, name, lambda e: e["curve"][-1]["length"]), 1),
            ]
        )
    heads = [
        "arm",
        "seeds",
        "accuracy %",
        "− no filter, equal steps",
        "equal seconds",
        "CPU s",
        "of the other run",
        "pass@1",
        "pass@8",
        "KL",
        "length",
    ]
    return table(heads, rows)


def _seconds(entries: Entries, task: str, name: str) -> Mean | None:
    """CPU seconds, of the cells from the kind of processor that most of the task's come from."""
    kinds = Counter(entry["machine"]["processor"] for cell, entry in entries.items() if cell.task == task)
    most = kinds.most_common(1)[0][0] if kinds else ""
    return over_seeds(entries, task, name, lambda e: end(e) if e["machine"]["processor"] == most else None)


def _mean(values: dict[int, float]) -> Mean | None:
    return Mean.of(list(values.values())) if values else None


def together(entries: Entries) -> str:
    """Each arm over all six tasks, of the seeds that have them all."""
    rows = []
    for name, arm in ARMS.items():
        if name == BASE:
            continue
        cells: list[str] = []
        for chosen in (ALL, [t for t in ALL if not TASKS[t].held_out], [t for t in ALL if TASKS[t].held_out]):
            for equal in ("steps", "seconds"):
                each = [paired(entries, task, name, BASE, equal) for task in chosen]
                seeds = set.intersection(*map(set, each))
                mean = _mean({seed: sum(one[seed] for one in each) / len(each) for seed in seeds})
                cells.append(shown(mean, "+.1f") + (f" ({mean.seeds})" if mean else ""))
        rows.append([arm.title, *cells])
    heads = ["arm − NPD without a filter, points (seeds)"]
    heads += [f"{which}, equal {equal}" for which in ("all", "tuning", "held out") for equal in ("steps", "seconds")]
    return table(heads, rows)


def hypotheses(entries: Entries) -> str:
    rows = []
    for one in HYPOTHESES:
        mean, fate = fate_of(entries, one)
        above = f" (above {one.above:g})" if one.above else ""
        seeds = "0" if mean is None else str(mean.seeds)
        rows.append([one.name, one.claim + above, shown(mean, "+.1f"), seeds, fate])
    return table(["hypothesis", "claim", "difference, points", "seeds", "fate"], rows)


def ablations(entries: Entries) -> str:
    rows = []
    for name in ("npd", "npd-adaptive", "npd-mixed", *ABLATIONS):
        cells = []
        for task in ABLATED:
            mean = _mean(paired(entries, task, name, BASE, "steps"))
            cells += [shown(mean, "+.1f"), "" if mean is None else str(mean.seeds), brief(_seconds(entries, task, name), 1)]
            timely = {} if timed(name) == name else paired(entries, task, name, BASE, "seconds")
            cells.append(shown(_mean(timely), "+.1f"))
        if any(cells):
            rows.append([EVERY_ARM[name].title, *cells])
    heads = ["NPD, no filter, but"] + [
        f"{task}: {what}" for task in ABLATED for what in ("points", "seeds", "CPU s", "equal seconds")
    ]
    return table(heads, rows)


def filters(entries: Entries) -> str:
    """What was kept, and how right what was kept and what was dropped was by the verifier."""
    rows = []
    for task in there(entries):
        for name in ("npd", "npd-adaptive", "ppl-fixed"):
            kept, good, bad = (over_seeds(entries, task, name, one) for one in (_kept, _right_kept, _right_dropped))
            if kept is not None:
                rows.append(
                    [task, EVERY_ARM[name].title, str(kept.seeds), *(brief(one, 1, 100) for one in (kept, good, bad))]
                )
    return table(["task", "arm", "seeds", "kept %", "right of the kept %", "right of the dropped %"], rows)


def _kept(entry: Entry) -> float | None:
    return entry["filter"]["kept"] / entry["filter"]["rows"] if entry["filter"] else None


def _right_kept(entry: Entry) -> float | None:
    found = entry["filter"]
    return found["right_kept"] / found["kept"] if found and found["kept"] else None


def _right_dropped(entry: Entry) -> float | None:
    found = entry["filter"]
    dropped = found["rows"] - found["kept"] if found else 0
    return (found["right"] - found["right_kept"]) / dropped if dropped else None


STAGES = ("generate", "score", "train", "load", "publish", "store", "save")


def stages(entries: Entries) -> str:
    """Shares of a run's wall-clock without evaluation, and tokens written, over tasks and seeds."""
    rows = []
    for name, arm in ARMS.items():
        mine = [entry for cell, entry in entries.items() if cell.arm == name and cell.task in ALL]
        if not mine:
            continue
        shares = [
            sum(one["stages"].get(stage, 0.0) for one in mine)
            / sum(sum(s for n, s in one["stages"].items() if n not in ("wall", "evaluate")) for one in mine)
            for stage in STAGES
        ]
        tokens = [sum(one["generated"][who] for one in mine) / len(mine) / 1000 for who in ("student", "references")]
        trained = sum(one["tokens"] for one in mine) / len(mine) / 1000
        rows.append(
            [arm.title, str(len(mine)), *(f"{share:.0%}" for share in shares), *(f"{n:.1f}" for n in (*tokens, trained))]
        )
    return table(["arm", "cells", *STAGES, "k tokens by the student", "k tokens of references", "k tokens trained"], rows)


def strata(entries: Entries) -> str:
    """Accuracy by kind of problem after equal steps, of tasks whose kinds differ."""
    parts = []
    for task in there(entries, ("chains", "mixed", "palindromes")):
        first = next(entry for cell, entry in entries.items() if cell.task == task and cell.arm != TEACHER)
        names = sorted((name for name in first["curve"][0] if name.startswith("of ")), key=_number)
        rows = []
        for arm in (TEACHER, *ARMS):
            means = [over_seeds(entries, task, arm, lambda e, n=n: e["curve"][-1][n]) for n in names]  # type: ignore[misc]
            if means[0] is not None:
                title = "teacher" if arm == TEACHER else ARMS[arm].title
                rows.append([title, str(means[0].seeds), *(brief(mean, 1, 100) for mean in means)])
        parts.append(table([task, "seeds", *(name.removeprefix("of ") for name in names)], rows))
    return "\n\n".join(parts)


def _number(name: str) -> tuple[int, str]:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0, name


def reinforcement(entries: Entries) -> str:
    """Before and after GRPO, by where it began."""
    rows = []
    for task in there(entries, RL):
        for start in STARTS:
            name = PREFIX + start
            if not seeds_of(entries, task, name):
                continue

            def over(figure: Callable[[Entry], float | None], task: str = task, name: str = name) -> Mean | None:
                return over_seeds(entries, task, name, figure)

            rows.append(
                [
                    task,
                    EVERY_ARM[start].title,
                    str(len(seeds_of(entries, task, name))),
                    shown(over(at_start), ".1f"),
                    shown(over(lambda e: 100 * (e["curve"][-1]["accuracy"] - e["curve"][0]["accuracy"])), "+.1f"),
                    shown(over(after_steps), ".1f"),
                    *(
                        " → ".join(brief(over(lambda e, k=k, at=at: e["curve"][at][f"pass@{k}"]), 1, 100) for at in (0, -1))  # type: ignore[misc]
                        for k in (1, 8)
                    ),
                    " → ".join(brief(over(lambda e, at=at: _window(e["entropy"], at)), 3) for at in (0, -1)),  # type: ignore[misc]
                    _reached(entries, task, name),
                ]
            )
    heads = [
        "task",
        "from",
        "seeds",
        "accuracy %",
        "gain",
        "after GRPO %",
        "pass@1",
        "pass@8",
        "entropy",
        "steps to SFT's end",
    ]
    return table(heads, rows)


def _window(values: Sequence[float], at: int) -> float:
    """The mean of the first, or of the last, steps."""
    some = values[:WINDOW] if at == 0 else values[-WINDOW:]
    return sum(some) / len(some)


def _reached(entries: Entries, task: str, name: str) -> str:
    """Mean steps until as many sampled answers are right as at the end of GRPO from SFT, of the seeds that get there."""
    reached = []
    for seed in sorted(seeds_of(entries, task, name) & seeds_of(entries, task, f"{PREFIX}sft")):
        share = _window(entries[Cell(task, f"{PREFIX}sft", seed)]["rewards"], -1)
        reached.append(steps_to(entries[Cell(task, name, seed)]["rewards"], share))
    known = [steps for steps in reached if steps is not None]
    if not reached:
        return ""
    mean = [f"{sum(known) / len(known):.0f}"] if known else []
    return ", ".join([*mean, f"{len(reached) - len(known)} never"] if len(known) < len(reached) else mean)


def machine(entries: Entries) -> str:
    about = {
        f"{e['machine']['processor']}, {e['machine']['cores']} core{'' if e['machine']['cores'] == 1 else 's'}; "
        + ", ".join(f"{name} {v}" for name, v in e["machine"]["versions"].items() if name in ("npd", "torch", "transformers"))
        for e in entries.values()
    }
    return f"{len(entries)} cells stand, from {', and '.join(sorted(about)) or 'nowhere'}."


BLOCKS: dict[str, Callable[[Entries], str]] = {
    "machine": machine,
    "tasks": tasks,
    "together": together,
    "accuracies": accuracies,
    "hypotheses": hypotheses,
    "strata": strata,
    "filters": filters,
    "ablations": ablations,
    "reinforcement": reinforcement,
    "stages": stages,
}

__all__ = ["BLOCKS", "Cell", "write"]
