"""Response tokens per second on long tails: npd's continuous batching, generate(), and transformers' generate_batch.

    OMP_NUM_THREADS=1 python -m benchmarks.batching --repeat 3

A student with random weights whose vocabulary has as many stop tokens as make responses of `--mean` tokens on average, with
geometric lengths: the longest of 64 is some five times the mean. generate_batch gets a cache as large as npd's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pyarrow as pa
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.common import Loaded, interleaved, record, start_engine
from npd.config import Sampling
from npd.models import Vocabulary

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
VOCABULARIES = {"small": 2048, "SmolLM2-135M": 49_152, "0.5B": 151_936}
BLOCK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["small"])
    parser.add_argument("--ways", nargs="*", default=["continuous", "static", "generate_batch"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mean", type=int, default=75)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--name", default="batching", help="of the file in benchmarks/results")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for shape in options.shapes:
        size = VOCABULARIES[shape]
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=True, **SHAPES[shape])).eval()
        if torch.cuda.is_available():
            model = model.to("cuda", torch.bfloat16)
        stops = tuple(range(1, 1 + round(size / options.mean)))
        lengths = torch.randint(8, 40, (options.prompts,)).tolist()
        prompts = [torch.randint(size // 2, size, (length,)).tolist() for length in lengths]
        for turn, way in interleaved(options.ways, options.repeat):
            began = time.perf_counter()
            written = write(way, model, prompts, stops, options)
            seconds = time.perf_counter() - began
            found = {"seconds": seconds, "tokens": sum(written), "longest": max(written)}
            print(f"{shape} {way}: {sum(written) / seconds:,.0f} tokens/s, longest {max(written)}", flush=True)
            runs.append({"shape": shape, "way": way, "turn": turn} | found)
    record(options.name, vars(options), runs)


def write(way: str, model: Any, prompts: list[list[int]], stops: tuple[int, ...], options: argparse.Namespace) -> list[int]:
    """Lengths of the responses."""
    if way == "generate_batch":
        rows = [prompt for prompt in prompts for _ in range(options.samples)]
        blocks = options.batch_size * -(-(max(map(len, prompts)) + options.new_tokens) // BLOCK)
        batching = ContinuousBatchingConfig(
            return_logprobs=True, max_requests_per_batch=options.batch_size, num_blocks=blocks, max_batch_tokens=BLOCK
        )
        sampling = GenerationConfig(
            max_new_tokens=options.new_tokens, do_sample=True, top_k=0, eos_token_id=list(stops), pad_token_id=0
        )
        found = model.generate_batch(rows, generation_config=sampling, continuous_batching_config=batching)
        return [len(each.generated_tokens) for each in found.values()]
    engine = start_engine(
        "transformers",
        Loaded(model),
        Vocabulary(model.config.vocab_size, stops, 1),
        0,
        batch_size=options.batch_size,
        new_tokens=options.new_tokens,
        batching=way,
    )
    table = pa.table({"prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    answered = engine.answer(table, Sampling(options.new_tokens, samples_per_prompt=options.samples))
    return [len(response) for response in answered["response_ids"].to_pylist()]


if __name__ == "__main__":
    main()
