"""A task whose solutions vary in length by a factor of thirty: chained arithmetic modulo 100 of 1 to 30 steps.

    python -m benchmarks.chains    # train its teacher, about ten minutes on two cores; made once, under runs/

    prompt      47a+8b*3=
    completion  a47+8=55;b55*3=65;#65

As the demo's task, but the steps of a prompt are labelled, so that a small model finds its place in a long one, and their
number is geometric with a mean of about six: the longest of 64 solutions is about five times the mean, as with reasoning
models.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peers import Task
from npd import run
from npd.config import load_config
from npd.demo.task import CHARACTERS, Problem
from npd.observe.display import Display

TEACHER = Path("runs/bench/chains-teacher")
LABELS = string.ascii_letters[:30]
MEAN_STEPS = 6
HIDDEN, LAYERS = 96, 3
NEW_TOKENS = 9 * len(LABELS) + 8
PROMPT_TOKENS = 3 * len(LABELS) + 4
REFERENCE_SEED = 10_000
"""Seed of the teacher's problems; contenders' are below it."""


def tokenizer_of(characters: str) -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def solve(value: int, steps: list[tuple[str, int]]) -> tuple[str, int]:
    """The worked solution of a chain, and its answer in 0..99."""
    lines = []
    for label, (operator, operand) in zip(LABELS, steps, strict=False):
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 100
        lines.append(f"{label}{value}{operator}{operand}={result};")
        value = result
    return "".join(lines) + f"#{value}", value


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems; the same seed gives the same list."""
    rng = random.Random(f"npd-chains-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        value = rng.randrange(100)
        steps: list[tuple[str, int]] = []
        while not steps or (len(steps) < len(LABELS) and rng.random() > 1 / MEAN_STEPS):
            steps.append((rng.choice("+-*"), rng.randint(2, 9)))
        labelled = zip(LABELS, steps, strict=False)
        prompt = str(value) + "".join(f"{label}{operator}{operand}" for label, (operator, operand) in labelled) + "="
        completion, answer = solve(value, steps)
        problems.setdefault(prompt, Problem(prompt, completion, str(answer)))
    return list(problems.values())


def untrained(path: Path, hidden: int, layers: int, seed: int, characters: str = CHARACTERS + LABELS) -> None:
    """Write a model with fresh weights."""
    tokenizer = tokenizer_of(characters)
    torch.manual_seed(seed)
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **special,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def train_teacher(out: Path, count: int = 80_000, batch_tokens: int = 3200) -> None:
    """Train it on worked problems, each once; it is then OUT/run/student."""
    out.mkdir(parents=True, exist_ok=True)
    for name, size, seed in (("references", count, REFERENCE_SEED), ("held-out", 200, REFERENCE_SEED + 1)):
        problems = make_problems(size, seed)
        rows = [{"prompt": p.prompt, "completion": p.completion, "answer": p.answer} for p in problems]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    untrained(out / "untrained", 128, 4, seed=0)
    config = load_config(
        {
            "run_dir": str(out / "run"),
            "student": {"model": str(out / "untrained")},
            "data": {
                "train": str(out / "references.jsonl"),
                "eval": str(out / "held-out.jsonl"),
                "max_prompt_tokens": PROMPT_TOKENS,
            },
            "schedule": {"passes": 1},
            "packing": {"length": PROMPT_TOKENS + NEW_TOKENS},
            "training": {
                "batch_tokens": batch_tokens,
                "micro_batch_rows": 8,
                "learning_rate": 3e-3,
                "final_learning_rate": 6e-5,
                "weight_decay": 0.01,
            },
            "rollout": {"max_new_tokens": NEW_TOKENS, "batch_size": 256},
            "evaluation": {"tasks": [{"name": "answer", "size": 200}], "kl_prompts": 0},
            "tracking": {"trackers": [], "report": False},
        }
    )
    run.sft(config, display=Display())


def task(teacher: Path = TEACHER) -> Task:
    """The task, with the student of the demo's size."""
    student = teacher / "run/student"
    if not (student / "npd.json").exists():
        train_teacher(teacher)
    return Task(
        str(student),
        PROMPT_TOKENS,
        NEW_TOKENS,
        PROMPT_TOKENS + NEW_TOKENS,
        make_problems,
        lambda path, seed: untrained(path, HIDDEN, LAYERS, seed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TEACHER)
    parser.add_argument("--problems", type=int, default=80_000, help="that the teacher learns from")
    parser.add_argument("--batch-tokens", type=int, default=3200)
    options = parser.parse_args()
    began = time.monotonic()
    train_teacher(options.out, options.problems, options.batch_tokens)
    print(f"{time.monotonic() - began:.0f} s; the teacher is {options.out / 'run/student'}")


if __name__ == "__main__":
    main()
