"""The contenders of the end-to-end benchmarks: npd under two schedules, TRL's two on-policy trainers, and a plain loop.

All go on from one student, with the same teacher, prompts, lengths, learning rate and number of
optimiser steps, and are evaluated alike; what evaluation takes is no part of their seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Clock
from npd import models, run
from npd.config import Config, ModelConfig
from npd.demo import demo
from npd.demo.task import Problem, make_problems
from npd.observe.display import Display
from npd.observe.events import SpanName, read_events
from npd.store import Store

QUIET = Display(quiet=True)

Curve = list[tuple[float, int, float]]
"""(seconds without evaluation, steps, accuracy)"""


@dataclass(frozen=True)
class Task:
    """What contenders learn, and from whom."""

    teacher: str
    prompt_tokens: int
    """The longest prompt."""
    new_tokens: int
    """The longest response."""
    row: int
    """Tokens of a training row."""
    problems: Callable[[int, int], list[Problem]] = make_problems
    """So many different ones, from a seed."""
    untrained: Callable[[Path, int], None] = demo._write_untrained_student
    """Write the student that is warmed up, from a seed."""
    warm_up_steps: int = demo.WARM_UP_STEPS
    rates: dict[str, float] = field(default_factory=lambda: {"learning_rate": 1e-3, "final_learning_rate": 1e-4})
    selection: dict[str, Any] = field(default_factory=dict)
    """npd's rule under the paper's schedule."""
    batch_size: int = 256
    """Responses that npd decodes at once."""

    def config(self, home: Path, name: str, seed: int, **sections: Any) -> Config:
        own: dict[str, dict[str, Any]] = {
            "teacher": {"model": self.teacher},
            "data": {"max_prompt_tokens": self.prompt_tokens, "train": str(home / "few-prompts.jsonl")},
            "rollout": {"max_new_tokens": self.new_tokens, "batch_size": self.batch_size, "part_size": 2048},
            "packing": {"length": self.row},
        }
        given = {name: own.get(name, {}) | sections.get(name, {}) for name in {*own, *sections}}
        return demo._config(home, name, seed, given)


DEMO = Task(demo.TEACHER, prompt_tokens=32, new_tokens=72, row=256)


def warm_up(task: Task, home: Path, seed: int) -> None:
    """Data of the task and a student that has learnt from its references, made once."""
    if (home / "warm-up/student/npd.json").exists():
        return
    problems = task.problems(demo.REFERENCES + demo.PROMPTS + demo.HELD_OUT, seed)
    rows = [{"prompt": p.prompt, "completion": p.completion, "answer": p.answer} for p in problems]
    ends = demo.REFERENCES, demo.REFERENCES + demo.PROMPTS
    for name, part, keys in (
        ("references", rows[: ends[0]], ("prompt", "completion")),
        ("prompts", rows[ends[0] : ends[1]], ("prompt",)),
        ("held-out", rows[ends[1] :], ("prompt", "answer")),
    ):
        demo._write_jsonl(home / f"{name}.jsonl", ({key: row[key] for key in keys} for row in part))
    task.untrained(home / "untrained", seed)
    config = task.config(
        home,
        "warm-up",
        seed,
        student={"model": str(home / "untrained")},
        data={"train": str(home / "references.jsonl")},
        schedule={"passes": 1000},
        training={"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": task.warm_up_steps},
    )
    demo._run("warm-up", "sft", config, QUIET)


def fewer_prompts(home: Path, count: int) -> None:
    """Leave the first `count` prompts to train on."""
    lines = (home / "prompts.jsonl").read_text().splitlines(keepends=True)
    (home / "few-prompts.jsonl").write_text("".join(lines[:count]))


def config_of(task: Task, home: Path, name: str, seed: int, held_out: int, **sections: Any) -> Config:
    """A run that begins anew; without `held_out` nothing is evaluated."""
    shutil.rmtree(home / name, ignore_errors=True)
    evaluation: dict[str, Any] = {"tasks": [{"name": "answer", "size": held_out}] if held_out else [], "kl_prompts": 0}
    sections["evaluation"] = evaluation | sections.get("evaluation", {})
    return task.config(home, name, seed, **sections)


def npd(config: Config) -> dict[str, Any]:
    """One run of npd: seconds by stage, tokens, the curve of its evaluations."""
    began = time.time()
    result = run.distill(config, display=QUIET)
    ended = time.time()
    first = Store(result.run_dir).manifest(0)
    assert first is not None
    assert first.response_tokens is not None
    spans = [e for e in read_events(result.run_dir / "events.jsonl") if e.name == SpanName.EVALUATE]
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line["eval/answer/accuracy"] for line in lines if line.get("eval")}
    curve: Curve = []
    lost = 0.0
    for span in spans:
        curve.append((span.start - began - lost, span.facts["step"], figures[span.facts["step"]]))
        lost += span.seconds
    return {
        "seconds": ended - began - lost,
        "tokens": result.tokens,
        "steps": result.steps,
        "curve": curve,
        "stages": result.by_role["trainer"],
        "publications": result.publications,
        "response_length": first.response_tokens / first.rows,
    }


def near_policy(
    task: Task,
    home: Path,
    seed: int,
    held_out: int,
    steps: int | None,
    batch_tokens: int,
    generations: int = 2,
    every: int = 1,
) -> dict[str, Any]:
    """The paper's schedule: generations of five passes each, Δ-IFD's band; no overlap on so few cores.

    It is evaluated after each `every` passes.
    """
    training = task.rates | {"batch_tokens": batch_tokens} | ({"max_steps": steps} if steps else {})
    sections: dict[str, Any] = {"schedule": {"generations": generations, "lead": 0.0}, "selection": task.selection}
    sections["evaluation"] = {"every_passes": every}
    return npd(config_of(task, home, f"npd-{generations}", seed, held_out, training=training, **sections))


def strict(task: Task, home: Path, seed: int, held_out: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """Our own on-policy schedule: every step on responses of the newest weights."""
    return npd(
        config_of(
            task,
            home,
            "strict",
            seed,
            held_out,
            schedule={"prompts": batch, "passes": 1, "generations": steps, "lead": 0.0},
            selection={"rule": "none"},
            training=task.rates | {"batch_tokens": 1 << 20, "max_steps": steps},
            evaluation={"every_passes": every},
        )
    )


def trl(which: str, task: Task, home: Path, seed: int, held_out: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """TRL's trainer on the same student, teacher and prompts: forward KL, no padding beyond the batch's own."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    out = home / which
    shutil.rmtree(out, ignore_errors=True)
    evaluation = config_of(task, home, f"{which}-evaluation", seed, held_out)
    began, lost, tokens, positions, decoded = time.time(), 0.0, 0, 0, 0
    curve: Curve = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nonlocal lost
            if not held_out or (state.global_step % every and state.global_step != steps):
                return
            now = time.time()
            models.save_model(model, tokenizer, out / "now")
            accuracy = run.evaluate(evaluation, str(out / "now"), display=QUIET)[1]["eval/answer/accuracy"]
            curve.append((now - began - lost, state.global_step, accuracy))
            model.train()
            lost += time.time() - now

    class Distillation(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            nonlocal tokens, positions, decoded
            inputs = super()._prepare_inputs(generation_batch)
            tokens += int(inputs["completion_mask"].sum())
            positions += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
            decoded += inputs["completion_ids"].shape[1]
            return inputs

    class Gkd(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            nonlocal tokens, positions, decoded
            prompts = inputs["prompts"].shape[1]
            loss = super().training_step(model, inputs, num_items_in_batch)
            tokens += int((inputs["labels"] != -100).sum())
            positions += inputs["labels"].numel()
            decoded += inputs["labels"].shape[1] - prompts
            return loss

    cuda = torch.cuda.is_available()
    # GKDTrainer holds several tensors of [tokens, vocabulary] in float32; the other goes by chunks.
    parts = 4 if cuda and which == "trl-gkd" else 1
    teacher = models.load_model(ModelConfig(model=task.teacher, dtype="auto" if cuda else "float32"))
    student = models.load_model(ModelConfig(model=str(home / "warm-up/student"), dtype="float32"))
    tokenizer = models.load_tokenizer(ModelConfig(model=task.teacher))
    tokenizer.padding_side = "left"
    texts = [json.loads(line)["prompt"] for line in (home / "few-prompts.jsonl").read_text().splitlines()]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Without labels: with lmbda 1 there are none but the student's, and the loss is then their mean.
        batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return {"prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}

    common: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": not cuda,
        "bf16": cuda,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "learning_rate": task.rates["learning_rate"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": task.rates["final_learning_rate"]},
        "warmup_steps": round(0.03 * steps),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "seed": seed,
        "beta": 0.0,
        "temperature": 1.0,
    }
    data = Dataset.from_list([{"prompt": text} for text in texts])
    shared: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [Watch()]}
    arguments: Any
    trainer: Any
    if which == "trl-distillation":
        arguments = DistillationConfig(max_completion_length=task.new_tokens, **common)
        trainer = Distillation(model=student, teacher_model=teacher, args=arguments, **shared)
    else:
        arguments = GKDConfig(max_new_tokens=task.new_tokens, lmbda=1.0, **common)
        trainer = Gkd(model=student, teacher_model=teacher, args=arguments, data_collator=collate, **shared)
    clock = Clock()
    clock.watch(student, "generate", "generate")
    for part in (teacher, models.backbone(teacher)):  # one calls the model, the other its decoder
        clock.watch(part, "forward", "score")
    trainer.train()
    trainer.save_model(str(out / "student"))
    seconds = time.time() - began - lost
    stages = clock.seconds | {"train": seconds - sum(clock.seconds.values())}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "steps": steps,
        "curve": curve,
        "stages": stages,
        "positions": positions,
        "decoded": decoded,
    }


def plain(task: Task, home: Path, seed: int, held_out: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """A loop as one would write it by hand: `generate()`, both models over one padded batch, KL over the whole vocabulary.

    Weights that are trained are float32, all else is bfloat16 on a GPU; logits exist at response positions alone.
    """
    began, clock = time.time(), Clock()
    torch.manual_seed(seed)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    small = torch.bfloat16 if place == "cuda" else torch.float32

    def load(model: str, dtype: torch.dtype) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
        return loaded.to(place)

    path = str(home / "warm-up/student")
    student, teacher = load(path, torch.float32), load(task.teacher, small)
    policy = load(path, small) if small != torch.float32 else student
    tokenizer = models.load_tokenizer(ModelConfig(model=task.teacher))
    optimizer = torch.optim.AdamW(student.parameters(), lr=task.rates["learning_rate"], weight_decay=0.0, fused=True)
    texts = [json.loads(line)["prompt"] for line in (home / "few-prompts.jsonl").read_text().splitlines()]
    clock.watch(policy, "generate", "generate")
    clock.watch(models.backbone(teacher), "forward", "score")
    stop, tokens, positions, decoded = student.config.eos_token_id, 0, 0, 0
    for step in range(steps):
        chosen = [texts[i % len(texts)] for i in range(step * batch, (step + 1) * batch)]
        given = tokenizer(chosen, return_tensors="pt", padding=True, padding_side="left").to(place)
        width = given["input_ids"].shape[1]
        with torch.no_grad():
            if policy is not student:
                for mine, theirs in zip(policy.parameters(), student.parameters(), strict=True):
                    mine.copy_(theirs)
            out = policy.generate(
                **{k: given[k] for k in ("input_ids", "attention_mask")},
                max_new_tokens=task.new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = out[:, width:]
        ended = (answer == stop).cumsum(1) - (answer == stop).int()
        wanted = ended == 0
        mask = torch.cat([given["attention_mask"], wanted.long()], 1)
        inputs = {"input_ids": out, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.autocast(place, small, enabled=small != torch.float32):
            with torch.no_grad():
                read = models.backbone(teacher)(**inputs, use_cache=False).last_hidden_state[:, width - 1 : -1][wanted]
                target = torch.log_softmax((read @ models.head_weight(teacher).T).float(), -1)
            hidden = models.backbone(student)(**inputs, use_cache=False).last_hidden_state[:, width - 1 : -1][wanted]
            said = torch.log_softmax((hidden @ models.head_weight(student).T.to(hidden.dtype)).float(), -1)
        torch.nn.functional.kl_div(said, target, reduction="batchmean", log_target=True).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens, positions, decoded = tokens + int(wanted.sum()), positions + out.numel(), decoded + answer.shape[1]
    seconds = time.time() - began
    stages = clock.seconds | {"train": seconds - sum(clock.seconds.values())}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "steps": steps,
        "curve": [],
        "stages": stages,
        "positions": positions,
        "decoded": decoded,
    }


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "strict": strict,
    "trl-distillation": lambda *a: trl("trl-distillation", *a),
    "trl-gkd": lambda *a: trl("trl-gkd", *a),
}
