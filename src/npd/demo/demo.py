"""`npd demo`: five ways to go on from one checkpoint, on a toy task, in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from npd import models, run
from npd.config import Config, ModelConfig, load_config
from npd.demo.task import make_problems
from npd.errors import UserError
from npd.observe.display import Display
from npd.records import EvaluationLine, TeacherLine
from npd.report.page import write_comparison, write_report
from npd.schedule import derive_seed
from npd.store import Store, write_json, write_text, writing

TEACHER = "package:npd/demo/teacher"
REFERENCES, PROMPTS, HELD_OUT = 1200, 1200, 1000
WARM_UP_STEPS = 320
HIDDEN, LAYERS = 96, 3


@dataclass(frozen=True)
class Arm:
    """One way to go on, and what came of it."""

    name: str
    run_dir: Path
    seconds: float
    steps: int
    tokens: int


def run_demo(out: Path, seed: int, display: Display) -> list[Arm]:
    """Run everything under `out`, print the table, and return the arms in its order.

    Raises:
        UserError: `out` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another directory with --out, or delete it.")
    began = time.monotonic()
    _write_data(out, seed)
    _write_untrained_student(out / "untrained", seed)
    display.say(
        f"Task: chained arithmetic modulo 100, such as {make_problems(1, seed=0)[0].prompt} "
        f"{REFERENCES} worked references, {PROMPTS:,} bare prompts, {HELD_OUT:,} held-out problems."
    )

    def config(name: str, **sections: Any) -> Config:
        return _config(out, name, seed, sections)

    display.say("\n1/6  Warm-up: an untrained student learns from the references.")
    warm_up = config(
        "warm-up",
        student={"model": str(out / "untrained")},
        data={"train": str(out / "references.jsonl")},
        schedule={"passes": 1000},
        training={"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": WARM_UP_STEPS},
    )
    start = _run("warm-up", "sft", warm_up, display)

    display.say("\n2/6  NPD: two generations of the student's own responses, five passes each.")
    npd = _run("NPD", "distill", config("npd"), display)
    same_steps = {"max_steps": npd.steps}

    display.say(f"\n3/6  More SFT on the same references, for the same {npd.steps} steps.")
    more = config("sft", data={"train": str(out / "references.jsonl")}, schedule={"passes": 1000}, training=same_steps)
    sft = _run("more SFT", "sft", more, display)

    display.say("\n4/6  Sequence-level KD: SFT on the teacher's answers to NPD's prompts, for the same steps.")
    answers = config("kd", data={"references": "teacher"}, schedule={"passes": 1000}, training=same_steps)
    kd = _run("sequence-level KD", "sft", answers, display)

    display.say("\n5/6  NPD, mixed: no filter, 30% of the tokens the teacher's answers, for the same steps.")
    schedule = {"references": 0.3, "passes": 3, "generations": 100}  # a pass is longer, unfiltered and mixed: as many updates
    sections = {"schedule": schedule, "selection": {"rule": "none"}, "data": {"references": "teacher"}}
    mixed = _run("NPD, mixed", "distill", config("mixed", **sections, training=same_steps), display)

    display.say(
        f"\n6/6  Strict on-policy distillation: new responses at every step, until {npd.tokens:,} tokens are trained."
    )
    # A step's tokens as NPD's on average: one batch of prompts, answered once and trained on once.
    first = Store(npd.run_dir).check_generation(0)
    prompts = max(1, round(npd.tokens / npd.steps / ((first.response_tokens or 1) / first.rows)))
    strict = config(
        "on-policy",
        schedule={"prompts": prompts, "passes": 1, "generations": 100_000},
        selection={"rule": "none"},
        training={"max_tokens": npd.tokens, "batch_tokens": 1 << 20},
    )
    on_policy = _run("strict on-policy", "distill", strict, display)

    arms = [start, sft, kd, npd, mixed, on_policy]
    _report(out, arms, config("npd"), display)
    display.say(f"\nRuns and students: {', '.join(str(arm.run_dir / 'student') for arm in arms)}.")
    display.say(f"Reports: report.html in each of them, and {_pages(out, arms)} for all side by side.")
    display.say(f"The demo took {(time.monotonic() - began) / 60:.1f} minutes.")
    return arms


def _config(out: Path, name: str, seed: int, sections: dict[str, dict[str, Any]]) -> Config:
    """What all runs of the demo share, with an arm's own options over it."""
    tree: dict[str, dict[str, Any]] = {
        "student": {"model": str(out / "warm-up" / "student")},
        "teacher": {"model": TEACHER},
        "data": {"train": str(out / "prompts.jsonl"), "eval": str(out / "held-out.jsonl"), "max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 72, "batch_size": 256, "part_size": 2048},
        "schedule": {"lead": 0.0},  # two cores gain nothing from splitting (benchmarks/overlap.py)
        "packing": {"length": 256},
        "training": {
            "batch_tokens": 8192,
            "micro_batch_rows": 8,
            "learning_rate": 1e-3,
            "final_learning_rate": 1e-4,
        },
        "evaluation": {"tasks": [{"name": "answer", "size": HELD_OUT}], "kl_prompts": 256},
        "tracking": {"trackers": []},
    }
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options
    return load_config({"run_dir": str(out / name), "seed": seed} | tree)


def _run(name: str, command: str, config: Config, display: Display) -> Arm:
    """Train one arm. It evaluates nothing on the way, so its wall-clock is that of training alone."""
    evaluation = config.evaluation.model_copy(update={"tasks": [], "kl_prompts": 0})
    tracking = config.tracking.model_copy(update={"report": False})  # written once students are evaluated
    quiet = config.model_copy(update={"evaluation": evaluation, "tracking": tracking})
    began = time.monotonic()
    result = getattr(run, command)(quiet, display=display)
    seconds = time.monotonic() - began
    display.say(f"{name}: {result.steps} steps, {result.tokens:,} response tokens, {seconds:.0f} s.")
    return Arm(name, result.run_dir, seconds, result.steps, result.tokens)


def _report(out: Path, arms: list[Arm], config: Config, display: Display) -> None:
    """Evaluate every student and the teacher on the held-out problems; print the table and keep it as JSON."""
    names = {"teacher": TEACHER} | {arm.name: str(arm.run_dir / "student") for arm in arms}
    figures = {name: run.evaluate(config, model, display=display)[1] for name, model in names.items()}
    by_name = {arm.name: arm for arm in arms}
    rows, table = [], []
    for name, f in figures.items():
        low, high = f["eval/answer/accuracy_low"], f["eval/answer/accuracy_high"]
        accuracy = f"{100 * f['eval/answer/accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        row, entry = [name, accuracy, f"{f['eval/kl_to_teacher']:.3f}", "", "", ""], {"name": name, **f}
        if arm := by_name.get(name):
            row[3:] = [f"{arm.tokens / arm.seconds:,.0f}", f"{arm.seconds:.0f}", str(arm.steps)]
            entry |= {"seconds": arm.seconds, "steps": arm.steps, "tokens": arm.tokens}
        rows.append(row)
        table.append(entry)
    columns = ["", "accuracy % [95%]", "KL", "tokens/s", "seconds", "steps"]
    display.table(f"Greedy accuracy on {HELD_OUT:,} held-out problems", columns, rows)
    display.say(
        "KL: from the teacher to the student on the student's own responses, nats per token. tokens/s: response tokens "
        "trained per second of wall-clock, generation and scoring included. Each way went on from the warm-up's student. "
        "One seed of a toy task: it shows how the parts work together, not which method is best."
    )
    write_json(out / "demo.json", table)


def _pages(out: Path, arms: list[Arm]) -> Path:
    """Each arm's report, with the figures of the student it began with, its own and the teacher's; and the comparison."""
    figures = {row["name"]: row for row in json.loads((out / "demo.json").read_text())}

    def of(name: str, prefix: str = "eval/") -> dict[str, float]:
        return {prefix + k.removeprefix("eval/"): v for k, v in figures[name].items() if k.startswith("eval/")}

    for arm in arms:
        store = Store(arm.run_dir)
        if arm.name != arms[0].name:
            store.append_metrics(EvaluationLine(0, of(arms[0].name)))
        store.append_metrics(EvaluationLine(arm.steps, of(arm.name)))
        store.append_metrics(TeacherLine(arm.steps, of("teacher", "teacher/")))
        write_report(arm.run_dir)
    return write_comparison([arm.run_dir for arm in arms[1:]], out / "compare.html")


def _write_data(out: Path, seed: int) -> None:
    problems = make_problems(REFERENCES + PROMPTS + HELD_OUT, seed=seed)
    references, rest = problems[:REFERENCES], problems[REFERENCES:]
    _write_jsonl(out / "references.jsonl", ({"prompt": p.prompt, "completion": p.completion} for p in references))
    _write_jsonl(out / "prompts.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in rest[:PROMPTS]))
    _write_jsonl(out / "held-out.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in rest[PROMPTS:]))


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_untrained_student(path: Path, seed: int) -> None:
    """A small model of the teacher's family with fresh weights and the teacher's tokenizer."""
    teacher = ModelConfig(model=TEACHER)
    tokenizer = models.load_tokenizer(teacher)
    like: Any = models.load_model_config(teacher)
    like.hidden_size, like.intermediate_size, like.num_hidden_layers = HIDDEN, 3 * HIDDEN, LAYERS
    like.num_attention_heads = like.num_key_value_heads = HIDDEN // 32
    like.head_dim = 32
    torch.manual_seed(derive_seed(seed, "untrained"))
    student = LlamaForCausalLM(LlamaConfig(**like.to_diff_dict()))
    with writing(path) as aside:
        models.save_model(student, tokenizer, aside)
