"""Loss on prefixes (`loss.first_tokens`): quality against generated tokens, on solutions of 13 to 274 tokens.

    python -m benchmarks.prefixes    # three seeds: 40 minutes on one core, once benchmarks/chains.py has its teacher
    python -m benchmarks.tables      # docs/objectives.md's table from what it wrote

The task and its teacher are those of benchmarks/chains.py. A seed's student learns from references for a while, then goes on
in three arms, on whole responses and on their first tokens: about 60% and 30% of the mean solution, in which a prefix ends in
the middle of most chains, with their answers behind it. A generation of every arm has as many tokens, so the shorter a
response, the more prompts are answered, and as many responses go into an optimiser step. The learning rate is constant: every
point of a curve is a run that could have ended there.

Hypothesis, written before the run. Public results have the first 30% of tokens teach about as well as all. (1) At equal
generated tokens, 60% are no worse than whole responses, as they answer more prompts and take more steps. (2) 30%, two steps
of a chain of six, are worse than whole ones: no position behind them is trained, while the step that a chain is at is what is
hard here. (3) At equal prompts both are worse than whole responses. (4) What is lost is lost in chains of more than six
steps.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import chains, peers
from benchmarks.common import record
from npd import run
from npd.demo import demo
from npd.demo.task import Problem
from npd.store import Store

REFERENCES, LONG = 8000, 200
SHARES = (1.0, 0.6, 0.3)
RATE = 5e-4


def length(problem: Problem) -> int:
    return len(problem.completion) + 1


def start(task: peers.Task, home: Path, seed: int, options: argparse.Namespace) -> float:
    """Data of a seed and a student that has learnt from its references, made once; the mean length of a solution."""
    most = round(options.prompts * options.generations / min(options.shares) * 1.2)
    problems = chains.make_problems(REFERENCES + options.held_out + most, seed)
    references, rest = problems[:REFERENCES], problems[REFERENCES:]
    others = chains.make_problems(20 * LONG, chains.REFERENCE_SEED + 2 + seed)
    long = [p for p in others if p.completion.count(";") > chains.MEAN_STEPS]
    parts = {
        "references": (references, ("prompt", "completion")),
        "held-out": (rest[: options.held_out], ("prompt", "answer")),
        "prompts": (rest[options.held_out :], ("prompt",)),
        "long": (long[:LONG], ("prompt", "answer")),
    }
    for name, (rows, keys) in parts.items():
        demo._write_jsonl(home / f"{name}.jsonl", ({key: getattr(row, key) for key in keys} for row in rows))
    if not (home / "warm-up/student/npd.json").exists():
        task.untrained(home / "untrained", seed)
        config = task.config(
            home,
            "warm-up",
            seed,
            student={"model": str(home / "untrained")},
            data={"train": str(home / "references.jsonl")},
            schedule={"passes": 1000},
            training={
                "batch_tokens": options.batch_tokens,
                "learning_rate": 2e-3,
                "final_learning_rate": RATE,
                "max_steps": options.warm_up,
            },
        )
        demo._run("warm-up", "sft", config, peers.QUIET)
    return statistics.fmean(map(length, references))


def arm(task: peers.Task, home: Path, seed: int, share: float, mean: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run: what it wrote and trained on, and its accuracy after each generation."""
    references = chains.make_problems(REFERENCES, seed)
    first = None if share == 1 else round(share * mean)
    cut = statistics.fmean(min(length(p), first or length(p)) for p in references)
    prompt = statistics.fmean(len(p.prompt) for p in references)
    config = peers.config_of(
        task,
        home,
        f"first-{first or 'all'}",
        seed,
        options.held_out,
        data={"train": str(home / "prompts.jsonl")},
        schedule={
            "generations": options.generations,
            "passes": options.passes,
            "prompts": round(options.prompts * mean / cut),
            "lead": 0.0,
        },
        selection={"rule": "none"},
        training={
            "batch_tokens": max(task.row, round(options.batch_tokens * (prompt + cut) / (prompt + mean))),
            "learning_rate": RATE,
            "final_learning_rate": RATE,
        },
        loss={"first_tokens": first},
        evaluation={"every_passes": options.passes},
    )
    result = peers.npd(config)
    store = Store(config.run_dir)
    manifests = [m for g in range(options.generations) if (m := store.manifest(g)) is not None]
    tokens, rows = [0], [0]
    for m in manifests:
        tokens.append(tokens[-1] + (m.response_tokens or 0))
        rows.append(rows[-1] + m.rows)
    accuracy = [point[2] for point in result["curve"]]
    asked = config.model_copy(update={"data": config.data.model_copy(update={"eval": str(home / "long.jsonl")})})
    long = {
        name: run.evaluate(asked, str(model), display=peers.QUIET)[1]["eval/answer/accuracy"]
        for name, model in (("before", home / "warm-up/student"), ("after", Path(config.run_dir) / "student"))
    }
    stages = {name: round(result["stages"].get(name, 0.0), 1) for name in ("generate", "score", "train")}
    return {
        "share": share,
        "first": first,
        "seed": seed,
        "mean": round(mean, 1),
        "generated": tokens,
        "responses": rows,
        "accuracy": accuracy,
        "long": long,
        "trained": result["tokens"],
        "steps": result["steps"],
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/prefixes"))
    parser.add_argument("--teacher", type=Path, default=chains.TEACHER, help="a finished one, or where to train it")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of the mean solution; 1: whole responses")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=500, help="a generation of whole responses")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=3200, help="of whole responses; of cut ones in proportion")
    parser.add_argument("--warm-up", type=int, default=400, help="steps on references")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--name", default="prefixes", help="of the file in benchmarks/results")
    options = parser.parse_args()
    task, runs = chains.task(options.teacher), list[dict[str, Any]]()
    for seed in options.seeds:
        home = options.out / f"seed-{seed}"
        mean = start(task, home, seed, options)
        for share in options.shares:
            runs.append(arm(task, home, seed, share, mean, options))
            print(runs[-1], flush=True)
            record(options.name, vars(options) | {"out": str(options.out), "teacher": str(options.teacher)}, runs)


if __name__ == "__main__":
    main()
