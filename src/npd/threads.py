"""CPU threads on a machine that others use too.

PyTorch's threads (OpenMP's) spin while they wait for each other, so on a core that somebody else takes half of they wait for
a thread that does not run: two of them beside one busy process were measured 13 to 48 times slower than one. Asked to sleep
instead they lose a third where nobody else computes. So npd asks when it begins, and counts as it goes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LOAD = Path("/proc/loadavg")
ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By any of these a user has said how threads wait."""
SAMPLES, APART = 5, 0.002


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_running() -> float:
    """Threads of other processes that want this process's cores, about: the middle of a few looks; 0 where nobody says."""
    looks = sorted(_look() for _ in range(SAMPLES) if not time.sleep(APART))
    # Of a machine of which this process has a part, they want that part of the cores.
    return looks[len(looks) // 2] * cores() / max(cores(), os.cpu_count() or 1)


def _look() -> int:
    try:
        running = int(LOAD.read_text().split()[3].split("/")[0])
        mine = sum(
            (task / "stat").read_text().rpartition(")")[2].split()[0] == "R" for task in Path("/proc/self/task").iterdir()
        )
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, running - max(1, mine))


def free_threads(most: int) -> int:
    """Of `most` threads, as many as have a core of their own now; at least one."""
    return most if most == 1 else max(1, min(most, cores() - round(others_running())))


def wait_politely() -> None:
    """Let threads that are started later sleep while they wait, if somebody else computes on this machine now.

    It must come before PyTorch is loaded, and changes nothing where the user has said how threads wait.
    """
    if not any(name in os.environ for name in ASKED) and others_running() >= 1:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
