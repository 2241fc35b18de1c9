"""Fill of packed rows, and the time to pack a million samples.

python -m benchmarks.packing
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.common import interleaved, record, timed
from npd.packing import pack
from npd.train.loop import BLOCK


def lengths_of(kind: str, count: int, capacity: int) -> np.ndarray:
    """Lengths of prompt and response: log-normal as responses are, short ones as the demo's, or anything."""
    rng = np.random.default_rng(0)
    if kind == "log-normal":  # median 600 tokens, a tenth above 2,100
        return np.clip(np.exp(rng.normal(np.log(600), 1.0, count)), 16, capacity).astype(np.int64)
    if kind == "short":
        return rng.integers(30, 65, count)
    return rng.integers(1, capacity + 1, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    cases = {
        "log-normal, rows of 32,768": ("log-normal", 32768),
        "log-normal, rows of 4,096": ("log-normal", 4096),
        "30 to 64, rows of 256": ("short", 256),
        "uniform 1 to 32,768, rows of 32,768": ("uniform", 32768),
    }
    runs = []
    for turn, name in interleaved(list(cases), options.repeat):
        kind, capacity = cases[name]
        lengths = lengths_of(kind, options.count, capacity)
        rows: list[list[int]] = []
        seconds = timed(lambda: rows.extend(pack(lengths.tolist(), capacity)))  # noqa: B023
        # In training a pass is packed in blocks, shuffled ones: the last row of each may stay empty in part.
        blocks = sum(len(pack(lengths[at : at + BLOCK].tolist(), capacity)) for at in range(0, len(lengths), BLOCK))
        total = int(lengths.sum())
        run = {
            "case": name,
            "turn": turn,
            "seconds": seconds,
            "rows": len(rows),
            "fill": total / (len(rows) * capacity),
            "fill_in_blocks": total / (blocks * capacity),
            "padded_fill": total / (len(lengths) * int(lengths.max())),
        }
        runs.append(run)
        print(run, flush=True)
    record("packing", vars(options), runs)


if __name__ == "__main__":
    main()
