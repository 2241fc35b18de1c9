"""What `--dry-run --on this` and `--measure` say against the run itself: seconds and peak memory.

    python -m benchmarks.plan --case demo       # the demo's NPD arm
    python -m benchmarks.plan --case smollm2    # examples/smollm2.yaml, shortened; needs `make smollm2`'s package

Each figure is of a process of its own: the arithmetic from the machine's peaks, the same with a trial's rates, and the run
without evaluation. On a busy machine the processor's shares say how far they can be compared. `python -m benchmarks.plan
--paper` reckons the paper's own run, and needs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

import npd
from benchmarks.common import RESULTS, fresh, record
from npd.config import Config, load_config
from npd.costs import Costs
from npd.demo import demo
from npd.forecast import Load, Model, Reader, model_of, rates
from npd.hardware import DEVICES
from npd.observe.display import Display
from npd.preflight import prepare
from npd.registry import ENGINES
from npd.trial import costs_on, peak_bytes

QUIET: dict[str, dict[str, Any]] = {
    "evaluation": {"tasks": [], "kl_prompts": 0},
    "tracking": {"trackers": [], "report": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["one"])
    parser.add_argument("--case", choices=["demo", "smollm2"], default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--way", choices=["peaks", "measured", "run"], default="run")
    parser.add_argument("--paper", action="store_true")
    options = parser.parse_args()
    if options.paper:
        return paper()
    if options.what == "one":
        print(json.dumps(one(options.case, options.way, options.out)))
        return
    prepare_case(options.case, options.out)
    found = {
        way: fresh("benchmarks.plan", case=options.case, way=way, out=options.out) for way in ("peaks", "measured", "run")
    }
    real = found["run"]
    for way in ("peaks", "measured"):
        for figure in ("seconds", "bytes"):
            found[way][f"{figure}_ratio"] = found[way][figure] / real[figure]
        print(f"{options.case}, {way}: {found[way]['seconds']:.0f} s of {real['seconds']:.0f} "
              f"({found[way]['seconds_ratio']:.2f}×), {found[way]['bytes'] / 2**30:.2f} GiB of {real['bytes'] / 2**30:.2f} "
              f"({found[way]['bytes_ratio']:.2f}×); processor's share {found[way]['processor_share']:.2f} and "
              f"{real['processor_share']:.2f}")  # fmt: skip
    earlier = RESULTS / "plan.json"
    runs = json.loads(earlier.read_text())["runs"] if earlier.exists() else {}
    record("plan", {}, runs | {options.case: found})


def prepare_case(case: str, out: Path) -> None:
    """Data and the student that it begins with."""
    out.mkdir(parents=True, exist_ok=True)
    if case == "smollm2":
        if not (out / "start").exists():
            subprocess.run([sys.executable, "examples/smollm2_prompts.py", "--out", str(out)], check=True)
            cut = ["--layers", "24", "--student.model", str(out / "start"), "--data.train", str(out / "train.jsonl")]
            subprocess.run([sys.executable, "-m", "npd.cli", "init-student", "examples/smollm2.yaml", *cut], check=True)
        return
    if not (out / "warm-up/student").exists():
        demo._write_data(out, 0)
        demo._write_untrained_student(out / "untrained", 0)
        sections: dict[str, dict[str, Any]] = {
            "student": {"model": str(out / "untrained")},
            "data": {"train": str(out / "references.jsonl")},
            "schedule": {"passes": 1000},
            "training": {"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": demo.WARM_UP_STEPS},
        }
        demo._run("warm-up", "sft", demo._config(out, "warm-up", 0, sections), Display(quiet=True))


def config_of(case: str, out: Path) -> Config:
    if case == "demo":
        return demo._config(out, f"npd-{time.time_ns()}", 0, QUIET)
    changed = QUIET | {
        "student": {"model": str(out / "start")},
        "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
        "rollout": {"max_new_tokens": 48, "batch_size": 16, "part_size": 32},
    }
    tree = {f"{section}.{key}": value for section, options in changed.items() for key, value in options.items()}
    data = {"data.train": str(out / "train.jsonl"), "data.eval": None, "data.split": "train[:48]"}
    return load_config("examples/smollm2.yaml", tree | data | {"run_dir": str(out / f"smollm2-{time.time_ns()}")})


def one(case: str, way: str, out: Path) -> dict[str, Any]:
    """Seconds and bytes of a case, planned or run."""
    config = config_of(case, out)
    if way == "run":
        began, worked = time.perf_counter(), time.process_time()
        result = npd.distill(config)
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
        facts = {"bytes": peak_bytes(), "steps": result.steps, "tokens": result.tokens}
        return {"seconds": seconds, "processor_share": worked / seconds} | facts
    setup = prepare(config, "distill")
    began, worked = time.perf_counter(), time.process_time()
    costs = costs_on(setup, "this", measure=way == "measured", response_tokens=None, display=Display(quiet=True))
    share = (time.process_time() - worked) / (time.perf_counter() - began)
    trial = costs.measured
    of_trial = {"bytes": trial.memory, "trial_seconds": trial.seconds} if trial else {}
    return figures(costs) | of_trial | {"processor_share": share}


def figures(costs: Costs) -> dict[str, Any]:
    memory = costs.best.memory
    return {
        "seconds": costs.best.times.whole,
        "bytes": max(sum(parts.values()) for parts in memory.values()),
        "parts": memory,
        "response": costs.lengths.response,
        "rates": vars(costs.case.rates),
    }


def paper() -> None:
    """366 NPU-hours for 1.2 million prompts, 7B to 1B: rollouts 300, training 42, teacher 18, other 6."""
    common: dict[str, Any] = {"vocab_size": 153_376, "tie_word_embeddings": False, "max_position_embeddings": 32_768}
    student = model_of(Qwen2Config(hidden_size=1536, intermediate_size=6144, num_hidden_layers=26, num_attention_heads=12,
                                   num_key_value_heads=6, **common))  # fmt: skip
    teacher = model_of(Qwen2Config(hidden_size=4096, intermediate_size=12_800, num_hidden_layers=34, num_attention_heads=32,
                                   num_key_value_heads=8, **common))  # fmt: skip
    device = next(device for device in DEVICES if device.name == "Ascend 910B")
    rows = []
    for response in (250, 500, 1000, 2000):
        for engine, batch in (("vllm", 256), ("vllm", 64), (ENGINES.default, 64)):
            load = Load(2, 5, float("inf"), 1_200_000, 200.0, float(response), 1.0, 1172, 1.0, 131_072, 32_768, batch, 4096,
                        8192, True)  # fmt: skip
            of = rates(load, student, Reader(student, 2), [Reader(teacher, 2)], device, ENGINES[engine].pace)
            tokens = 2 * load.response_tokens
            row = {
                "response": response,
                "engine": engine,
                "batch": batch,
                "rollout": tokens * of.write / 3600,
                "reading": tokens * of.read / 3600,
                "training": 10 * load.pass_tokens * of.train / 3600,
            }
            rows.append(row)
            print(f"{response:5} tokens, {engine:12} {batch:3} at once: rollouts {row['rollout']:7.1f}, "
                  f"reading {row['reading']:6.1f}, training {row['training']:6.1f} device-hours")  # fmt: skip
    for name, hours in (("training", 42), ("teacher", 18)):
        for share in (0.26, 0.5):
            length = length_of(hours * 3600 * device.flops * share, name, student, teacher)
            tokens = 2.4e6 * length / (300 * 3600)
            rows.append({"from": name, "share": share, "response": length, "rollout tokens/s": tokens})
            print(f"{hours} hours of {name} at {100 * share:.0f}% of the peak: {length:.0f} tokens a response behind 100 of "
                  f"a prompt; 300 hours of rollouts then write {tokens:.0f} tokens/s a device")  # fmt: skip
    runs = json.loads((RESULTS / "plan.json").read_text())["runs"] if (RESULTS / "plan.json").exists() else {}
    record("plan", {}, runs | {"paper": rows})
    print(f"student {student.parameters / 1e9:.2f}B, teacher {teacher.parameters / 1e9:.2f}B")


def length_of(operations: float, work: str, student: Model, teacher: Model, prompt: float = 100.0) -> float:
    """Response tokens of which so many operations can be: ten passes of training over 1.2 million samples, or the teacher's
    reading of 2.4 million, with and without their prompts."""

    def needed(response: float) -> float:
        sample = prompt + response
        if work == "training":
            return 1.2e7 * 3 * student.forward(sample, response, sample / 2)
        return 2.4e6 * (teacher.forward(sample, response, sample / 2) + teacher.forward(response, response, response / 2))

    low, high = 0.0, 1e5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) < operations else (low, middle)
    return low


if __name__ == "__main__":
    main()
