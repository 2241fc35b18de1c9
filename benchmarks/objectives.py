"""What is minimised, and on whose word: divergences, teachers and filters of docs/objectives.md, after equal steps.

    python -m benchmarks.objectives            # run what is missing, then write the table; about half an hour on one core
    python -m benchmarks.objectives --list     # cells, and which stand
    python -m benchmarks.objectives table      # docs/objectives.md's table from benchmarks/results/objectives/ alone

The demo's task and teacher. A cell is an arm and a seed; it goes on from the seed's warm student, and what stands is not run
again. Processes may work side by side: each takes a cell that no other one has. Differences to an arm are paired by seed,
with the same prompts, order and held-out problems.

The demo's warm student has never seen a hint, and could make nothing of one. Here it goes on for a while on the same
references, and on solutions with made-up results that stand in front of the problem already: it learns to read a hint, and
no arithmetic. All arms start from that student; two have a student of their own,
which reads the tokens of a second teacher (benchmarks/aligned.py).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import aligned, peers
from benchmarks.common import RESULTS
from benchmarks.evidence.analysis import Entry, Mean
from benchmarks.evidence.cells import Cell, Results, claimed, locked, stamp
from benchmarks.tables import between, table
from npd import models
from npd.config import Config
from npd.demo import demo
from npd.demo.task import Problem, make_problems
from npd.records import SelectionLine
from npd.store import Store, write_text

TASK = "demo"
PAGE = Path("docs/objectives.md")
STEPS, BATCH_TOKENS, RESPONSES, SAMPLES = 70, 4096, 600, 4
"""A generation is so many responses, passed over five times: two of them where nothing is dropped."""
VOCABULARY, TEACHER_STEPS = 120, 900
"""Of the second teacher."""
HINTS = {"learning_rate": 2e-3, "final_learning_rate": 5e-4, "max_steps": 300, "batch_tokens": 4096}
HINTED = 3600
"""Of learning what a hint is: from so many."""
CHARACTERS, PAIRS = "characters", "pairs"
"""Students, by the tokens that they read."""
BASELINE, START, TEACHER = "forward KL", "the student as it starts", "the teacher"
OWN = "student with longer tokens, its own tokenizer's teacher"
HELD_OUT = demo.HELD_OUT


Entries = dict[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """A way to go on, and what it is compared with."""

    sections: dict[str, dict[str, Any]]
    command: str = "distill"
    """distill, sft, or none: the accuracy of the student as it starts, or of its teacher, `asked`."""
    student: str = CHARACTERS
    teacher: str = CHARACTERS
    against: str = BASELINE
    asked: str = "student"


def _of(name: str, mass: str = "tail") -> Arm:
    return Arm({"loss": {"divergence": name, "top_k_mass": mass}})


def _sampled(reward: str) -> Arm:
    sections: dict[str, dict[str, Any]] = {
        "schedule": {"prompts": RESPONSES // SAMPLES},
        "rollout": {"samples_per_prompt": SAMPLES},
        "selection": {"reward": reward},
    }
    return Arm(sections, against=f"{SAMPLES} samples a prompt, any")


def _own(**teacher: Any) -> Arm:
    """The student reads its own responses behind the solution; its k tokens leave something over, so tail."""
    data = {"train": "hinted.jsonl", "max_prompt_tokens": 128}
    return Arm({"teacher": {"model": "student", **teacher}, "data": data, "loss": {"top_k_mass": "tail"}})


ARMS: dict[str, Arm] = {
    BASELINE: _of("forward_kl", "raw"),
    "forward KL, tail": _of("forward_kl"),
    "reverse KL, tail": _of("reverse_kl"),
    "Jensen–Shannon, tail": _of("jensen_shannon"),
    "skewed forward KL, tail": _of("skewed_forward_kl"),
    "skewed reverse KL, tail": _of("skewed_reverse_kl"),
    "total variation, tail": _of("total_variation"),
    "aligned teacher, longer tokens": Arm({"loss": {"top_k_mass": "tail"}}, teacher=PAIRS),
    OWN: Arm({"loss": {"top_k_mass": "tail"}}, student=PAIRS, teacher=PAIRS, against=f"{START}, longer tokens"),
    "student with longer tokens, aligned teacher": Arm({"loss": {"top_k_mass": "tail"}}, student=PAIRS, against=OWN),
    "itself as it started, with the solution": _own(),
    "itself as it was at the snapshot, with the solution": _own(snapshot="latest"),
    f"{SAMPLES} samples a prompt, any": replace(_sampled("any"), against=BASELINE),
    f"{SAMPLES} samples a prompt, correct": _sampled("correct"),
    f"{SAMPLES} samples a prompt, contrast": _sampled("contrast"),
    "first 24 tokens": Arm({"loss": {"first_tokens": 24}}),
    "first 12 tokens": Arm({"loss": {"first_tokens": 12}}),
    "more SFT": Arm({"data": {"train": "references.jsonl"}, "schedule": {"passes": 1000}}, command="sft"),
    START: Arm({}, command=""),
    f"{START}, longer tokens": Arm({}, command="", student=PAIRS, teacher=PAIRS, against=""),
    TEACHER: Arm({}, command="", against="", asked=TEACHER),
    f"{TEACHER} with longer tokens": Arm({}, command="", student=PAIRS, teacher=PAIRS, against="", asked=TEACHER),
}


@dataclass(frozen=True)
class Shelf:
    """What cells share, made once under a folder: the second teacher, data and warm students."""

    folder: Path

    @property
    def tasks(self) -> dict[str, peers.Task]:
        tokenizer, place = aligned.pairs_tokenizer(VOCABULARY), self.folder / "teacher"

        def untrained(path: Path, seed: int) -> None:
            models.save_model(aligned.model_of(tokenizer, seed, demo.HIDDEN, demo.LAYERS), tokenizer, path)

        with locked(self.folder / "lock/teacher"):
            if not (place / "config.json").exists():
                aligned.train_teacher(place, tokenizer, TEACHER_STEPS)
        return {CHARACTERS: peers.DEMO, PAIRS: replace(peers.DEMO, teacher=str(place), untrained=untrained)}

    def home(self, task: peers.Task, student: str, seed: int) -> Path:
        """A seed's data, and its student in warm-up/student: the demo's, which then learned what a hint is."""
        home = self.folder / f"seed-{seed}" / student
        with locked(self.folder / f"lock/seed-{seed}-{student}"):
            if not (home / "warm-up/student/npd.json").exists():
                self._warm_up(task, home, student, seed)
            if not (home / "hinted.jsonl").exists():
                write_data(home, seed)
        return home

    def _warm_up(self, task: peers.Task, home: Path, student: str, seed: int) -> None:
        if student == PAIRS:
            return peers.warm_up(task, home, seed)
        plain = self.folder / f"seed-{seed}" / "plain"
        peers.warm_up(task, plain, seed)
        write_data(home, seed)
        config = task.config(
            home,
            "warm-up",
            seed,
            student={"model": str(plain / "warm-up/student")},
            data={"train": str(home / "warm-up.jsonl"), "max_prompt_tokens": 128},
            schedule={"passes": 1000},
            training=HINTS,
        )
        demo._run("warm-up", "sft", config, peers.QUIET)


def write_data(home: Path, seed: int) -> None:
    """The demo's problems; hinted.jsonl are its prompts, with the worked solution for the teacher."""
    problems = make_problems(demo.REFERENCES + demo.PROMPTS + demo.HELD_OUT, seed)
    references, prompts = problems[: demo.REFERENCES], problems[demo.REFERENCES :][: demo.PROMPTS]
    held_out = problems[demo.REFERENCES + demo.PROMPTS :]
    plain = [{"prompt": p.prompt, "completion": p.completion} for p in references]
    copied = [made_up(p) for p in make_problems(HINTED, seed + 1000)]
    hinted = [{"prompt": hint(p), "completion": p.completion} for p in copied]
    asked = [{"prompt": p.prompt, "answer": p.answer} for p in prompts]
    told = [row | {"teacher_prompt": hint(p)} for row, p in zip(asked, prompts, strict=True)]
    for name, rows in {
        "references": plain,
        "warm-up": plain + hinted,
        "prompts": asked,
        "hinted": told,
        "held-out": [{"prompt": p.prompt, "answer": p.answer} for p in held_out],
    }.items():
        write_text(home / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def made_up(problem: Problem) -> Problem:
    """Solved with results that are drawn: the solution can be copied, and teaches no arithmetic."""
    rng, value, lines = random.Random(problem.prompt), re.split(r"[-+*]", problem.prompt)[0], ""
    for operator, operand in re.findall(r"([-+*])(\d)", problem.prompt):
        result = str(rng.randrange(100))
        lines, value = f"{lines}{value}{operator}{operand}={result};", result
    return Problem(problem.prompt, f"{lines}#{value}", value)


def hint(problem: Problem) -> str:
    """The problem behind its worked solution."""
    return f"{problem.completion};{problem.prompt}"


def configured(arm: Arm, tasks: Mapping[str, peers.Task], home: Path, name: str, seed: int) -> Config:
    """The configuration of an arm's run, which evaluates nothing."""
    task = tasks[arm.student]
    own: dict[str, dict[str, Any]] = {
        "data": {"train": "prompts.jsonl"},
        "teacher": {"model": tasks[arm.teacher].teacher} | ({"align": True} if arm.teacher != arm.student else {}),
        "training": task.rates | {"batch_tokens": BATCH_TOKENS, "max_steps": STEPS},
    }
    if arm.command == "distill":
        own |= {"schedule": {"generations": 1000, "passes": 5, "prompts": RESPONSES}, "selection": {"rule": "none"}}
    sections = {key: own.get(key, {}) | arm.sections.get(key, {}) for key in {*own, *arm.sections}}
    sections["data"]["train"] = str(home / sections["data"]["train"])
    return peers.config_of(task, home, name, seed, 0, **sections)


def measure(cell: Cell, shelf: Shelf) -> dict[str, Any]:
    """Run a cell; its entry."""
    arm, tasks, began = ARMS[cell.arm], shelf.tasks, time.monotonic()
    home = shelf.home(tasks[arm.student], arm.student, cell.seed)
    name = f"cell-{list(ARMS).index(cell.arm)}"
    figures: dict[str, Any] = {}
    model = tasks[arm.teacher].teacher if arm.asked == TEACHER else str(home / "warm-up/student")
    if arm.command:
        config, begun = configured(arm, tasks, home, name, cell.seed), time.process_time()
        result = demo._run(cell.arm, arm.command, config, peers.QUIET)
        figures = {"cpu_seconds": time.process_time() - begun, "steps": result.steps, "tokens": result.tokens}
        figures |= written(result.run_dir) if arm.command == "distill" else {}
        if arm.teacher != arm.student:
            figures["positions"] = aligned.positions(result.run_dir)
        model = str(result.run_dir / "student")
    measured = peers.config_of(tasks[arm.student], home, f"measured-{name}", cell.seed, HELD_OUT)
    figures = {"accuracy": aligned.accuracy(measured, model)} | figures
    about = {"task": TASK, "arm": cell.arm, "seed": cell.seed}
    return about | figures | {"wall_seconds": time.monotonic() - began} | stamp()


def written(run_dir: Path) -> dict[str, Any]:
    """Responses, their tokens and the share that was kept, over all generations."""
    found: dict[int, tuple[float, float, float]] = {}
    for line in Store(run_dir).read_metrics():
        if isinstance(line, SelectionLine):
            rows = line.figures["selection/responses"]
            found[line.generation] = rows, rows * line.figures["selection/kept"], line.figures["selection/response_tokens"]
    for file in run_dir.glob("generations/*/manifest.json"):  # of the last one there may be no line
        manifest = Store(run_dir).manifest(json.loads(file.read_text())["generation"])
        if manifest is not None:
            rows, kept = manifest.selection.rows, manifest.selection.kept
            found.setdefault(manifest.generation, (rows, kept, manifest.response_tokens or 0))
    responses, kept, tokens = map(sum, zip(*found.values(), strict=True))
    return {"generations": len(found), "responses": responses, "generated": tokens, "kept": kept / responses}


def lock_of(folder: Path, cell: Cell) -> Path:
    return folder / "lock" / f"cell-{list(ARMS).index(cell.arm)}-{cell.seed}"


def expected(cell: Cell, standing: Entries) -> float:
    """Seconds: the longest of this arm's with other seeds, or of all where there is none."""
    seconds = {done: entry["wall_seconds"] for done, entry in standing.items()}
    return max((s for done, s in seconds.items() if done.arm == cell.arm), default=max(seconds.values(), default=0.0))


def work(cells: list[Cell], results: Results, shelf: Shelf, until: float) -> None:
    """Run what is missing; begin nothing that would not end by a time."""
    for cell in cells:
        with claimed(lock_of(shelf.folder, cell)) as mine:
            standing = results.read()
            if not mine or cell in standing or time.monotonic() + 1.2 * expected(cell, standing) > until:
                continue
            results.write(measure(cell, shelf))
            print(json.dumps(results.read()[cell]), flush=True)


# -- the table


def over(entries: Entries, arm: str, figure: str) -> Mean | None:
    values = [entry[figure] for cell, entry in entries.items() if cell.arm == arm and entry.get(figure) is not None]
    return Mean.of(values) if values else None


def paired(entries: Entries, arm: str, against: str) -> Mean | None:
    """Difference in points, of the seeds that have both."""

    def of(name: str) -> dict[int, Entry]:
        return {cell.seed: entry for cell, entry in entries.items() if cell.arm == name}

    mine, other = of(arm), of(against)
    values = [100 * (mine[seed]["accuracy"] - other[seed]["accuracy"]) for seed in sorted(mine.keys() & other.keys())]
    return Mean.of(values) if values and arm != against else None


def results_table(entries: Entries) -> str:
    rows = []
    for name, arm in ARMS.items():
        accuracy = over(entries, name, "accuracy")
        if accuracy is None:
            continue

        def shown(figure: str, spec: str, scale: float = 1.0, name: str = name) -> str:
            mean = over(entries, name, figure)
            return "" if mean is None else format(scale * mean.value, spec)

        difference = paired(entries, name, arm.against)
        rows.append(
            [
                name if name != BASELINE else f"**{name}** (the baseline)",
                str(accuracy.seeds),
                f"{100 * accuracy.value:.1f}",
                "" if difference is None else f"{difference:+.1f}",
                "" if difference is None else "the baseline" if arm.against == BASELINE else arm.against,
                shown("steps", ".0f"),
                shown("generations", ".1f"),
                shown("kept", ".0%"),
                shown("generated", ",.0f", 1e-3),
                shown("tokens", ",.0f", 1e-3),
                shown("cpu_seconds", ".0f"),
            ]
        )
    heads = ["arm", "seeds", "accuracy, %", "difference, points", "to", "steps", "generations", "kept"]
    return table([*heads, "thousand tokens generated", "and trained", "processor's seconds"], rows)


def reading(entries: Entries) -> str:
    """Which differences are more than chance, and which are not."""
    groups: dict[str, list[str]] = {
        "Better, with an interval above 0": [],
        "Worse, with an interval below 0": [],
        "Not to be told apart": [],
        "One seed alone": [],
    }
    better, worse, unclear, alone = groups.values()
    for name, arm in ARMS.items():
        mean = paired(entries, name, arm.against)
        if mean is None:
            continue
        said = f"*{name}* to *{arm.against}* ({mean:+.1f})"
        if mean.half is None:
            alone.append(said)
        elif abs(mean.value) <= mean.half:
            unclear.append(said)
        else:
            (better if mean.value > 0 else worse).append(said)
    return "\n".join(f"- {head}: {'; '.join(found)}." for head, found in groups.items() if found)


def stands(entries: Entries) -> str:
    """Where it was measured."""
    about = [entry["machine"] for entry in entries.values()]
    dates = sorted({entry["date"] for entry in entries.values()})
    where = sorted({f"{one['processor']}, Python's torch {one['versions']['torch']}" for one in about})
    return f"{len(entries)} cells, {' and '.join(dates)}; {'; '.join(where)}; one core a process."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "cells", "table"], nargs="?", default="run", help="cells: write no table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", action="append", choices=list(ARMS), metavar="ARM", help="this one alone; may be repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell that would not end by then")
    parser.add_argument("--list", action="store_true", help="say which cells stand, and run none")
    parser.add_argument("--cache", type=Path, default=Path("runs/objectives"), help="the second teacher, warm students")
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    results = Results(options.results)
    wanted = sorted(options.arm or ARMS, key=lambda arm: "reward" not in ARMS[arm].sections.get("selection", {}))
    cells = [Cell(TASK, arm, seed) for seed in range(options.seeds) for arm in wanted]  # the longest first
    if options.list:
        standing = results.read()
        for cell in cells:
            print("stands " if cell in standing else "missing", cell)
        return
    if options.what != "table":
        work(cells, results, Shelf(options.cache), until)
    if options.what == "cells":
        return
    entries = results.read()
    text = options.page.read_text()
    blocks = {"": results_table(entries), ", machine": stands(entries), ", reading": reading(entries)}
    for name, body in blocks.items():
        text = between(text, f"objectives{name}", body)
    options.page.write_text(text)


if __name__ == "__main__":
    main()
