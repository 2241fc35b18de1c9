"""End to end: tokens trained a second, and wall-clock until a held-out accuracy is reached.

On the demo's task, or on one whose solutions vary much in length (benchmarks/chains.py).

python -m benchmarks.distillation --seeds 0 1

One run of each contender a seed; see benchmarks/peers.py. Seconds are from loading the models to the finished student.
npd comes first: the others take as many steps, with as many responses in each as npd's steps have on average, and are
evaluated as often. "npd-longer" is npd with five generations instead of two: what it makes of the others' seconds.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import chains, peers
from benchmarks.common import RESULTS, interleaved, record

LONGER = 5
"""Generations of npd-longer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--task", choices=["demo", "chains"], default="demo")
    parser.add_argument("--every", type=int, default=1, help="passes between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of prompts and responses in a step of npd")
    parser.add_argument("--steps", type=int, help="optimiser steps of every contender; default: two passes of five for npd")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--only", nargs="*", default=["npd", "npd-longer", *peers.CONTENDERS])
    parser.add_argument("--name", default="distillation", help="of the file in benchmarks/results")
    parser.add_argument("--add", action="store_true", help="keep the runs that the file has")
    options = parser.parse_args()
    task, at = (chains.task(), "chains") if options.task == "chains" else (peers.DEMO, "")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    runs: list[dict[str, Any]] = []
    if options.add:
        runs = json.loads((RESULTS / f"{options.name}.json").read_text())["runs"]
    for seed in options.seeds:
        home = options.out / at / f"seed-{seed}"
        peers.warm_up(task, home, seed)
        peers.fewer_prompts(home, options.prompts)
    order = [(options.seeds[turn], name) for turn, name in interleaved(options.only, len(options.seeds))]
    order.sort(key=lambda run: (options.seeds.index(run[0]), run[1] != "npd"))
    like: dict[int, tuple[int, int]] = {}
    for seed, name in order:
        home = options.out / at / f"seed-{seed}"
        if name == "npd":
            result = peers.near_policy(
                task, home, seed, options.held_out, options.steps, options.batch_tokens, every=options.every
            )
            like[seed] = result["steps"], round(result["tokens"] / result["steps"] / result["response_length"])
        elif name == "npd-longer":
            result = peers.near_policy(task, home, seed, options.held_out, None, options.batch_tokens, LONGER, options.every)
        else:
            steps, batch = like[seed]
            every = max(1, steps * options.every // 10)  # npd: after each of its ten passes, or of several
            result = peers.CONTENDERS[name](task, home, seed, options.held_out, steps, batch, every) | {"batch": batch}
        runs.append({"contender": name, "seed": seed, **result})
        shown = {key: value for key, value in runs[-1].items() if key not in ("curve", "publications", "stages")}
        print(shown | {"accuracy": result["curve"][-1][2] if result["curve"] else None}, flush=True)
        record(options.name, vars(options) | {"out": str(options.out)}, runs)  # each time: a long run may be cut short


if __name__ == "__main__":
    main()
