"""Runs the cells that are missing; several processes may do so side by side."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.evidence.cells import Cell, Results, claimed, measure
from benchmarks.evidence.tasks import Shelf, Task
from npd.errors import NpdError


@dataclass(frozen=True)
class Work:
    """What there is to run, and until when."""

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
            with claimed(self.shelf.folder / "lock" / str(cell).replace("/", "-")) as mine:
                standing = self.results.read() if mine else {}
                if not mine or (cell in standing and not self.anew):
                    continue
                if time.monotonic() + self._seconds(cell, standing) > self.until:
                    continue
                began = time.monotonic()
                try:
                    entry = measure(cell, self.tasks[cell.task], self.shelf)
                except NpdError as problem:  # such as a filter that drops everything
                    print(f"{cell} failed: {problem}", flush=True)
                    continue
                self.results.write(entry | {"took": round(time.monotonic() - began, 1)})
                if cell in standing:
                    print(f"{cell} was: {said(standing[cell])}")
                print(f"{cell}: {said(entry)}", flush=True)

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
