"""Train the demo's teacher and write it where the package ships it.

    python scripts/train_demo_teacher.py [--out DIR] [--steps N]

Plain next-token training on endless fresh problems; about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer

OUT = Path(__file__).parents[1] / "src/npd/demo/teacher"
HELD_OUT_SEED = 1


def build(hidden: int, layers: int, vocabulary: int, special: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **special,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build(args.hidden, args.layers, len(tokenizer), special)
    print(f"{model.num_parameters():,} parameters")
    held_out = {problem.prompt for problem in make_problems(4096, HELD_OUT_SEED)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    began = time.monotonic()
    for step in range(args.steps):
        rate = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, args.lr * 0.02)
        problems = [p for p in make_problems(args.batch, seed=1000 + step) if p.prompt not in held_out]
        rows = [tokenizer(p.prompt + p.completion)["input_ids"] + [tokenizer.eos_token_id] for p in problems]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        for i, problem in enumerate(problems):
            labels[i, : len(problem.prompt)] = -100
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - began:6.0f} s", flush=True)
        if step % 500 == 499 or step == args.steps - 1:
            print(f"accuracy {accuracy(model, tokenizer):.3f}", flush=True)
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, count: int = 512) -> float:
    """Greedy accuracy on held-out problems."""
    problems = make_problems(count, HELD_OUT_SEED)
    batch = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**batch, max_new_tokens=96, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text.split("#")[-1] == p.answer for text, p in zip(texts, problems, strict=True)) / count


if __name__ == "__main__":
    main()
