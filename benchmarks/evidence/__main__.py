"""The study's command; see `python -m benchmarks.evidence --help`."""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import benchmarks.evidence
from benchmarks.common import RESULTS
from benchmarks.evidence import page
from benchmarks.evidence.cells import Cell, Results, measure
from benchmarks.evidence.plan import cells
from benchmarks.evidence.tasks import TASKS, Shelf, Task, shortened

PAGE = Path("docs/evidence.md")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=benchmarks.evidence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        choices=["run", "cells", "page"],
        nargs="?",
        default="run",
        help="cells: run them and leave the page as it is; page: write it alone",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cell", type=Cell.named, action="append", help="TASK/ARM/SEED: run this one, even if it stands")
    parser.add_argument("--only", default="", help="run only cells whose name matches this regular expression")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time, each on a core of its own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell that would not end within so many")
    parser.add_argument(
        "--short", action="store_true", help="tiny models and a few steps: tries the machinery, shows nothing"
    )
    parser.add_argument("--list", action="store_true", help="say which cells stand, and run none")
    parser.add_argument("--cache", type=Path, help="teachers, data and warm students: runs/evidence")
    parser.add_argument("--results", type=Path, help="benchmarks/results/evidence")
    parser.add_argument("--page", type=Path, help="docs/evidence.md; with --short a copy of it beside the results")
    options = parser.parse_args(arguments)
    cache = options.cache or Path("runs/evidence-short" if options.short else "runs/evidence")
    results = Results(options.results or (cache / "results" if options.short else RESULTS / "evidence"))
    shown = options.page or (cache / PAGE.name if options.short else PAGE)
    shelf = Shelf(cache)
    tasks = {name: shortened(task) for name, task in TASKS.items()} if options.short else TASKS
    standing = results.read()
    wanted = options.cell or [cell for cell in cells(options.seeds) if re.search(options.only, str(cell))]
    if options.list:
        for cell in wanted:
            print("stands " if cell in standing else "missing", cell)
        return
    if options.what != "page":
        work = Work(wanted, tasks, shelf, results, time.monotonic() + 60 * options.minutes, bool(options.cell))
        if options.processes == 1:
            work()
        else:
            spawn = multiprocessing.get_context("spawn")
            cores = sorted(os.sched_getaffinity(0))
            workers = [spawn.Process(target=work, args=(cores[i % len(cores)],)) for i in range(options.processes)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    if options.what == "page" or (options.what == "run" and not options.cell):
        if not shown.exists():
            shown.write_text(PAGE.read_text())
        page.write(results.read(), shown)


@dataclass(frozen=True)
class Work:
    """Run those of these cells that are missing; several processes may do so side by side."""

    wanted: list[Cell]
    tasks: dict[str, Task]
    shelf: Shelf
    results: Results
    until: float
    """As time.monotonic() has it, which all processes of a machine share."""
    anew: bool

    def __call__(self, core: int | None = None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
            torch.set_num_threads(1)
        for cell in self.wanted:
            with self._mine(cell) as mine:
                standing = self.results.read() if mine else {}
                if not mine or (cell in standing and not self.anew):
                    continue
                if time.monotonic() + self._seconds(cell, standing) > self.until:
                    continue
                began = time.monotonic()
                entry = measure(cell, self.tasks[cell.task], self.shelf)
                self.results.write(entry | {"took": round(time.monotonic() - began, 1)})
                if cell in standing:
                    print(f"{cell} was: {said(standing[cell])}")
                print(f"{cell}: {said(entry)}", flush=True)

    @contextmanager
    def _mine(self, cell: Cell) -> Iterator[bool]:
        """Does no other process run it?"""
        file = self.shelf.folder / "lock" / str(cell).replace("/", "-")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @staticmethod
    def _seconds(cell: Cell, standing: dict[Cell, dict[str, Any]]) -> float:
        """What the longest of its like took; a guess for the first."""
        like = [entry.get("took", 0.0) for one, entry in standing.items() if (one.task, one.arm) == (cell.task, cell.arm)]
        return 1.2 * max(like, default=30.0)


def said(entry: dict[str, Any]) -> str:
    """A cell in a line."""
    first, last = entry["curve"][0], entry["curve"][-1]
    shown = {"accuracy": [first["accuracy"], last["accuracy"]], "cpu_seconds": round(entry.get("cpu_seconds", 0), 1)}
    return json.dumps(shown | {"steps": entry.get("steps", 0)})


if __name__ == "__main__":
    main()
