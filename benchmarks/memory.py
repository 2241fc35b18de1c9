"""Anonymous memory that prompts and kept samples take as they grow (Linux).

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa

from npd.demo.tokenizer import build_tokenizer
from npd.prompts import load_prompts
from npd.samples import Samples
from npd.store import Store


def anonymous() -> float:
    """MiB of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def prompts(folder: Path, count: int) -> None:
    rng = random.Random(0)
    file = folder / f"{count}.jsonl"
    with file.open("w") as out:
        for i in range(count):
            out.write(json.dumps({"prompt": "+".join(str(rng.randrange(100)) for _ in range(8)) + f"+{i}="}) + "\n")
    base = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    load_prompts(str(file), build_tokenizer(), max_prompt_tokens=64)
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    print(f"{count:,} prompts: {seconds:.1f} s, at most {peak - base:.1f} MiB more while they are read")


def samples(folder: Path, parts: int, rows: int = 1024, tokens: int = 128, top_k: int = 10) -> None:
    store = Store(folder / "run")
    columns = {
        "sample_id": [f"s{i}" for i in range(rows)],
        "prompt_ids": [list(range(20))] * rows,
        "response_ids": [list(range(tokens))] * rows,
        "behavior_logprobs": [[0.5] * tokens] * rows,
        "verdict": ["proximal"] * rows,
        "topk_ids": [list(range(tokens * top_k))] * rows,
        "topk_logprobs": [[0.25] * (tokens * top_k)] * rows,
    }
    store.write_part(0, 0, pa.table(columns))
    for part in range(1, parts):
        os.link(store.part(0, 0), store.part(0, part))
    taken = Samples(store)
    first = 0.0
    for part in range(parts):
        taken.fetch(0, part)
        taken.take(0, part)
        if part == parts // 3:
            first = anonymous()
    grown = (parts - 1 - parts // 3) * rows
    print(f"{grown:,} more samples: {(anonymous() - first) * 2**20 / grown:.0f} bytes each")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in (10_000, 100_000, 1_000_000):
            prompts(Path(folder), count)
        samples(Path(folder), 60)


if __name__ == "__main__":
    main()
