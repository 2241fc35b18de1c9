"""The study's command; see `python -m benchmarks.evidence --help`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import time
from pathlib import Path

import benchmarks.evidence
from benchmarks.common import RESULTS
from benchmarks.evidence import page
from benchmarks.evidence.cells import Cell, Results
from benchmarks.evidence.plan import cells
from benchmarks.evidence.tasks import TASKS, Shelf, shortened
from benchmarks.evidence.work import Work

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


if __name__ == "__main__":
    main()
