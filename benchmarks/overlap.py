"""Wall-clock of overlapped against sequential runs on the demo's task, interleaved.

    python benchmarks/overlap.py --out runs/overlap --repeat 5

Contenders: lead 0 (generation and training take turns, each on all cores) and longer leads (a background refresh beside
the trainer, cores split). Same student, prompts and optimiser steps. An overlapped
run pays once for the import of its libraries in a second process, while it waits for its first part.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from npd import run
from npd.demo import demo
from npd.observe.display import Display
from npd.placement import cores
from npd.store import write_json

LEADS = (0.0, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/overlap"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--generations", type=int, default=4)
    options = parser.parse_args()
    out: Path = options.out
    display = Display(quiet=True)
    if not (out / "warm-up/student").exists():
        demo._write_data(out, 0)
        demo._write_untrained_student(out / "untrained", 0)
        sections: dict[str, dict[str, Any]] = {
            "student": {"model": str(out / "untrained")},
            "data": {"train": str(out / "references.jsonl")},
            "schedule": {"passes": 1000},
            "training": {"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": demo.WARM_UP_STEPS},
        }
        demo._run("warm-up", "sft", demo._config(out, "warm-up", 0, sections), display)

    entries: list[dict[str, Any]] = []
    for turn in range(options.repeat):
        for lead in LEADS[turn % len(LEADS) :] + LEADS[: turn % len(LEADS)]:
            name = f"lead-{lead:g}"
            shutil.rmtree(out / name, ignore_errors=True)
            config = demo._config(
                out,
                name,
                0,
                {
                    "schedule": {"generations": options.generations, "passes": 5, "lead": lead},
                    "selection": {"rule": "none"},
                    "rollout": {"max_new_tokens": 72, "batch_size": 256, "part_size": 256},
                },
            )
            quiet = {"tasks": [], "kl_prompts": 0}
            began = time.monotonic()
            result = run.distill(config.model_copy(update={"evaluation": config.evaluation.model_copy(update=quiet)}))
            seconds = time.monotonic() - began
            trainer = result.by_role["trainer"]
            waits = [
                e
                for e in map(json.loads, (result.run_dir / "events.jsonl").read_text().splitlines())
                if e["name"] == "wait" and e["role"] == "trainer"
            ]
            entries.append(
                {
                    "lead": lead,
                    "seconds": seconds,
                    "tokens": result.tokens,
                    "steps": result.steps,
                    "train": trainer.get("train", 0.0),
                    "wait_first": sum(e["end"] - e["start"] for e in waits if e["generation"] == 0),
                    "wait_later": sum(e["end"] - e["start"] for e in waits if e["generation"] > 0),
                    "publish": trainer.get("publish", 0.0),
                    "generate": result.seconds.get("generate", 0.0),
                    "score": result.seconds.get("score", 0.0),
                }
            )
            print(json.dumps(entries[-1]), flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import npd.run"], check=True)
    startup = time.monotonic() - began
    machine = {"cores": cores(), "processor": platform.processor(), "torch": torch.__version__, "startup_seconds": startup}
    write_json(out / "overlap.json", {"machine": machine, "runs": entries})

    print(f"\n{cores()} cores, {options.repeat} runs each, medians; importing the libraries takes {startup:.1f} s\n")
    heads = ["lead", "seconds [least, most]", "against lead 0", "trained", "waited for g0", "waited later", "generated"]
    heads += ["scored", "published"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    base = [e["seconds"] for e in entries if e["lead"] == 0]
    for lead in LEADS:
        mine = [e for e in entries if e["lead"] == lead]
        middle = {key: statistics.median(e[key] for e in mine) for key in mine[0]}
        ratio = statistics.median(b / e["seconds"] for b, e in zip(base, mine, strict=True))
        spread = f"{min(e['seconds'] for e in mine):.1f}, {max(e['seconds'] for e in mine):.1f}"
        keys = ("train", "wait_first", "wait_later", "generate", "score")
        cells = [f"{middle[key]:.1f}" for key in keys] + [f"{middle['publish']:.2f}"]
        print(f"| {lead:g} | {middle['seconds']:.1f} [{spread}] | {ratio:.2f}× | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
