"""The study's command; see `python -m benchmarks.evidence --help`."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import benchmarks.evidence
from benchmarks.common import RESULTS
from benchmarks.evidence import page
from benchmarks.evidence.cells import Cell, Results, measure
from benchmarks.evidence.plan import cells
from benchmarks.evidence.tasks import TASKS, Shelf, shortened

PAGE = Path("docs/evidence.md")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=benchmarks.evidence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["run", "page"], nargs="?", default="run", help="page: write the page alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cell", type=Cell.named, action="append", help="TASK/ARM/SEED: run this one, even if it stands")
    parser.add_argument("--only", default="", help="run only cells whose name matches this regular expression")
    parser.add_argument(
        "--share", default="1/1", metavar="I/N", help="run each Nth cell, from the Ith: processes side by side"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
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
    at, of = map(int, options.share.split("/"))
    wanted = options.cell or [cell for cell in cells(options.seeds) if re.search(options.only, str(cell))][at - 1 :: of]
    if options.list:
        for cell in wanted:
            print("stands " if cell in standing else "missing", cell)
        return
    began = time.monotonic()
    for cell in wanted if options.what == "run" else ():
        if (cell in standing and not options.cell) or time.monotonic() - began > 60 * options.minutes:
            continue
        entry = measure(cell, tasks[cell.task], shelf)
        results.write(entry)
        if options.cell and cell in standing:
            print(f"{cell} was: {said(standing[cell])}")
        print(f"{cell}: {said(entry)}", flush=True)
    if not options.cell or options.what == "page":
        if not shown.exists():
            shown.write_text(PAGE.read_text())
        page.write(results.read(), shown)


def said(entry: dict[str, Any]) -> str:
    """A cell in a line."""
    first, last = entry["curve"][0], entry["curve"][-1]
    shown = {"accuracy": [first["accuracy"], last["accuracy"]], "cpu_seconds": round(entry.get("cpu_seconds", 0), 1)}
    return json.dumps(shown | {"steps": entry.get("steps", 0)})


if __name__ == "__main__":
    main()
