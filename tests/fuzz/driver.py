"""Runs cases, reports the faults, keeps the counts."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType

import tqdm

from .disks import permitted
from .pinned import PINNED
from .sandbox import become_reaper, leftover_processes
from .world import Case, World

KINDS = ("kills", "configurations", "data", "answers", "models", "runs", "surroundings", "disks")


def module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{kind}")


def attempt(kind: str, number: int, world: World) -> Case:
    """Run one case; its faults tell what is wrong."""
    case = Case(kind, number)
    try:
        module(kind).attack(case, world)
    except Exception:
        case.fault(f"the harness failed: {traceback.format_exc()}")
    leftover_processes()
    return case


def warm_up(world: World) -> None:
    """Import what a run imports, so that forks need not."""
    case = Case("warm-up", 0)
    scene = world.scene(case)
    tree = world.tree(
        scene.run, {"data": {"eval": str(world.data)}, "evaluation": {"tasks": ["answer"]}, "tracking": {"report": True}}
    )
    names = scene.path / "names"

    def tell() -> None:
        import atexit

        atexit.register(lambda: names.write_text("\n".join(sys.modules)))

    scene.npd("distill", str(scene.write_config(tree)), hook=tell, fine=[0])
    if case.faults:
        raise SystemExit(f"a plain run fails: {case.faults}\n{case.said}")
    for name in [*names.read_text().split(), "datasets", "gguf", "peft", "npd.generations.follower", "npd.report.page"]:
        if name.split(".")[0] in {
            "npd",
            "torch",
            "transformers",
            "accelerate",
            "datasets",
            "peft",
            "pyarrow",
            "tokenizers",
        } | {*("jinja2", "rich", "safetensors", "numpy", "yaml", "plotly", "gguf", "urllib3", "http", "reasoning_gym")}:
            try:
                importlib.import_module(name)
            except ImportError:
                continue
    assert threading.active_count() == 1, f"a process with threads can't be forked safely: {threading.enumerate()}"


def told(case: Case) -> str:
    lines = [f"{case.kind} {case.number}: {case.told}", *(f"    {fault}" for fault in case.faults)]
    if case.said.strip():
        lines.append("    said: " + case.said.strip()[-600:].replace("\n", "\n          "))
    lines.append(f"    again: python -m tests.fuzz --kind {case.kind} --only {case.number}")
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def main(root: Path) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--kind", choices=KINDS, action="append", help="kinds of cases; all by default")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", type=int, help="the first number that is not run")
    parser.add_argument("--only", type=int, action="append", help="numbers of cases")
    parser.add_argument("--pinned", action="store_true", help="cases that failed once too")
    parser.add_argument("--keep", action="store_true", help="leave the folder of the last case")
    parser.add_argument("--shard", default="1/1", help="I/N: every Nth case, from the Ith")
    parser.add_argument("--processes", type=int, default=1, help="shards to run at once")
    parser.add_argument("--record", type=Path, help="add lines here; cases that stand here without a fault are not run again")
    options = parser.parse_args()
    if options.processes > 1:
        shards = range(1, options.processes + 1)
        command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--processes", "1"]
        running = [subprocess.Popen([*command, "--shard", f"{shard}/{options.processes}"]) for shard in shards]
        shutil.rmtree(root)
        sys.exit(max(process.wait() for process in running))
    try:
        failures = run(options, root)
    finally:
        if options.keep:
            print(f"The last case lies in {root}/case.")
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.exit(bool(failures))


def run(options: argparse.Namespace, root: Path) -> int:
    """Run the cases that are asked for; how many failed."""
    become_reaper()
    tqdm.tqdm.monitor_interval = 0  # no thread here: this process forks
    shard, shards = map(int, options.shard.split("/"))
    done = recorded(options.record)
    began, failures, count = time.monotonic(), 0, Counter[str]()
    kinds = options.kind or KINDS
    can_mount = "disks" in kinds and permitted()
    world = World(root)
    warm_up(world)
    for kind in kinds:
        if kind == "disks" and not can_mount:
            print("disks are left out: this system permits no mounts here.")
            continue
        whole = options.to if options.to is not None else module(kind).COUNT
        pinned = PINNED.get(kind, []) if options.pinned else []
        numbers = options.only or [*range(options.first, whole), *pinned]
        for number in numbers:
            if number % shards != shard - 1 or (kind, number) in done:
                continue
            start = time.monotonic()
            case = attempt(kind, number, world)
            case.told = case.told.replace(str(root), "ROOT")
            count[kind] += 1
            if case.faults:
                failures += 1
                print(told(case), flush=True)
            elif options.only:
                print(f"{kind} {number}: {case.told}: {case.status}\n{case.said}", flush=True)
            if options.record:
                line = {"kind": kind, "number": number, "status": case.status, "group": case.group, "told": case.told}
                line |= {"faults": case.faults, "seconds": round(time.monotonic() - start, 2)}
                options.record.parent.mkdir(parents=True, exist_ok=True)
                with options.record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    each = ", ".join(f"{number} {kind}" for kind, number in count.items())
    print(f"{sum(count.values())} cases ({each}) in {time.monotonic() - began:.0f} s, {failures} failed.", flush=True)
    return failures


def recorded(path: Path | None) -> set[tuple[str, int]]:
    """Cases whose last try had no fault."""
    if path is None or not path.exists():
        return set()
    last = {(line["kind"], line["number"]): line["faults"] for line in map(json.loads, path.read_text().splitlines())}
    return {case for case, faults in last.items() if not faults}
