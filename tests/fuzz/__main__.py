"""Throws hostile and broken things at npd, and counts how it ends.

    python -m tests.fuzz                                        everything, over an hour: goes on where it was stopped
    python -m tests.fuzz --kind kills --from 0 --to 100         some cases; nothing is recorded
    python -m tests.fuzz --kind data --only 17 --keep           one case, with what it said; its folder stays

A case is a pure function of its kind and number, except that kinds which kill by time do so by this machine's. Whatever is
thrown, a command must end with status 0, or 2 and one paragraph; 1, 130 or 143 only with a reason. It must not hang, print a
traceback or control characters, write outside of its run directory, leave processes or files behind, take memory or time
without bound, write a secret anywhere, or train on nonsense.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
if __name__ == "__main__":
    root = Path(tempfile.mkdtemp(prefix="npd-fuzz-"))
    # As in conftest.py, and before a library is imported. What a library keeps must not come from the user, nor go there.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", HF_HOME=str(root / "hf"))
    from tests.fuzz.driver import main

    main(root)
