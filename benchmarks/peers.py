"""The contenders of the end-to-end benchmark: npd under two schedules, and TRL's two on-policy trainers.

All go on from one warm-up student of the demo's task, with the same teacher, prompts, lengths, learning rate and number of
optimiser steps, and are evaluated alike; what evaluation takes is no part of their seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from npd import models, run
from npd.config import Config, ModelConfig
from npd.demo import demo
from npd.observe.display import Display
from npd.observe.events import SpanName, read_events
from npd.store import Store

QUIET = Display(quiet=True)
NEW_TOKENS = 72
RATES = {"learning_rate": 1e-3, "final_learning_rate": 1e-4}

Curve = list[tuple[float, int, float]]
"""(seconds without evaluation, steps, accuracy)"""


def warm_up(home: Path, seed: int) -> None:
    """Data of the demo and a student that has learnt from its references, made once."""
    if (home / "warm-up/student/npd.json").exists():
        return
    demo._write_data(home, seed)
    demo._write_untrained_student(home / "untrained", seed)
    sections: dict[str, dict[str, Any]] = {
        "student": {"model": str(home / "untrained")},
        "data": {"train": str(home / "references.jsonl")},
        "schedule": {"passes": 1000},
        "training": {"learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_steps": demo.WARM_UP_STEPS},
    }
    demo._run("warm-up", "sft", demo._config(home, "warm-up", seed, sections), QUIET)


def fewer_prompts(home: Path, count: int) -> None:
    """Leave the first `count` prompts to train on."""
    lines = (home / "prompts.jsonl").read_text().splitlines(keepends=True)
    (home / "few-prompts.jsonl").write_text("".join(lines[:count]))


def config_of(home: Path, name: str, seed: int, held_out: int, **sections: Any) -> Config:
    shutil.rmtree(home / name, ignore_errors=True)
    sections["data"] = {"train": str(home / "few-prompts.jsonl")}
    evaluation = {"tasks": [{"name": "answer", "size": held_out}], "kl_prompts": 0}
    sections["evaluation"] = evaluation | sections.get("evaluation", {})
    return demo._config(home, name, seed, sections)


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
    home: Path, seed: int, held_out: int, steps: int | None, batch_tokens: int, generations: int = 2
) -> dict[str, Any]:
    """The paper's schedule: generations of five passes each, Δ-IFD's band; no overlap on so few cores."""
    training = RATES | {"batch_tokens": batch_tokens} | ({"max_steps": steps} if steps else {})
    schedule = {"generations": generations, "lead": 0.0}
    return npd(config_of(home, f"npd-{generations}", seed, held_out, training=training, schedule=schedule))


def strict(home: Path, seed: int, held_out: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """Our own on-policy schedule: every step on responses of the newest weights."""
    return npd(
        config_of(
            home,
            "strict",
            seed,
            held_out,
            schedule={"prompts": batch, "passes": 1, "generations": steps, "lead": 0.0},
            selection={"rule": "none"},
            training=RATES | {"batch_tokens": 1 << 20, "max_steps": steps},
            evaluation={"every_passes": every},
        )
    )


def trl(which: str, home: Path, seed: int, held_out: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """TRL's trainer on the same student, teacher and prompts: forward KL, no padding beyond the batch's own."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    out = home / which
    shutil.rmtree(out, ignore_errors=True)
    evaluation = config_of(home, f"{which}-evaluation", seed, held_out)
    began, lost, tokens = time.time(), 0.0, 0
    curve: Curve = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nonlocal lost
            if state.global_step % every and state.global_step != steps:
                return
            now = time.time()
            models.save_model(model, tokenizer, out / "now")
            accuracy = run.evaluate(evaluation, str(out / "now"), display=QUIET)[1]["eval/answer/accuracy"]
            curve.append((now - began - lost, state.global_step, accuracy))
            model.train()
            lost += time.time() - now

    class Distillation(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            nonlocal tokens
            inputs = super()._prepare_inputs(generation_batch)
            tokens += int(inputs["completion_mask"].sum())
            return inputs

    class Gkd(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            nonlocal tokens
            loss = super().training_step(model, inputs, num_items_in_batch)
            tokens += int((inputs["labels"] != -100).sum())
            return loss

    teacher = models.load_model(ModelConfig(model=demo.TEACHER))
    student = models.load_model(ModelConfig(model=str(home / "warm-up/student")))
    tokenizer = models.load_tokenizer(ModelConfig(model=demo.TEACHER))
    tokenizer.padding_side = "left"
    texts = [json.loads(line)["prompt"] for line in (home / "few-prompts.jsonl").read_text().splitlines()]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Without labels: with lmbda 1 there are none but the student's, and the loss is then their mean.
        batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return {"prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}

    common: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": RATES["learning_rate"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": RATES["final_learning_rate"]},
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
        arguments = DistillationConfig(max_completion_length=NEW_TOKENS, **common)
        trainer = Distillation(model=student, teacher_model=teacher, args=arguments, **shared)
    else:
        arguments = GKDConfig(max_new_tokens=NEW_TOKENS, lmbda=1.0, **common)
        trainer = Gkd(model=student, teacher_model=teacher, args=arguments, data_collator=collate, **shared)
    trainer.train()
    trainer.save_model(str(out / "student"))
    return {"seconds": time.time() - began - lost, "tokens": tokens, "steps": steps, "curve": curve}


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "strict": strict,
    "trl-distillation": lambda *a: trl("trl-distillation", *a),
    "trl-gkd": lambda *a: trl("trl-gkd", *a),
}
