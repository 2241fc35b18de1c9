"""Time and memory of each part of a run as its prompts grow 1x, 10x, 100x, each size in a process of its own (Linux).

python -m benchmarks.growth --base 100

- distill: one generation and one pass over the demo's prompts, with the warm-up student of `benchmarks.distillation`;
- prompts: a file of 100 times as many short prompts is read;
- samples: 10 times as many kept samples are taken by the trainer and packed.
Memory is anonymous memory, which no file backs: mapped files count as cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.common import fresh, memory, record
from npd import run
from npd.demo import demo
from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer
from npd.observe.display import Display
from npd.prompts import load_prompts
from npd.store import Store
from npd.train.loop import PassPlan
from npd.train.samples import Samples

WHAT = ("distill", "prompts", "samples")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and the most anonymous memory in MiB above that before."""
    base = highest = memory("RssAnon")
    done = threading.Event()
    figures: dict[str, float] = {}

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        yield figures
    finally:
        figures["seconds"] = time.perf_counter() - began
        done.set()
        thread.join()
        figures["mib"] = max(highest, memory("RssAnon")) - base


def distill(folder: Path, count: int, warm: Path) -> dict[str, Any]:
    demo._write_jsonl(folder / "prompts.jsonl", ({"prompt": p.prompt} for p in make_problems(count, seed=5)))
    config = demo._config(
        folder,
        "run",
        0,
        {
            "student": {"model": str(warm)},
            "data": {"train": str(folder / "prompts.jsonl"), "eval": None},
            "schedule": {"generations": 1, "passes": 1},
            "rollout": {"part_size": 500},
            "evaluation": {"tasks": []},
        },
    )
    with watched() as figures:
        result = run.distill(config, display=Display(quiet=True))
    stages = result.by_role["trainer"]
    named = {name: stages.get(name, 0.0) for name in ("load", "generate", "score", "store", "finish", "fetch", "train")}
    return {**figures, "tokens": result.tokens, **named}


def prompts(folder: Path, count: int) -> dict[str, Any]:
    rng = random.Random(0)
    file = folder / "prompts.jsonl"
    with file.open("w") as out:
        for i in range(count):
            out.write(json.dumps({"prompt": "+".join(str(rng.randrange(100)) for _ in range(8)) + f"+{i}="}) + "\n")
    with watched() as figures:
        load_prompts(str(file), build_tokenizer(), max_prompt_tokens=64)
    return figures


def samples(folder: Path, count: int, rows: int = 1000, tokens: int = 128, top_k: int = 10) -> dict[str, Any]:
    """Parts of 1,000 rows: the first is written, the others are links to it."""
    store = Store(folder / "run")
    columns = {
        "sample_id": [f"s{i}" for i in range(rows)],
        "prompt_ids": [list(range(20))] * rows,
        "response_ids": [list(range(tokens))] * rows,
        "behavior_logprobs": [[0.5] * tokens] * rows,
        "verdict": ["proximal"] * rows,
        "topk_ids": [list(range(tokens * top_k))] * rows,
        "topk_logprobs": [[0.25] * (tokens * top_k)] * rows,
    }
    store.write_part(0, 0, pa.table(columns))
    del columns
    taken = Samples(store)
    taken.fetch(0, 0)
    taken.add(0, 0)  # warms up
    with watched() as figures:
        for part in range(1, 1 + count // rows):  # besides the one that warmed up
            os.link(store.part(0, 0), store.part(0, part))
            taken.fetch(0, part)
            taken.add(0, part)
    began = time.perf_counter()
    steps = sum(1 for _ in PassPlan(4096, 131_072, 0).steps(np.arange(len(taken)), taken.lengths, True))
    return {**figures, "pack_seconds": time.perf_counter() - began, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="all", choices=["all", "one"])
    parser.add_argument("--what", choices=WHAT)
    parser.add_argument("--count", type=int)
    parser.add_argument("--base", type=int, default=100, help="prompts at 1x")
    parser.add_argument("--warm", type=Path, default=Path("runs/bench/seed-0/warm-up/student"))
    options = parser.parse_args()
    if options.mode == "one":
        with tempfile.TemporaryDirectory() as folder:
            work: dict[str, Callable[..., dict[str, Any]]] = {
                "distill": partial(distill, warm=options.warm),
                "prompts": prompts,
                "samples": samples,
            }
            print(json.dumps(work[options.what](Path(folder), options.count)))
        return
    runs = []
    for what in WHAT:
        for factor in (1, 10, 100):
            # Samples take 1.4 kB each on disk where they are mapped: a hundred thousand of them are enough.
            count = options.base * factor * {"distill": 1, "prompts": 100, "samples": 10}[what]
            figures = fresh("benchmarks.growth", what=what, count=count, warm=options.warm)
            runs.append({"what": what, "factor": factor, "count": count, **figures})
            print(runs[-1], flush=True)
    record("growth", {"base": options.base}, runs)


if __name__ == "__main__":
    main()
