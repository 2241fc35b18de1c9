"""Training and reading of samples of mixed lengths: end to end, and in padded rows with masks, which that took the place of.

python -m benchmarks.attention --repeat 3

Random weights; responses' lengths are geometric, and so the longest is several times the mean. In tokens of prompt and
response a second, medians of turns that are interleaved:
- rows, varlen: a training step's forward and backward passes by `LossModel`, and packed prefill with the teacher's top-k;
- bare: the decoder alone on as many tokens in full rows, as long as a sample is on average, with causal attention and nothing
  else; headed: the same, and the head's product at as many positions as there are response tokens.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import interleaved, record, timed
from npd.config import LossConfig
from npd.models import Vocabulary, backbone, batches_for, device, head_weight, prove_layout
from npd.packing import pack_tokens
from npd.scoring import Prefill
from npd.train.trainer import LossModel

SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 20,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 4096,
        "num_key_value_heads": 2,
    },
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49152,
        "num_key_value_heads": 3,
    },
}  # fmt: skip
PROMPT = 16


class Contender:
    """A model with these weights that reads in one way."""

    def __init__(self, model: PreTrainedModel, batch_tokens: int, train_tokens: int, *, varlen: bool) -> None:
        self.model = copy.deepcopy(model)
        prove_layout(self.model, "the model", varlen=varlen)
        self.loss, self.train_tokens = LossModel(self.model, LossConfig()), train_tokens
        size = self.model.config.vocab_size
        self.reader = Prefill(self.model, Vocabulary(size=size, start_id=1, stop_ids=(2,)), 0, batch_tokens)

    def read(self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], top_k: int) -> None:
        self.reader(contexts, responses, top_k)

    def train(self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], top_k: int) -> None:
        to = self.model.device
        lengths = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
        for rows, length in batches_for(self.model, lengths, self.train_tokens):
            packed = pack_tokens(contexts, responses, rows, length, 0)
            ids = torch.arange(top_k, device=to).expand(len(packed.labels), top_k)
            given = (*packed[:4], ids, torch.full(ids.shape, -3.0, device=to), packed.cu_seq_lens)
            self.loss(*(tensor.to(to) for tensor in given), packed.lengths).loss.backward()
        self.model.zero_grad()


@torch.no_grad()
def bare(model: PreTrainedModel, tokens: int, mean: int, batch_tokens: int, headed: float = 0.0) -> None:
    """Every token through the decoder, in full rows, and a share of them through the head."""
    ids = torch.randint(3, model.config.vocab_size, (tokens,), device=model.device)
    for batch in ids.split(batch_tokens):
        whole = len(batch) // mean * mean
        for rows in (batch[:whole].view(-1, mean), batch[whole:].view(1, -1)):
            if rows.numel():
                hidden = backbone(model)(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
                for some in hidden[: round(headed * len(hidden))].split(256):
                    some @ head_weight(model).T


def waited(act: Callable[[], Any]) -> None:
    """Do it, to the end of what it asked of a GPU."""
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--lengths", nargs="*", default=["40:512", "300:2048", "800:8000"], help="mean:most tokens of a response"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="of a turn; of smollm2 a quarter on a CPU")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--train-tokens", type=int, default=16384, help="of a forward and backward pass")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for shape in options.shapes:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True)
        model: Any = LlamaForCausalLM(config).eval().to(device())
        if torch.cuda.is_available():
            model = model.to(torch.bfloat16)
        ways = {
            name: Contender(model, options.batch_tokens, options.train_tokens, varlen=name == "varlen")
            for name in ("rows", "varlen")
        }
        for mean, longest in (map(int, case.split(":")) for case in options.lengths):
            draw = np.random.default_rng(0)
            most = options.tokens // (4 if shape == "smollm2" and not torch.cuda.is_available() else 1)
            drawn = np.minimum(draw.geometric(1 / mean, size=most), longest)
            drawn = drawn[: int(np.searchsorted(np.cumsum(drawn + PROMPT), most))]
            responses = [draw.integers(3, config.vocab_size, n).tolist() for n in drawn]
            contexts = [draw.integers(3, config.vocab_size, PROMPT).tolist() for _ in drawn]
            tokens = int(drawn.sum()) + PROMPT * len(drawn)
            share = 1 - PROMPT * len(drawn) / tokens
            work: dict[str, Callable[[], Any]] = {
                "bare": partial(bare, model, tokens, mean + PROMPT, options.batch_tokens),
                "headed": partial(bare, model, tokens, mean + PROMPT, options.batch_tokens, share),
            }
            for name, way in ways.items():
                for stage in ("read", "train"):
                    work[f"{stage}, {name}"] = partial(getattr(way, stage), contexts, responses, options.top_k)
            for act in work.values():
                waited(act)  # warms up
            for turn, name in interleaved(list(work), options.repeat):
                seconds = timed(partial(waited, work[name]))
                facts = {"shape": shape, "mean": mean, "longest": int(drawn.max()), "samples": len(drawn), "tokens": tokens}
                runs.append({**facts, "contender": name, "turn": turn, "seconds": seconds})
            rate = {
                name: tokens
                / statistics.median(
                    r["seconds"] for r in runs if (r["shape"], r["mean"], r["contender"]) == (shape, mean, name)
                )
                for name in work
            }
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items())
            print(f"{shape}, mean {mean}, longest {drawn.max()}, {len(drawn)} samples: {shown} tokens/s;", end=" ")
            print(
                f"training {rate['train, varlen'] / rate['train, rows']:.2f} x, reading "
                f"{rate['read, varlen'] / rate['read, rows']:.2f} x, {rate['read, varlen'] / rate['bare']:.0%} of bare and "
                f"{rate['read, varlen'] / rate['headed']:.0%} of headed",
                flush=True,
            )
    record("attention-cuda" if torch.cuda.is_available() else "attention", vars(options), runs)


if __name__ == "__main__":
    main()
