"""Ideas that were tried, each against what it was to replace, in the two steps that take most of a run, and in decoding.

python -m benchmarks.ideas --repeat 3

- rows: prefill and training in rows of 256 packed tokens, and in rows as short as the longest sample of a batch;
- cache: decoding with the cache that grows by concatenation (transformers' default) and with a static one;
- compile: the decoder's forward pass under `torch.compile(dynamic=True)`; its first two calls compile.
All on the demo's teacher and warm-up student (that of `benchmarks.distillation`), on responses of that student.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.common import Loaded, interleaved, record, timed
from benchmarks.floor import stages
from benchmarks.scoring import Case
from npd.config import Sampling
from npd.demo.demo import TEACHER
from npd.models import backbone
from npd.packing import Packed, pack, pack_tokens
from npd.rollout.transformers import TransformersEngine
from npd.scoring import Prefill

ROW = 256


def long_rows(lengths: list[int], tokens: int) -> Iterator[tuple[list[list[int]], int]]:
    """What `short_rows` took the place of: all samples packed into rows of one length."""
    rows = pack(lengths, ROW)
    for at in range(0, len(rows), tokens // ROW):
        yield rows[at : at + tokens // ROW], ROW


class LongRows(Prefill):
    def batches(self, contexts: Any, responses: Any, beside: Any = ()) -> Iterator[Packed]:
        sizes = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
        for rows, length in long_rows(sizes, self.batch_tokens):
            yield pack_tokens(contexts, responses, rows, length, self.pad_id)


class WithCache(TransformersEngine):
    """Decodes by generate() with another cache than transformers' default."""

    cache: str | None = None

    def _continuing(self, *request: Any) -> None:
        return None

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        config = super()._generation_config(sampling)
        config.cache_implementation = self.cache
        return config


def rollout(case: Case, new_tokens: int, batch_size: int, cache: str | None) -> Callable[[], Any]:
    engine = WithCache(case.engine(batch_size).setting)
    engine.cache = cache
    engine.take(Loaded(case.model))
    return lambda: engine.answer(case.table.select(["prompt_ids"]), Sampling(new_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", default="runs/bench/seed-0/warm-up/student")
    parser.add_argument("--count", type=int, default=1024, help="responses")
    parser.add_argument("--new-tokens", type=int, default=72)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # or an earlier run would have compiled already
    options.train_tokens, options.top_k, options.batch_size = options.batch_tokens, 10, 256
    student, teacher = Case(options.warm, options.count, options.new_tokens), Case(TEACHER, 1, 1)
    train, prefill = "student, forward and backward", "teacher, prefill"
    short, long = stages(student, teacher, options), stages(student, teacher, options, long_rows)
    reader = LongRows(teacher.model, teacher.vocabulary, teacher.pad, options.batch_tokens)
    work: dict[tuple[str, str, str], Callable[[], Any]] = {
        ("rows", "training", f"rows of {ROW}"): long[train][0],
        ("rows", "training", "short rows"): short[train][0],
        ("rows", "teacher's prefill", f"rows of {ROW}"): lambda: reader(student.contexts, student.responses, options.top_k),
        ("rows", "teacher's prefill", "short rows"): short[prefill][0],
    }
    for size in options.batch_sizes:
        work["cache", f"decoding {size} at once", "growing"] = rollout(student, options.new_tokens, size, None)
        work["cache", f"decoding {size} at once", "static"] = rollout(student, options.new_tokens, size, "static")
    runs: list[dict[str, Any]] = []

    def measure(turn: int, key: tuple[str, str, str], act: Callable[[], Any]) -> None:
        run = dict(zip(("idea", "what", "how"), key, strict=True)) | {"turn": turn, "seconds": timed(act)}
        runs.append(run | {"response_tokens": student.response_tokens})
        print(run, flush=True)
        record("ideas", vars(options), runs)

    short[train][0]()  # warms up
    names = {str(key): key for key in work}
    for turn, name in interleaved(list(names), options.repeat):
        measure(turn, names[name], work[names[name]])
    for what, act, case in (("training", short[train][0], student), ("teacher's prefill", short[prefill][0], teacher)):
        decoder: Any = backbone(case.model)
        plain = decoder.forward
        compiled = torch.compile(plain, dynamic=True)
        for turn in range(-2, options.repeat):
            decoder.forward = compiled
            measure(turn, ("compile", what, "torch.compile" if turn >= 0 else "compiling"), act)
            decoder.forward = plain
            if turn >= 0:
                measure(turn, ("compile", what, "eager"), act)


if __name__ == "__main__":
    main()
