"""How many student updates, which KL budget, which filter: NPD's schedules compared on the demo's task over several seeds.

    python benchmarks/study.py run --seed 0 --out runs/study       # once for each seed
    python benchmarks/study.py run --seed 0 --out runs/study --near-mastery
    python benchmarks/study.py table --out runs/study              # Markdown

Every arm goes on from the seed's warm-up student for the same number of optimiser steps.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from npd import run
from npd.demo import demo
from npd.demo.task import make_problems
from npd.observe.display import Display
from npd.store import write_json

STEPS = 90
SCHEDULES: dict[str, dict[str, Any]] = {
    "0 updates": {"generations": 1, "passes": 10},
    "1 update": {"generations": 2, "passes": 5},
    "2 updates": {"generations": 3, "passes": 4},
    "4 updates": {"generations": 5, "passes": 2},
    "KL budget 0.10": {"generations": 50, "passes": 10, "kl_budget": 0.10},
    "KL budget 0.03": {"generations": 50, "passes": 10, "kl_budget": 0.03},
}
LEADS: dict[str, dict[str, Any]] = {
    "1 update, lead 1": {"generations": 2, "passes": 5, "lead": 1.0},
    "1 update, lead 3": {"generations": 2, "passes": 5, "lead": 3.0},
    "4 updates, lead 1": {"generations": 5, "passes": 2, "lead": 1.0},
}
MIXES: dict[str, dict[str, Any]] = {
    "1 update, 30% references": {"generations": 2, "passes": 5, "references": 0.3},
    "1 update, 60% references": {"generations": 2, "passes": 5, "references": 0.6},
}
FILTERS = {"none": "none", "fixed [0, 0.8]": "delta_ifd", "adaptive": "adaptive"}
WARM_UP = {"far": demo.WARM_UP_STEPS, "near": 480}
NEAR_REFERENCES = 20_000  # worked references of the longer warm-up
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, by number of seeds


def run_seed(out: Path, seed: int, regime: str, wanted: str | None) -> None:
    home = out / f"{regime}-{seed}"
    display = Display(quiet=True)
    if not (home / "held-out.jsonl").exists():
        demo._write_data(home, seed)
        demo._write_untrained_student(home / "untrained", seed)
        if regime == "near":
            more = make_problems(NEAR_REFERENCES, seed=seed + 1000)
            demo._write_jsonl(home / "references.jsonl", ({"prompt": p.prompt, "completion": p.completion} for p in more))
    warm_up = demo._config(
        home,
        "warm-up",
        seed,
        {
            "student": {"model": str(home / "untrained")},
            "data": {"train": str(home / "references.jsonl")},
            "schedule": {"passes": 10_000},
            "training": {"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": WARM_UP[regime]},
        },
    )
    demo._run("warm-up", "sft", warm_up, display)
    figures = home / "figures"
    record(figures / "start.json", evaluated(warm_up, display) | {"arm": "start", "filter": "none"})
    filters = {name: schedules for name in FILTERS for schedules in [SCHEDULES]}
    cases = [(arm, options, name) for name, arms in filters.items() for arm, options in arms.items()]
    cases += [(arm, options, "none") for arm, options in (LEADS | MIXES).items()]
    for arm, options, name in cases:
        slug = f"{arm} {FILTERS[name]}".replace(" ", "-").replace(",", "").replace("%", "")
        file = figures / f"{slug}.json"
        if file.exists() or (wanted and not re.search(wanted, slug)):
            continue
        sections: dict[str, dict[str, Any]] = {
            "schedule": {"lead": 0.0} | options,
            "selection": {"rule": FILTERS[name]},
            "rollout": {"max_new_tokens": 72, "batch_size": 256, "part_size": 400},
            "training": {
                "batch_tokens": 8192,
                "micro_batch_rows": 16,
                "learning_rate": 1e-3 if regime == "far" else 3e-4,
                "final_learning_rate": 1e-4,
                "max_steps": STEPS,
            },
        }
        if "references" in options:
            sections["data"] = {"references": "teacher"}
        config = demo._config(home, slug, seed, sections)
        began = time.monotonic()
        result = run.distill(config.model_copy(update={"evaluation": warm_up.evaluation.model_copy(update=QUIET)}))
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        kls = [line["near_policy_kl"] for line in lines if line.get("near_policy_kl") is not None]
        kept = rows = 0
        for manifest in sorted(result.run_dir.glob("generations/g*/manifest.json")):
            selection = json.loads(manifest.read_text())["selection"]
            kept, rows = kept + selection["verdicts"].get("proximal", 0), rows + selection["rows"]
        record(
            file,
            evaluated(config, display)
            | {
                "arm": arm,
                "filter": name,
                "seconds": seconds,
                "steps": result.steps,
                "tokens": result.tokens,
                "near_policy_kl": statistics.fmean(kls),
                "near_policy_kl_max": max(kls),
                "updates": len(result.generations) - 1,
                "kept": kept / rows,
            },
        )


QUIET: dict[str, Any] = {"tasks": [], "kl_prompts": 0}


def evaluated(config: Any, display: Display) -> dict[str, Any]:
    figures = run.evaluate(config, display=display)[1]
    return {"accuracy": figures["eval/answer/accuracy"], "kl_to_teacher": figures["eval/kl_to_teacher"]}


def record(file: Path, entry: dict[str, Any]) -> None:
    write_json(file, entry)
    print(json.dumps(entry), flush=True)


def interval(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and the half-width of its 95% interval over seeds, by Student's t."""
    mean = scale * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = scale * T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(out: Path) -> None:
    for regime in WARM_UP:
        # (arm, filter) -> seed's directory -> figures
        entries: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for file in sorted(out.glob(f"{regime}-*/figures/*.json")):
            entry = json.loads(file.read_text())
            entries.setdefault((entry["arm"], entry["filter"]), {})[file.parent.parent.name] = entry
        if not entries:
            continue
        starts = [e["accuracy"] for e in entries["start", "none"].values()]
        shown = ", ".join(f"{100 * a:.1f}" for a in starts)
        print(f"\nThe warm-up's students: {shown} %\n")
        heads = ["schedule", "filter", "seeds", "accuracy %", "against 1 update, none", "KL to teacher", "near-policy KL"]
        heads += ["highest", "updates", "kept", "steps"]
        print(f"| {' | '.join(heads)} |")
        print("|---" * len(heads) + "|")
        base = entries["1 update", "none"]
        for arm in [*SCHEDULES, *LEADS, *MIXES]:
            for name in FILTERS:
                mine = entries.get((arm, name), {})
                if not mine:
                    continue
                es = list(mine.values())
                paired = [e["accuracy"] - base[home]["accuracy"] for home, e in mine.items() if home in base]
                cells = [
                    str(len(es)),
                    f"{100 * statistics.fmean([e['accuracy'] for e in es]):.1f}",
                    "" if es[0] in base.values() else interval(paired, 100, 1),
                    f"{statistics.fmean([e['kl_to_teacher'] for e in es]):.3f}",
                    f"{statistics.fmean([e['near_policy_kl'] for e in es]):.3f}",
                    f"{statistics.fmean([e['near_policy_kl_max'] for e in es]):.2f}",
                    f"{statistics.fmean([e['updates'] for e in es]):.1f}",
                    f"{100 * statistics.fmean([e['kept'] for e in es]):.0f}%",
                    f"{statistics.fmean([e['steps'] for e in es]):.0f}",
                ]
                print(f"| {arm} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--near-mastery", action="store_true", help="a longer warm-up and a smaller learning rate")
    parser.add_argument("--only", help="run only arms whose name matches this regular expression")
    options = parser.parse_args()
    if options.what == "table":
        table(options.out)
    else:
        run_seed(options.out, options.seed, "near" if options.near_mastery else "far", options.only)


if __name__ == "__main__":
    main()
