"""How long a report of a large run takes to write and to open, and how large it is.

    python benchmarks/report.py --samples 100000 --steps 50000

The run is made up: responses of 50 to 450 tokens over a vocabulary of 32,000, top-10 of a teacher, 50 generations with two
of 100 parts each still there, a trainer and four refreshes. Opening is measured in Chromium, if it is there: from the
request to the last plot drawn. Bounds: written in 30 s, opened in 3 s, 6 MB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from npd.config import load_config
from npd.observe.events import Events
from npd.records import Manifest
from npd.selection import Select, Summary
from npd.store import Store

VOCABULARY, TOP_K, PARTS = 32_000, 10, 100
TEXT = "the model learns from its own text while a teacher reads every token once and says how likely it was"
WORDS = TEXT.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--keep", type=Path, help="Directory for the run and its report; a temporary one by default.")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    run_dir = folder / "run"
    if not run_dir.exists():
        began = time.perf_counter()
        make_run(run_dir, options.samples, options.steps)
        print(f"made up the run in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "npd.cli", "report", str(run_dir)], check=True)
    figures: dict[str, Any] = {
        "samples": options.samples,
        "steps": options.steps,
        "write_seconds": round(time.perf_counter() - began, 2),
        "bytes": (run_dir / "report.html").stat().st_size,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    figures |= opened(run_dir / "report.html")
    print(json.dumps(figures, indent=1))
    if not options.keep:
        shutil.rmtree(folder)


def make_run(run_dir: Path, samples: int, steps: int) -> None:
    tree = {"run_dir": str(run_dir), "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    config = load_config(tree | {"schedule": {"generations": 50, "kl_budget": 0.1}})
    store, rng = Store(run_dir), np.random.default_rng(0)
    store.open(config, "distill")
    words = {f"{WORDS[i % len(WORDS)]}{i // len(WORDS) or ''} ": i for i in range(VOCABULARY)}
    store.policy(0).mkdir(parents=True)
    Tokenizer(tokenizer_models.WordLevel(words, unk_token=next(iter(words)))).save(str(store.policy(0) / "tokenizer.json"))
    select, each = Select(config.selection), samples // (2 * PARTS)
    for g in (48, 49):
        summary, tokens = Summary(config.selection), 0
        for part in range(PARTS):
            table = select(responses(rng, g, part, each))
            tokens += len(table["response_ids"].combine_chunks().flatten())
            store.write_part(g, part, table)
            summary.add(table)
        parts = store.part_entries(g, PARTS)
        manifest = Manifest(g, samples // 2, parts, g, summary.result(), response_tokens=tokens, length_stops=0)
        store.finish_generation(manifest)
        for old in range(48) if g == 48 else ():
            store.finish_generation(replace(manifest, generation=old, removed=True))
    metrics = []
    for step in range(1, steps + 1):
        noise = float(rng.gamma(2, 0.01))
        line = {
            "step": step,
            "generation": step * 50 // (steps + 1),
            "pass": 0,
            "tokens": 100_000 * step,
            "loss": 1 / step + noise,
        }
        line |= {"ce": 1 + noise, "kd": noise, "near_policy_kl": noise, "lr": 1e-5, "grad_norm": 1 + noise, "fill": 0.95}
        metrics.append(json.dumps(line | {"tokens_per_second": 1e4 + 1e3 * noise}))
    store.metrics.write_text("\n".join(metrics) + "\n")
    end = 2.0 * steps
    for role in ("trainer", "refresh-0", "refresh-1", "refresh-2", "refresh-3"):
        lines = []
        names = ("train", "wait", "publish") if role == "trainer" else ("generate", "score", "store")
        times = np.sort(rng.uniform(0, end, 8000)).tolist()
        for i, (start, stop) in enumerate(itertools.pairwise(times)):
            where = {"role": role, "process": 1, "thread": "MainThread", "generation": 1, "part": i}
            lines.append(json.dumps({"name": names[i % 3], "start": start, "end": stop, **where}))
        with Events(run_dir / "events.jsonl").path.open("a") as file:
            file.write("\n".join(lines) + "\n")


def responses(rng: np.random.Generator, g: int, part: int, n: int) -> pa.Table:
    lengths = rng.integers(50, 450, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    T = int(offsets[-1])

    def ragged(values: np.ndarray, kind: Any, width: int = 1) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array((offsets * width).astype(np.int32)), pa.array(values, kind))

    topk = np.sort(rng.gumbel(0, 2, (T, TOP_K)), axis=1)[:, ::-1]
    topk = topk - np.log(np.exp(topk).sum(1, keepdims=True)) - 0.01
    ids = rng.integers(0, VOCABULARY, (T, TOP_K))
    taken = np.where(rng.random(T) < 0.95, ids[:, 0], rng.integers(0, VOCABULARY, T))
    columns: dict[str, Any] = {
        "sample_id": [f"g{g:03d}-p{part:05d}-{i:05d}" for i in range(n)],
        "prompt_id": [f"q{i}" for i in range(n)],
        "source": rng.choice(["mathematics", "code", "chat", "law"], n).tolist(),
        "prompt_ids": rng.integers(0, VOCABULARY, (n, 80)).tolist(),
        "response_ids": ragged(taken, pa.int32()),
        "behavior_logprobs": ragged(-rng.gamma(1, 0.3, T), pa.float32()),
        "policy_version": pa.array(np.full(n, g), pa.int32()),
        "finish_reason": rng.choice(["stop", "length"], n, p=[0.95, 0.05]).tolist(),
        "topk_ids": ragged(ids.ravel(), pa.int32(), TOP_K),
        "topk_logprobs": ragged(topk.ravel(), pa.float32(), TOP_K),
    }
    for name in ("student_nll", "student_nll_free", "teacher_nll", "teacher_nll_free"):
        columns[name] = pa.array(rng.uniform(0.5, 2, n) + ("free" in name), pa.float32())
    return pa.table(columns)


def opened(file: Path) -> dict[str, float]:
    """Seconds until a browser has drawn everything; the fastest and the slowest of three."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        print("no Chromium and chromedriver here: opening is not measured")
        return {}
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1440,1000",
    ):
        options.add_argument(option)
    seconds = []
    first = []
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        for _ in range(3):
            browser.get("about:blank")
            began = time.perf_counter()
            browser.get(file.resolve().as_uri())
            first.append(time.perf_counter() - began)  # figures and tables are there; plots follow
            while browser.execute_script("return document.documentElement.dataset.ready") != "true":
                time.sleep(0.01)
            seconds.append(time.perf_counter() - began)
    finally:
        browser.quit()
    return {
        "loaded_seconds": round(max(first), 2),
        "open_seconds_fastest": round(min(seconds), 2),
        "open_seconds_slowest": round(max(seconds), 2),
    }


if __name__ == "__main__":
    main()
