"""Does a run fit the memory of this machine? What `--dry-run` counts against what is free."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from npd.costs import case_of, known_lengths
from npd.forecast import HOST
from npd.growth import gib
from npd.hardware import GIB, Hardware
from npd.preflight import Setup
from npd.train.memory import USABLE

CGROUP = Path("/sys/fs/cgroup")
SMALLEST = 0.005 * GIB  # of a part that is named


class Place(NamedTuple):
    """A device's memory, in bytes."""

    name: str
    parts: dict[str, float]
    """What the run needs there at once, by what it is for."""
    free: float
    there: float

    @property
    def needed(self) -> float:
        return sum(self.parts.values())

    @property
    def usable(self) -> float:
        """Of a GPU's free memory not all can be allocated."""
        return self.free if self.name == "cpu" else min(self.free, USABLE * self.there)

    @property
    def short(self) -> bool:
        return self.needed > self.usable


def memory_of_cpu() -> tuple[float, float]:
    """Bytes of main memory that are free, and that there are, as far as this process may have them."""
    known = psutil.virtual_memory()
    free, there = float(known.available), float(known.total)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most, now = (float((CGROUP / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # "max", or no such group
            continue
        if most < there:
            free, there = min(free, max(0.0, most - now)), most
    return free, there


def places(setup: Setup) -> list[Place]:
    """Every device of this machine that the run takes, and what it needs there."""
    placed = setup.placement
    train, turns = placed.train, placed.turns or not setup.generations.by_student
    roles = _by_role(setup, train[0], alone=len(train) == 1, turns=turns)
    needed: dict[str, dict[str, float]] = {}

    def add(device: str, role: str, parts: dict[str, float], *, instead: bool = False) -> None:
        """`instead`: of what is there already only the larger stays."""
        there = needed.get(device, {})
        host = {"Python and libraries": HOST} if device == "cpu" else {}
        parts = {f"{role}: {name}" if role else name: size for name, size in (host | parts).items()}
        if instead:
            needed[device] = max(there, parts, key=lambda each: sum(each.values()))
        else:
            needed[device] = dict(Counter(there) + Counter(parts))

    for device in train:
        add(device, "", roles["each"]) if "each" in roles else add(device, "training", roles["training"])
    if turns and "generating" in roles:  # on one GPU each leaves it to the other
        add(placed.rollout, "generating", roles["generating"], instead=placed.rollout in train)
    for number, worker in enumerate(placed.workers):
        parts = _by_role(setup, worker.rollout, alone=True, turns=False)["generating"]
        apart = {"teacher": parts.pop("teacher", 0.0)} if worker.teacher != worker.rollout else {}
        add(worker.rollout, f"refresh {number}", parts)
        if apart:
            add(worker.teacher, f"refresh {number}", apart)
    if not setup.generations.by_student and setup.config.data.references == "teacher":
        add(
            placed.teacher,
            "references",
            {"teacher": roles["teacher"]["weights"]},
            instead=placed.teacher in train and placed.teacher != "cpu",
        )
    return [Place(device, parts, *_memory(device)) for device, parts in needed.items()]


def _memory(device: str) -> tuple[float, float]:
    """Bytes of a device that are free, and that there are."""
    if device == "cpu":
        return memory_of_cpu()
    free, there = torch.cuda.mem_get_info(torch.device(device))
    return float(free), float(there)


def _by_role(setup: Setup, device: str, *, alone: bool, turns: bool) -> dict[str, dict[str, float]]:
    """Bytes by part of whoever trains and generates on devices of this kind."""
    cpu = device == "cpu"
    _, there = _memory(device)
    # Of speed nothing is asked here.
    kind = Hardware(device, 1.0, 1.0, there, 1.0, "", "cpu" if cpu else "accelerator")
    case = case_of(setup, kind, known_lengths(setup.config), setup.config.rollout.engine)
    roles = case.memory_by_role(1 if alone else len(setup.placement.train), turns=turns)
    return roles | {"teacher": {"weights": sum(teacher.weights for teacher in case.teachers)}}


def memory_rows(setup: Setup, found: list[Place]) -> list[list[str]]:
    """[what, how much] of each device, for a table, and of an actor where actors generate."""
    rows = []
    for place in found:
        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in place.parts.items() if size >= SMALLEST)
        free = f"{gib(place.free)} that are free ({gib(place.there)} in all)"
        rows.append([f"memory of {place.name}", f"needs about {gib(place.needed)} of {free}" + (f": {told}" if told else "")])
    if setup.placement.producer is not None and setup.generations.by_student:
        for device, where in (("cpu", "on a CPU"), ("cuda", "on a GPU")):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            parts = _by_role(setup, "cuda:0" if device == "cuda" else device, alone=True, turns=False)["generating"]
            whole = sum(parts.values()) + HOST * (device == "cpu")
            rows.append([f"memory of one that generates, {where}", f"needs about {gib(whole)}"])
    return rows


def memory_notes(found: list[Place]) -> list[str]:
    """A warning for each device whose memory will not do."""
    return [
        f"Warning: {place.name} needs about {gib(place.needed)} of memory, and {gib(place.usable)} can be had there: it will "
        f"not do. Most of it: {max(place.parts, key=lambda name: place.parts[name])}; docs/guide.md says what takes less."
        for place in found
        if place.short
    ]
