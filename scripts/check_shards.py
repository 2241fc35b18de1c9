"""Check sharded training on this machine's GPUs: against whole copies, its memory against the plan, checkpoints, speed.

    python scripts/check_shards.py [--processes N] [--out FILE.json]

Starts as many processes as there are GPUs, at most eight; without two of them, two on the CPU with a tiny model, which tries
the script alone. Random models in the shapes of Qwen2.5; needs no network.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from check_step import GIB, LARGE, SMALL, TINY, Shape, act, synchronize, write_model, write_samples
from torch.distributed.tensor import DTensor

from npd import models
from npd.config import load_config
from npd.observe.display import Display
from npd.observe.events import Events
from npd.packing import pack
from npd.store import Store, write_json
from npd.train.memory import step_memory
from npd.train.samples import Samples
from npd.train.trainer import Trainer, make_accelerator

SEVERAL = torch.cuda.device_count() > 1
STEPS = 3


def trainer_of(folder: Path, shape: Shape, name: str, **training: Any) -> tuple[Trainer, Samples, list[list[int]], bool]:
    """A trainer of this process, on samples that all of them see; and is its arithmetic bfloat16?"""
    tree = {
        "run_dir": str(folder / f"{shape.name}-{name}"),
        "student": {"model": str(folder / shape.name)},
        "data": {"train": "none.jsonl", "max_prompt_tokens": shape.longest // 2},
        "rollout": {"max_new_tokens": shape.longest // 2},
        "packing": {"length": shape.row},
        "training": {"batch_tokens": 2 * shape.row, "learning_rate": 1e-5, **training},
        "tracking": {"trackers": [], "report": False},
    }
    config = load_config(tree)
    store = Store(config.run_dir)
    accelerator = make_accelerator(config, store)
    if accelerator.is_main_process:
        if not (folder / shape.name).exists():
            write_model(shape, folder / shape.name)
        store.open(config, "distill")
        write_samples(store, shape)
    accelerator.wait_for_everyone()
    samples = Samples(store)
    samples.add(0, 0)
    student = models.load_model(config.student, trained=True)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    trainer = Trainer(config, store, accelerator, student, tokenizer, Events(store.path / "events.jsonl"))
    rows = pack(samples.lengths.tolist(), shape.row)[:2]
    return trainer, samples, rows, accelerator.mixed_precision == "bf16"


def learn(folder: Path, shape: Shape, name: str, **training: Any) -> dict[str, Any]:
    """A few steps: figures, seconds, the peak of memory and what was planned, and a sum over each gradient."""
    trainer, samples, rows, half = trainer_of(folder, shape, name, **training)
    found: dict[str, Any] = {"loss": [], "norm": []}
    for number in range(1, STEPS + 1):
        if number == STEPS and SEVERAL:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        began = time.perf_counter()
        figures = act(trainer, samples, rows, number)
        synchronize()
        found["seconds"] = time.perf_counter() - began
        found["loss"].append(figures.loss)
        found["norm"].append(figures.grad_norm)
    found["tokens_per_second"] = int(samples.lengths[[i for row in rows for i in row]].sum()) / found["seconds"]
    checkpointing = bool(trainer.base.is_gradient_checkpointing)
    plan = step_memory(trainer.config, trainer.base.config, bfloat16=half).over(trainer.lying.shares)
    found["planned"] = plan.total(checkpointing=checkpointing)
    found["peak"] = torch.cuda.max_memory_allocated() if SEVERAL else 0
    found["shares"] = trainer.lying.shares
    held = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.student.parameters()]
    found["held"] = sum(p.numel() * p.element_size() for p in held)
    state = trainer.copy_policy()
    found["weights"] = None if state is None else {n: float(t.double().norm()) for n, t in state.weights.items()}
    if trainer.sharded:
        trainer.save_checkpoint(STEPS, {"step": STEPS, "generation": 0})
        found["resumed"] = trainer.resume(lambda facts: facts["step"])
        again = trainer.copy_policy()
        same = state is None or again is None or all(torch.equal(again.weights[n], t) for n, t in state.weights.items())
        found["resumed same"] = same
    answer = [found]
    broadcast_object_list(answer)
    return answer[0]


def compare(folder: Path, display: Display) -> dict[str, Any]:
    """What every process does; the main one says it."""
    shape, large = (SMALL, LARGE) if SEVERAL else (TINY, TINY)
    results: dict[str, Any] = {}
    for name, options in {
        "whole copies": {"shard": "none", "precision": "float32"},
        "sharded": {"shard": "full", "precision": "float32"},
        "whole copies, bfloat16": {"shard": "none", "precision": "bfloat16"},
        "sharded, bfloat16": {"shard": "full", "precision": "bfloat16"},
        "sharded 1.5B": {"shard": "full"},
    }.items():
        results[name] = learn(folder, large if "1.5B" in name else shape, name.replace(" ", "-"), **options)
        gc.collect()
        if SEVERAL:
            torch.cuda.empty_cache()
    results["works"] = True
    for name, tolerance in (("sharded", 1e-4), ("sharded, bfloat16", 2e-2)):
        mine, theirs = results[name], results[name.replace("sharded", "whole copies")]
        pairs = [*zip(mine["loss"] + mine["norm"], theirs["loss"] + theirs["norm"], strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        planned = not SEVERAL or mine["peak"] <= 1.05 * mine["planned"]
        works = apart <= tolerance and planned and mine["resumed same"]
        results[name] |= {"apart": apart, "works": works}
        results["works"] = results["works"] and works
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    most = min(8, torch.cuda.device_count()) if SEVERAL else 2
    parser.add_argument("--processes", type=int, default=most, help="how many train together [default: %(default)s]")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="npd-shards-") as folder:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
            out = ["--out", str(options.out.resolve())] if options.out else []
            environment = os.environ | ({} if SEVERAL else {"ACCELERATE_USE_CPU": "true"})
            command = [sys.executable, *launch, __file__, "--folder", folder, *out]
            sys.exit(subprocess.run(command, env=environment).returncode)
    rank = int(os.environ["RANK"])
    if SEVERAL:
        models.use_device(f"cuda:{os.environ['LOCAL_RANK']}")
    display = Display(quiet=rank > 0)
    results = compare(options.folder, display)
    if rank == 0:
        rows = []
        for name, found in results.items():
            if name != "works":
                peak = f"{found['peak'] / GIB:.1f} of {found['planned'] / GIB:.1f} planned" if SEVERAL else "-"
                words = f"apart {found['apart']:.1e}" if "apart" in found else ""
                outcome = {True: "works", False: "FAILS"}.get(found.get("works"), "")
                rows.append([name, outcome, f"{found['tokens_per_second']:,.0f}", peak, words])
        device = torch.cuda.get_device_name() if SEVERAL else "CPU"
        title = f"Sharded training, {os.environ['WORLD_SIZE']} processes on {device}"
        display.table(title, ["what", "outcome", "tokens/s", "peak GiB", "loss and norms"], rows)
        if options.out is not None:
            write_json(options.out, {"device": device, "torch": torch.__version__, "results": results})
    sys.exit(not results["works"])


if __name__ == "__main__":
    main()
