"""A cluster on paper: the schedule with 1 to 10,000 devices that generate; figures and tables of docs/cluster.md.

    python -m benchmarks.cluster                      # all of it: three minutes on one busy core, the same every time
    python -m benchmarks.cluster --only devices lead  # some of it
    python -m benchmarks.cluster --draw               # the page and its plots from benchmarks/results/cluster.json
    python -m benchmarks.cluster --replay RUN_DIR     # a real run's events: what the simulation makes of its durations

The loop is npd's own; devices, stores and failures are simulated (`benchmarks.simulation`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.common import RESULTS
from benchmarks.simulation import Cluster, Schedule, Store, replay, simulate
from benchmarks.tables import table
from npd.config import load_config
from npd.forecast import Load, Rates, model_of, training_bytes
from npd.hardware import DEVICES, EFFICIENCY, GIB
from npd.splits import pass_seconds, times
from npd.store import write_json
from npd.train.memory import USABLE, step_memory

PAGE = Path("docs/cluster.md")
PLOTS = Path("docs/cluster")
HOUR = 3600.0

# The paper's run, as METHOD's sources report it: 366 device-hours for 1.2 million prompts, two generations of five passes.
PROMPTS = 1_200_000
GENERATING = (300 + 18) / 2 * HOUR  # device-seconds of a generation: rollouts and teacher
PASS = 42 / 10 * HOUR  # device-seconds of a pass
TRAINERS = 8
SNAPSHOT = 2e9  # bytes: 1B in bfloat16
DATA = PROMPTS * 500 * 38.0  # bytes of a generation: 500 tokens a response, 38 bytes each (docs/benchmarks.md, Scoring)

BASE = Cluster(
    devices=150,
    work=GENERATING,
    overhead=5.0,  # seconds a part: assumed
    scatter=0.1,
    node=8,
    repair=600.0,
    store=Store(latency=0.1, bandwidth=10e9),
    snapshot=SNAPSHOT,
    data=DATA,
    loading=20.0,  # assumed
)


def schedule(part: int = 1024, lead: float = 1.0, trainers: float = TRAINERS, **more: Any) -> Schedule:
    """The paper's two generations of five passes, in parts of so many prompts."""
    options: dict[str, Any] = {"generations": 2, "passes": 5, "lead": lead, "parts": math.ceil(PROMPTS / part)}
    return Schedule(**options | {"pass_seconds": PASS / trainers, "publishing": 0.5} | more)


def outcome(planned: Schedule, cluster: Cluster, seed: int = 0) -> dict[str, float]:
    found = simulate(planned, cluster, seed)
    return {
        "hours": found.seconds / HOUR,
        "waited": found.wait_share,
        "first": found.waited[0] / HOUR,
        "later": sum(found.waited[1:]) / HOUR,
        "idle": found.idle_share,
        "lost_parts": float(found.lost_parts),
    }


# -- experiments: each a list of rows


def devices() -> list[dict[str, Any]]:
    rows = []
    for count in (1, 3, 10, 30, 100, 150, 300, 1000, 3000, 10_000):
        for part in (1024, 128) if count >= 300 else (1024,):
            for lead in (1.0, 5.0) if part == 1024 else (1.0,):
                found = outcome(schedule(part, lead), replace(BASE, devices=count))
                rows.append({"devices": count, "part": part, "lead": lead} | found)
    return rows


def lead() -> list[dict[str, Any]]:
    return [
        {"devices": count, "lead": ahead} | outcome(schedule(lead=ahead, generations=4), replace(BASE, devices=count))
        for count in (40, 60, 100, 150, 300)
        for ahead in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
    ]


def part_size() -> list[dict[str, Any]]:
    rows = []
    for count in (30, 150, 1000):
        for part in (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536):
            for name, store in (("0.1 s, 10 GB/s", BASE.store), ("30 s, 1 GB/s", Store(30.0, 1e9))):
                found = outcome(schedule(part), replace(BASE, devices=count, store=store, slow=0.02, slowness=3.0))
                rows.append({"devices": count, "part": part, "store": name} | found)
    return rows


def stragglers() -> list[dict[str, Any]]:
    rows = []
    for part in (128, 1024, 8192):
        for slow, slowness in ((0.0, 1.0), (0.01, 3.0), (0.01, 10.0), (0.1, 3.0), (0.1, 10.0), (0.3, 3.0)):
            found = outcome(schedule(part), replace(BASE, slow=slow, slowness=slowness))
            rows.append({"part": part, "slow": slow, "slowness": slowness} | found)
        for scatter in (0.5, 1.0):
            found = outcome(schedule(part), replace(BASE, scatter=scatter))
            rows.append({"part": part, "scatter": scatter} | found)
    return rows


def failures() -> list[dict[str, Any]]:
    rows = []
    for part in (1024, 8192):
        for between in (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0):
            for repair in (600.0, 3600.0):
                cluster = replace(BASE, failures=1 / between, repair=repair)
                found = [outcome(schedule(part), cluster, seed) for seed in range(3)]
                middle = {key: statistics.mean(one[key] for one in found) for key in found[0]}
                often = {"between": between if between < math.inf else None}
                rows.append({"part": part, "repair": repair, **often, **middle})
    return rows


def one_node() -> list[dict[str, Any]]:
    """What one node of eight costs that fails once, at a moment that is drawn."""
    rows = []
    for part in (256, 1024, 8192):
        for repair in (600.0, 1e9):
            whole = simulate(schedule(part), BASE).seconds
            rng = np.random.default_rng(7)
            costs = []
            for when in rng.uniform(0, whole, 8):
                cluster = replace(BASE, fail_at=((float(when), int(rng.integers(18))),), repair=repair)
                costs.append(simulate(schedule(part), cluster).seconds - whole)
            rows.append({"part": part, "back": repair < 1e9, "mean": statistics.mean(costs), "most": max(costs)})
    return rows


def store() -> list[dict[str, Any]]:
    return [
        {"devices": count, "bandwidth": bandwidth}
        | outcome(schedule(1024 if count < 1000 else 128), replace(BASE, devices=count, store=Store(0.1, bandwidth)))
        for count in (150, 1000, 10_000)
        for bandwidth in (0.1e9, 0.3e9, 1e9, 3e9, 10e9, 100e9)
    ]


def split() -> list[dict[str, Any]]:
    """The split of 64 and of 256 devices: the formula of `npd.splits` and the simulation; train 0 is turns of all."""
    rows: list[dict[str, Any]] = []
    for count in (64, 256):
        load = Load(2, 5, math.inf, PROMPTS, 0.0, 500.0, 1.0, 1172, 1.0, 131_072, 32_768, 256, 4096, 8192, True)
        made = math.ceil(1172 / count) * GENERATING / 1172
        rows.append({"devices": count, "train": 0, "formula": times(load, PASS / count, made, turns=True).whole / HOUR})
        for train in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48):
            if train >= count:
                continue
            planned = schedule(lead=1.0, trainers=train)
            cluster = Cluster(devices=count - train, work=GENERATING)
            rounds = math.ceil(planned.parts / (count - train)) * GENERATING / planned.parts
            formula = times(load, PASS / train, rounds, turns=False).whole / HOUR
            found = outcome(replace(planned, publishing=0.0), cluster)
            rough = outcome(planned, replace(BASE, devices=count - train))
            rows.append({"devices": count, "train": train, "formula": formula, "with_overheads": rough["hours"]} | found)
    return rows


QWEN: dict[str, Any] = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
MODELS: dict[str, PreTrainedConfig] = {
    "0.5B": Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                        num_key_value_heads=2, tie_word_embeddings=True, **QWEN),
    "1.5B": Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                        num_key_value_heads=2, tie_word_embeddings=True, **QWEN),
    "3B": Qwen2Config(hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
                      num_key_value_heads=2, tie_word_embeddings=True, **QWEN),
    "8B": LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False, max_position_embeddings=32_768),
}  # fmt: skip


def sharding() -> list[dict[str, Any]]:
    """When weights are to be shared: arithmetic alone. Rows of 8,192 tokens, 524,288 tokens a step."""
    config = load_config(
        {
            "run_dir": "-",
            "student": {"model": "-"},
            "data": {"train": "-"},
            "packing": {"length": 8192},
            "training": {"batch_tokens": 524_288},
        }
    )
    rows = []
    for name, known in MODELS.items():
        model, step = model_of(known), step_memory(config, known, bfloat16=True)
        held = 4.0 * model.parameters
        load = Load(2, 5, math.inf, 100_000, 200.0, 500.0, 1.0, 100, 1.0, 524_288, 8192, 64, 4096, 8192, True)
        for device in DEVICES:
            if device.name not in ("H100", "A100-80GB", "L40S", "4090"):
                continue
            forward = 3 * model.forward(700, 500, 350) / 700
            of = Rates(forward / (device.flops * EFFICIENCY["training"].accelerator), 1.0, 1.0)
            for count in (1, 2, 4, 8, 16, 64):
                row: dict[str, Any] = {"student": name, "device": device.name, "devices": count}
                for way, shards in (("whole", 1), ("shared", count)):
                    room = training_bytes(step, held, 0.0, shards=shards, checkpointing=True)
                    gathered = 2.0 * model.parameters
                    seconds = pass_seconds(load, of, held, gathered, device, devices=count, shards=shards)
                    row |= {way: seconds, f"{way} GiB": sum(room.values()) / GIB,
                            f"{way} fits": sum(room.values()) <= USABLE * device.memory}  # fmt: skip
                rows.append(row)
    return rows


EXPERIMENTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "devices": devices,
    "lead": lead,
    "part size": part_size,
    "stragglers": stragglers,
    "failures": failures,
    "one node": one_node,
    "store": store,
    "split": split,
    "sharding": sharding,
}


# -- the page

COLOURS = ("#1f6feb", "#d1570b", "#2da44e", "#8250df", "#bf3989", "#6e7781")


def lines(
    name: str,
    rows: Sequence[dict[str, Any]],
    x: str,
    panels: Sequence[tuple[str, str, float]],
    by: Callable[[dict[str, Any]], str],
    label: str,
    *,
    log: bool = True,
) -> None:
    """One SVG: a panel for each (key, what it shows, scale), a line for each group."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "npd", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.1), squeeze=False)
    groups = list(dict.fromkeys(by(row) for row in rows))
    for panel, (key, what, scale) in zip(axes[0], panels, strict=True):
        for i, group in enumerate(groups):
            mine = [row for row in rows if by(row) == group]
            points = [row[x] for row in mine], [row[key] * scale for row in mine]
            panel.plot(*points, marker="o", markersize=3, label=group, color=COLOURS[i % len(COLOURS)])
        if log:
            panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.set_title(what, fontsize=9)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if "hours" in [key for key, *_ in panels] and max(row["hours"] for row in rows) > 30 * min(row["hours"] for row in rows):
        first = axes[0][[key for key, *_ in panels].index("hours")]
        first.set_yscale("log")
        first.set_ylim(bottom=min(row["hours"] for row in rows) / 1.5)
    figure.tight_layout()
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")
    pyplot.close(figure)


HOURS, WAITS, RESTS = (
    ("hours", "hours of the run", 1.0),
    ("waited", "the trainer waits, %", 100.0),
    ("idle", "generating devices rest, %", 100.0),
)


def draw(results: dict[str, Any]) -> None:
    runs = results["runs"]
    lines(
        "devices",
        runs["devices"],
        "devices",
        [HOURS, WAITS, RESTS],
        lambda r: f"parts of {r['part']}, lead {r['lead']:g}",
        "devices that generate",
    )
    lines(
        "lead", runs["lead"], "lead", [HOURS, WAITS], lambda r: f"{r['devices']} devices", "schedule.lead, passes", log=False
    )
    lines(
        "part-size",
        runs["part size"],
        "part",
        [HOURS, WAITS],
        lambda r: f"{r['devices']}; store {r['store']}",
        "prompts of a part",
    )
    lines(
        "store", runs["store"], "bandwidth", [HOURS, RESTS], lambda r: f"{r['devices']} devices", "the store's bytes a second"
    )
    lines(
        "split",
        [r for r in runs["split"] if r["train"]],
        "train",
        [HOURS, WAITS],
        lambda r: f"{r['devices']} devices",
        "of them train",
    )
    text = PAGE.read_text()
    for name, make in TABLES.items():
        mark = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        body = make(runs[name])
        text = re.sub(mark, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    PAGE.write_text(text)


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.095 or share == 0 else f"{100 * share:.1f}%"


def _devices(rows: Sequence[dict[str, Any]]) -> str:
    heads = [
        "devices",
        "parts of",
        "lead",
        "hours",
        "first wait, hours",
        "later waits, hours",
        "trainer waits",
        "devices rest",
    ]
    return table(heads, [[f"{r['devices']:,}", f"{r['part']:,}", f"{r['lead']:g}", f"{r['hours']:.2f}", f"{r['first']:.2f}",
                          f"{r['later']:.2f}", percent(r["waited"]), percent(r["idle"])] for r in rows])  # fmt: skip


def _lead(rows: Sequence[dict[str, Any]]) -> str:
    leads = sorted({r["lead"] for r in rows})
    counts = sorted({r["devices"] for r in rows})
    cell = {(r["devices"], r["lead"]): r for r in rows}
    return table(["devices", *(f"lead {one:g}" for one in leads)],
                 [[str(count), *(f"{cell[count, one]['hours']:.1f}" for one in leads)] for count in counts])  # fmt: skip


def _stragglers(rows: Sequence[dict[str, Any]]) -> str:
    def what(r: dict[str, Any]) -> str:
        if "scatter" in r:
            return f"parts' durations scattered, σ {r['scatter']:g}"
        return f"{percent(r['slow'])} of the devices {r['slowness']:g} times slower" if r["slow"] else "none"

    parts = sorted({r["part"] for r in rows})
    cell = {(what(r), r["part"]): r for r in rows}
    return table(["stragglers", *(f"parts of {part:,}" for part in parts)],
                 [[name, *(f"{cell[name, part]['hours']:.2f}" for part in parts)]
                  for name in dict.fromkeys(what(r) for r in rows)])  # fmt: skip


def _failures(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["a node fails every", "back after", "parts of", "hours", "parts lost"]
    return table(heads, [["never" if r["between"] is None else f"{r['between']:g} h", f"{r['repair'] / 60:g} min",
                          f"{r['part']:,}", f"{r['hours']:.2f}", f"{r['lost_parts']:.0f}"] for r in rows
                         if r["between"] is not None or r["repair"] == 600.0])  # fmt: skip


def _one_node(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["parts of", "back", "costs the run on average, s", "at most, s"]
    return table(heads, [[f"{r['part']:,}", "after 10 min" if r["back"] else "never", f"{r['mean']:.0f}", f"{r['most']:.0f}"]
                         for r in rows])  # fmt: skip


def _split(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["devices", "train", "formula, hours", "simulated", "with scatter, store and overheads", "trainer waits"]
    return table(heads, [[str(r["devices"]), str(r["train"]), f"{r['formula']:.2f}", f"{r['hours']:.2f}",
                          f"{r['with_overheads']:.2f}", percent(r["waited"])] if r["train"] else
                         [str(r["devices"]), "all, in turns", f"{r['formula']:.2f}", "", "", ""] for r in rows])  # fmt: skip


def _sharding(rows: Sequence[dict[str, Any]]) -> str:
    heads = [
        "student",
        "device",
        "one device needs",
        "first that fits",
        "a pass on 8, weights whole",
        "shared",
        "shared costs",
    ]
    out = []
    for student, device in dict.fromkeys((r["student"], r["device"]) for r in rows):
        mine = [r for r in rows if (r["student"], r["device"]) == (student, device)]
        eight = next(r for r in mine if r["devices"] == 8)
        fits = next((f"{r['devices']}, {'whole' if r['whole fits'] else 'shared'}" for r in mine
                     if r["whole fits"] or r["shared fits"]), "none of 64")  # fmt: skip
        whole = f"{eight['whole']:.0f} s" if eight["whole fits"] else "does not fit"
        shared = f"{eight['shared']:.0f} s" if eight["shared fits"] else "does not fit"
        ratio = eight["shared"] / eight["whole"] - 1
        out.append([student, device, f"{mine[0]['whole GiB']:.0f} GiB", fits, whole, shared, f"{100 * ratio:+.0f}%"])
    return table(heads, out)


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "devices": _devices,
    "lead": _lead,
    "stragglers": _stragglers,
    "failures": _failures,
    "one node": _one_node,
    "split": _split,
    "sharding": _sharding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--replay", type=Path, metavar="RUN_DIR")
    options = parser.parse_args()
    file = RESULTS / "cluster.json"
    if options.replay:
        found = replay(options.replay, load_config(options.replay / "config.yaml"))
        predicted = found.predict()
        twice = found.predict(2 * found.cluster.devices)
        print(
            f"{options.replay}: {found.seconds:.1f} s; from its parts and passes {predicted:.1f} s "
            f"({predicted / found.seconds:.2f}×); with twice the devices {twice:.1f} s"
        )
        return
    runs = json.loads(file.read_text())["runs"] if file.exists() else {}
    if not options.draw:
        for name in options.only or EXPERIMENTS:
            began = time.perf_counter()
            runs[name] = EXPERIMENTS[name]()
            print(f"{name}: {len(runs[name])} rows, {time.perf_counter() - began:.0f} s", flush=True)
        write_json(file, {"runs": runs})
    if runs.keys() >= EXPERIMENTS.keys():
        draw({"runs": runs})


if __name__ == "__main__":
    main()
