"""Each stage's seconds beside its floor: its floating-point operations at the rate this machine multiplies matrices.

python -m benchmarks.floor --repeat 3

Operations of matrix products alone, with attention counted as causal within each sample and the head at response positions
only: 2 for each parameter and token forward, 6 forward and backward. Decoding also reads every weight once a step of a
batch, which is its floor where the batch is small: both are given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import interleaved, matmul_rate, record, timed
from benchmarks.scoring import SMOLLM2, Case
from npd.config import LossConfig, Sampling
from npd.demo.demo import TEACHER
from npd.models import batches_for, head_weight
from npd.packing import pack_tokens
from npd.scoring import Prefill
from npd.train.trainer import LossModel


def attention(case: Case, contexts: list[list[int]]) -> float:
    """Operations of attention's two products in one forward pass."""
    config = case.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum((len(c) + len(r)) ** 2 / 2 for c, r in zip(contexts, case.responses, strict=True))
    return 4 * pairs * width * config.num_attention_heads * config.num_hidden_layers


def forward(case: Case, contexts: list[list[int]]) -> float:
    """Operations of reading the responses behind these contexts."""
    tokens = sum(map(len, contexts)) + case.response_tokens
    head = 2 * head_weight(case.model).numel() * case.response_tokens
    return 2 * case.matrices() * tokens + head + attention(case, contexts)


Layout = Callable[[list[int], int], Iterator[tuple[list[list[int]], int]]]


def stages(
    student: Case, teacher: Case, options: argparse.Namespace, layout: Layout | None = None
) -> dict[str, tuple[Callable[[], Any], float]]:
    """Stage -> (work, operations); `layout` is that of training's rows, None: what the model takes."""
    layout = layout or partial(batches_for, student.model)
    teacher.responses, teacher.contexts, teacher.response_tokens = (
        student.responses,
        student.contexts,
        student.response_tokens,
    )
    start: list[list[int]] = [[student.vocabulary.start_id]] * len(student.responses)
    read_s, read_t = (Prefill(c.model, c.vocabulary, c.pad, options.batch_tokens) for c in (student, teacher))
    generate, sampling = student.engine(options.batch_size), Sampling(options.new_tokens)
    lengths = [len(c) + len(r) for c, r in zip(student.contexts, student.responses, strict=True)]
    readings = read_t(student.contexts, student.responses, options.top_k)
    loss = LossModel(student.model, LossConfig())
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0)

    def train() -> None:
        for rows, length in layout(lengths, options.train_tokens):
            p = pack_tokens(student.contexts, student.responses, rows, length, student.pad)
            ids, values = (np.concatenate([readings[i][n] for i in p.samples]) for n in (1, 2))
            target = torch.from_numpy(ids).long(), torch.from_numpy(values)
            loss(p.input_ids, p.position_ids, p.predictors, p.labels, *target, p.cu_seq_lens, p.lengths).loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return {
        "student, forward and backward": (train, 3 * forward(student, student.contexts)),
        "optimiser": (update, 0.0),
        "teacher, prefill": (
            lambda: read_t(student.contexts, student.responses, options.top_k),
            forward(teacher, student.contexts),
        ),
        "teacher, free": (lambda: read_t(start, student.responses), forward(teacher, start)),
        "student, free": (lambda: read_s(start, student.responses), forward(student, start)),
        "decoding": (
            lambda: generate.answer(student.table.select(["prompt_ids"]), sampling),
            forward(student, student.contexts),
        ),
    }


def shares(act: Callable[[], Any]) -> dict[str, float]:
    """Where the seconds of a call go, as shares: operators on the CPU by kind, and what no operator accounts for."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds = timed(act)
    kinds = dict.fromkeys(("matrix products", "attention", "joining tensors", "other operators"), 0.0)
    for event in found.key_averages():
        kind = "other operators"
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            kind = "matrix products"
        elif "attention" in event.key:
            kind = "attention"
        elif event.key == "aten::cat":
            kind = "joining tensors"
        kinds[kind] += event.self_cpu_time_total / 1e6 / seconds
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", default="runs/bench/seed-0/warm-up/student")
    parser.add_argument("--pairs", nargs="*", default=["demo", "smollm2"])
    parser.add_argument("--count", type=int, default=64, help="responses; the demo's student writes 16 times more")
    parser.add_argument("--new-tokens", type=int, default=72)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--train-tokens", type=int, default=4096, help="of a forward and backward pass")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for pair in options.pairs:
        demo = pair == "demo"
        count = options.count * (16 if demo else 1)
        student = Case(str(Path(options.warm)) if demo else SMOLLM2, count, options.new_tokens)
        teacher = Case(TEACHER, 1, 1) if demo else student
        work = stages(student, teacher, options)
        work["student, forward and backward"][0]()  # warms up, and makes gradients
        for turn, name in interleaved(list(work), options.repeat):
            act, operations = work[name]
            rate = matmul_rate(seconds=0.3)
            seconds = timed(act)
            if name == "optimiser":
                work["student, forward and backward"][0]()
            runs.append(
                {
                    "pair": pair,
                    "stage": name,
                    "turn": turn,
                    "seconds": seconds,
                    "operations": operations,
                    "matmul_rate": rate,
                    "weights": sum(p.numel() for p in student.model.parameters()),
                    "tokens": student.tokens,
                    "response_tokens": student.response_tokens,
                }
            )
            print(pair, name, f"{seconds:.2f} s, {operations / rate / seconds:.0%} of the floor", flush=True)
        for name, (act, _) in work.items():
            if name != "optimiser":
                runs.append({"pair": pair, "stage": name, "shares": shares(act)})
                print(runs[-1], flush=True)
        record("floor", vars(options), runs)


if __name__ == "__main__":
    main()
