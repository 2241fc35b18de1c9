"""Cases that failed once: `make test` runs them. The number of a case that is found to fail later belongs here."""

from __future__ import annotations

PINNED: dict[str, list[int]] = {
    "kills": [5],
    "configurations": [7, 67, 74, 110],
    "data": [10, 28, 49, 59, 174],
    "answers": [9, 10, 35, 44, 61, 64, 88],
    "models": [7, 42, 152],
    "runs": [10, 28, 73, 77, 83, 97],
    "surroundings": [28, 29, 35, 41],
    "disks": [15, 20],
}
