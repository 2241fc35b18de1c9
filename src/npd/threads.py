"""How CPU threads wait for each other on a machine that others use too.

PyTorch's threads (OpenMP's) spin while they wait, so that on a core which somebody else takes half of they wait for a thread
that does not run: two of them beside one busy process were measured 13 to 48 times slower than one thread. Told to sleep
instead they are 1.2 to 1.9 times slower than one, but lose a third where nobody else computes. So npd looks before it begins.
The number of threads stays: sums are rounded by it, and what is computed must not hang on what else runs on a machine.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LOAD = Path("/proc/loadavg")
ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By any of these a user has said how threads wait."""
LOOKS, APART = 5, 0.002


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_running() -> float:
    """Threads of other processes that want this process's cores, about; 0 where the system does not say."""
    looks = []
    for _ in range(LOOKS):
        looks.append(_look())
        time.sleep(APART)
    # Where this process has a part of the machine's cores, they want that part of them.
    return sorted(looks)[LOOKS // 2] * cores() / max(cores(), os.cpu_count() or 1)


def _look() -> int:
    try:
        running = int(LOAD.read_text().split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, running - 1)  # this process, which looks


def wait_politely() -> None:
    """Let threads that are started later sleep while they wait, if others now compute on cores that they would take.

    It must come before PyTorch is loaded, and changes nothing where the user has said how threads wait.
    """
    count = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(count) if count.isdecimal() and int(count) else cores()
    if threads == 1 or "torch" in sys.modules or any(name in os.environ for name in ASKED):
        return
    if threads + others_running() > cores() + 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
