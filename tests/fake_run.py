"""A run directory made by hand, with whatever text one likes: no model is needed to look at a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from npd.config import load_config
from npd.observe.events import Events, SpanName
from npd.records import Manifest, StepLine
from npd.selection import Select, Summary
from npd.store import Store

HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "<!--<script>",
    "]]><img src=x onerror=window.hacked=3>",
    "\u202etfel ot thgir\u202c",
    "\u2028\u2029\x00\x07\x1b[31m\x7f",
    "{{ 7*7 }}{% raw %}",
    "<a href='https://example.com/'>x</a>",
    "&lt;b&gt;&amp;amp;",
    "مرحبا بالعالم",
    "🧑‍🔬",
    "javascript:window.hacked=4",
]


def write_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer.json in which token i is words[i]."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))


def responses(
    rng: np.random.Generator, n: int, vocabulary: int, k: int = 3, sources: tuple[str, ...] = ("a", "b")
) -> pa.Table:
    """[n] scored responses of random tokens; the teacher's top-k are ordered and hold less than all probability."""
    lengths = rng.integers(1, 12, n)
    ids = [rng.integers(0, vocabulary, t).tolist() for t in lengths]
    raw = [np.sort(rng.dirichlet(np.ones(k + 1), t)[:, :k])[:, ::-1] for t in lengths]
    topk = [[rng.choice(vocabulary, k, replace=False) for _ in range(t)] for t in lengths]
    behavior = [np.log(rng.uniform(0.05, 1, t)) for t in lengths]
    columns: dict[str, Any] = {
        "prompt_id": [f"q{i}" for i in range(n)],
        "source": rng.choice(sources, n).tolist(),
        "prompt_ids": [rng.integers(0, vocabulary, 3).tolist() for _ in range(n)],
        "response_ids": ids,
        "behavior_logprobs": pa.array([b.tolist() for b in behavior], pa.list_(pa.float32())),
        "finish_reason": rng.choice(["stop", "length"], n).tolist(),
        "student_nll": pa.array([-b.mean() for b in behavior], pa.float32()),
        "student_nll_free": pa.array(rng.uniform(1, 3, n), pa.float32()),
        "teacher_nll": pa.array(rng.uniform(0, 3, n), pa.float32()),
        "teacher_nll_free": pa.array(rng.uniform(1, 3, n), pa.float32()),
        "topk_ids": [np.concatenate(t).tolist() for t in topk],
        "topk_logprobs": pa.array([np.log(r).ravel().tolist() for r in raw], pa.list_(pa.float32())),
    }
    return pa.table(columns)


def step_line(step: int, **figures: Any) -> StepLine:
    """A step of 100 tokens."""
    line = StepLine(
        step=step,
        generation=0,
        passes=0,
        tokens=100 * step,
        loss=2 / step,
        ce=3 / step,
        kd=1.5 / step,
        near_policy_kl=0.01 * (step % 7),
        lr=1e-5,
        grad_norm=1 + 1 / step,
        fill=0.9,
        tokens_per_second=1000.0 + step,
    )
    return replace(line, **figures)


def make_run(
    path: Path,
    *,
    words: list[str] | None = None,
    sources: tuple[str, ...] = ("a", "b"),
    generations: int = 2,
    steps: int = 30,
    finished: bool = True,
    **options: Any,
) -> Path:
    """A run of `generations` x 2 parts x 20 responses and `steps` steps, with spans of a trainer and a refresh."""
    words = words or [f"w{i} " for i in range(20)]
    tree = {"run_dir": str(path), "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}} | options
    config = load_config(tree)
    store, rng = Store(path), np.random.default_rng(5)
    store.open(config, "distill")
    write_tokenizer(store.policy(0), words)
    select = Select(config.selection)
    for g in range(generations):
        summary, tokens, stops = Summary(config.selection), 0, 0
        for part in range(2):
            table = responses(rng, 20, len(words), sources=sources)
            name = pa.array([f"g{g:03d}-p{part:05d}-{i:05d}" for i in range(20)])
            table = table.append_column("sample_id", name).append_column("policy_version", pa.array([g] * 20, pa.int32()))
            table = select(table)
            store.write_part(g, part, table)
            summary.add(table)
            tokens += sum(map(len, table["response_ids"].to_pylist()))
            stops += table["finish_reason"].to_pylist().count("length")
        parts = store.part_entries(g, 2)
        store.finish_generation(Manifest(g, 40, parts, g, summary.result(), response_tokens=tokens, length_stops=stops))
    trainer, refresh = Events(path / "events.jsonl"), Events(path / "events.jsonl", "refresh-0")
    trainer.write(SpanName.STARTED, 1000.0, 1000.0)
    for g in range(generations):
        refresh.write(SpanName.GENERATE, 1000.0 + 50 * g, 1020.0 + 50 * g, generation=g, part=0)
        refresh.write(SpanName.SCORE, 1020.0 + 50 * g, 1030.0 + 50 * g, generation=g, part=0)
        trainer.write(SpanName.WAIT, 1000.0 + 50 * g, 1010.0 + 50 * g, generation=g)
        trainer.write(SpanName.TRAIN, 1010.0 + 50 * g, 1050.0 + 50 * g, generation=g, passes=0)
    for step in range(1, steps + 1):
        store.append_metrics(step_line(step, generation=min(generations - 1, step * generations // (steps + 1))))
    end = 1000.0 + 50 * generations
    os.utime(store.metrics, (end, end))
    if finished:
        trainer.write(SpanName.ENDED, 1000.0 + 50 * generations, 1000.0 + 50 * generations)
        store.student.mkdir()
        (store.student / "npd.json").write_text(json.dumps({"step": steps, "tokens": 100 * steps, "sha256": {}}))
    return path
