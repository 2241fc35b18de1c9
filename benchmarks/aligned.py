"""A teacher with another tokenizer (teacher.align) against one with the student's, on the demo's task, both ways round.

    python -m benchmarks.aligned --seeds 0 1 2     # about ten minutes a seed on one core; the second teacher once more

The demo's models read one token a character. A second teacher, of the same size, reads a BPE of `--vocabulary` tokens that
is learnt from the task's texts; it is trained once and kept. Students of both kinds are warmed up on the same references, and
then distilled by npd from both teachers. Each accuracy is that of greedy answers to held-out problems.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as parts
from tokenizers.trainers import BpeTrainer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import peers
from benchmarks.common import RESULTS, record
from npd import models, run
from npd.config import ModelConfig
from npd.demo import demo
from npd.demo.task import CHARACTERS, make_problems
from npd.store import Store

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def pairs_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A BPE over the task's characters."""
    backend = Tokenizer(parts.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    texts = [text for p in make_problems(4000, seed=99) for text in (p.prompt, p.completion)]
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=list(CHARACTERS),
        max_token_length=3,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_of(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """Fresh weights in the shape of the demo's models."""
    like: Any = models.load_model_config(ModelConfig(model=demo.TEACHER))
    like.vocab_size, like.hidden_size, like.intermediate_size = len(tokenizer), hidden, 3 * hidden
    like.num_hidden_layers, like.num_attention_heads = layers, hidden // 32
    like.num_key_value_heads = hidden // 32
    torch.manual_seed(seed)
    return LlamaForCausalLM(like)


def train_teacher(out: Path, tokenizer: PreTrainedTokenizerFast, steps: int, batch: int = 96, rate: float = 3e-3) -> None:
    """As scripts/train_demo_teacher.py does; prompt and answer are made tokens apart, as they are read."""
    model = model_of(tokenizer, 0, 128, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        now = rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = max(now, rate * 0.02)
        rows = []
        for p in make_problems(batch, seed=1000 + step):
            prompt, answer = (tokenizer(text)["input_ids"] for text in (p.prompt, p.completion))
            rows.append((len(prompt), [*prompt, *answer, tokenizer.eos_token_id]))
        width = max(len(ids) for _, ids in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows])
        labels = torch.tensor([[-100] * n + ids[n:] + [-100] * (width - len(ids)) for n, ids in rows])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"teacher: step {step}, loss {loss.item():.4f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def positions(run_dir: Path) -> dict[str, float]:
    """Shares of exact, merged and left-out positions, over all generations."""
    found = [m.aligned for g in (0, 1) if (m := Store(run_dir).manifest(g)) is not None and m.aligned is not None]
    total = sum(each.total for each in found)
    return {name: sum(getattr(each, name) for each in found) / total for name in ("exact", "merged", "left_out") if total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/aligned"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--vocabulary", type=int, default=120)
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="optimiser steps of every run; default: two generations of five passes")
    parser.add_argument("--students", nargs="*", default=["characters", "pairs"])
    parser.add_argument("--add", action="store_true", help="keep the runs that the file of results has")
    options = parser.parse_args()
    tokenizer, pairs = pairs_tokenizer(options.vocabulary), options.out / "teacher"
    if not (pairs / "config.json").exists():
        train_teacher(pairs, tokenizer, options.teacher_steps)
    teachers = {"characters": demo.TEACHER, "pairs": str(pairs)}

    def untrained(path: Path, seed: int) -> None:
        models.save_model(model_of(tokenizer, seed, demo.HIDDEN, demo.LAYERS), tokenizer, path)

    tasks = {
        "characters": peers.DEMO,
        "pairs": replace(peers.DEMO, teacher=str(pairs), untrained=untrained),
    }
    runs: list[dict[str, Any]] = json.loads((RESULTS / "aligned.json").read_text())["runs"] if options.add else []
    for seed in options.seeds:
        for student in options.students:
            task, home = tasks[student], options.out / f"seed-{seed}" / student
            peers.warm_up(task, home, seed)
            peers.fewer_prompts(home, demo.PROMPTS)
            measured = peers.config_of(task, home, "measured", seed, options.held_out)
            entry: dict[str, Any] = {"seed": seed, "student": student}
            for name, model in (("start", str(home / "warm-up/student")), ("teacher itself", teachers[student])):
                runs.append(entry | {"from": name, "accuracy": accuracy(measured, model)})
            for teacher, place in teachers.items():
                sections: dict[str, Any] = {"teacher": {"model": place, "align": True}} if teacher != student else {}
                training = task.rates | ({"max_steps": options.steps} if options.steps else {})
                config = peers.config_of(task, home, f"from-{teacher}", seed, 0, training=training, **sections)
                result = peers.npd(config)
                figures = {"accuracy": accuracy(measured, str(home / f"from-{teacher}/student")), "steps": result["steps"]}
                runs.append(entry | {"from": teacher} | figures | {"positions": positions(home / f"from-{teacher}")})
            # What can be had without aligning: the other teacher's own answers, in the student's tokens.
            other = next(name for name in teachers if name != student)
            answers = peers.config_of(
                task,
                home,
                f"answers-of-{other}",
                seed,
                0,
                teacher={"model": teachers[other], "align": True},
                data={"references": "teacher"},
                schedule={"passes": 1000},
                training=task.rates | {"max_steps": runs[-1]["steps"]},
            )
            demo._run("answers", "sft", answers, peers.QUIET)
            student_dir = str(home / f"answers-of-{other}/student")
            runs.append(entry | {"from": f"answers of {other}", "accuracy": accuracy(measured, student_dir)})
            for line in runs[-5:]:
                print(json.dumps(line), flush=True)
            record("aligned", {k: v for k, v in vars(options).items() if k != "out"}, runs)
            shutil.rmtree(home / "measured", ignore_errors=True)


def accuracy(config: Any, model: str) -> float:
    return float(run.evaluate(config, model, display=peers.QUIET)[1]["eval/answer/accuracy"])


if __name__ == "__main__":
    main()
