"""Loss on prefixes (`loss.first_tokens`): quality against generated tokens, on solutions of 13 to 274 tokens.

python -m benchmarks.prefixes --first 0 128 64 32 --seeds 0

The task, its teacher and the warm-up are those of benchmarks/chains.py. Every arm answers the same prompts in as many
generations and passes, with about the same number of responses in an optimiser step; 0 is whole responses. The prefix of a
solution ends in the middle of its chain, and its answer is behind it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import chains, peers
from benchmarks.common import record
from npd.demo import demo
from npd.store import Store


def share(seed: int, first: int) -> float:
    """Tokens of prompts and cut references, as a share of whole ones."""
    problems = chains.make_problems(demo.PROMPTS, seed)
    whole = [(len(p.prompt), len(p.completion) + 1) for p in problems]
    return sum(a + min(b, first or b) for a, b in whole) / sum(a + b for a, b in whole)


def arm(task: peers.Task, home: Path, seed: int, first: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: generated and trained tokens, seconds, and the accuracy before and after."""
    batch_tokens = max(task.row, round(options.batch_tokens * share(seed, first)))
    config = peers.config_of(
        task,
        home,
        f"first-{first}",
        seed,
        options.held_out,
        schedule={"generations": options.generations, "passes": options.passes},
        selection={"rule": "none"},
        training={"batch_tokens": batch_tokens, **task.rates, "max_steps": options.steps},
        loss={"first_tokens": first or None},
        evaluation={"every_passes": options.generations * options.passes},
    )
    result = peers.npd(config)
    store = Store(config.run_dir)
    manifests = [store.manifest(g) for g in range(options.generations)]
    generated = sum(m.response_tokens or 0 for m in manifests if m is not None)
    kept = {"before": result["curve"][0][2], "after": result["curve"][-1][2]}
    stages = {name: round(result["stages"].get(name, 0.0), 1) for name in ("generate", "score", "train")}
    figures = {name: result[name] for name in ("seconds", "tokens", "steps")}
    return {"first": first, "seed": seed, "generated": generated, **kept, **figures, **stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/chains"))
    parser.add_argument("--first", type=int, nargs="*", default=[0, 128, 64, 32])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=3200, help="of whole responses; of cut ones in proportion")
    parser.add_argument("--steps", type=int, help="at most so many")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--name", default="prefixes", help="of the file in benchmarks/results")
    options = parser.parse_args()
    task, runs = chains.task(), []
    for seed in options.seeds:
        home = options.out / f"seed-{seed}"
        peers.warm_up(task, home, seed)
        peers.fewer_prompts(home, options.prompts)
        for first in options.first:
            runs.append(arm(task, home, seed, first, options))
            print(runs[-1], flush=True)
            record(options.name, vars(options) | {"out": str(options.out)}, runs)


if __name__ == "__main__":
    main()
