"""Main memory that this process may have: the machine's, and what control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MINE = Path("/proc/self/cgroup")

# Where a group's limit, use and statistics stand, and which of them the system takes back as it needs it: files in the cache.
# Without that a container that has read a model's weights looks full.
UNIFIED = ("memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable"))
BY_CONTROLLER = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def main_memory() -> tuple[float, float]:
    """Bytes of main memory that are free, and that there are, as far as this process may have them.

    Each group that it is in may have a limit: containers, jobs of a batch system, services.
    """
    known = psutil.virtual_memory()
    free, there = float(known.available), float(known.total)
    for folder, (limit, used, cached) in _groups():
        try:
            most, now = (float((folder / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # "max", or no such group
            continue
        if most < known.total:
            free, there = min(free, max(0.0, most - max(0.0, now - _sum(folder / "memory.stat", cached)))), min(there, most)
    return free, there


def _groups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """Folders of the groups of this process and of those above them, as far as they are to be seen."""
    try:
        lines = MINE.read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    paths = {"": "/", "memory": "/"}  # in a container its own group is often the root
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            if controller in paths:
                paths[controller] = path
    for controller, root, names in (("", GROUPS, UNIFIED), ("memory", GROUPS / "memory", BY_CONTROLLER)):
        mine = [part for part in paths[controller].split("/") if part not in ("", ".", "..")]
        for depth in range(len(mine), -1, -1):
            yield root.joinpath(*mine[:depth]), names


def _sum(statistics: Path, names: tuple[str, ...]) -> float:
    try:
        found = dict(line.split() for line in statistics.read_text().splitlines())
        return sum(float(found.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0.0
