"""The optimiser loop: packed rows of one generation, pass after pass.

The gradient of a step is that of the sum of the loss over all its response tokens - every micro-batch, every process -
divided by their number, so it does not depend on how samples were packed or spread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npd import models
from npd.config import Config
from npd.errors import RunError, UserError
from npd.losses import LossOutput, TopKMass, near_policy_kl, sparse_soft_cross_entropy
from npd.models import add_lora, base_model, head_weight, hidden_states, quiet_transformers, save_model
from npd.observe.events import Events
from npd.packing import pack, pack_tokens
from npd.refresher import REFERENCE, Generation
from npd.schedule import derive_seed, learning_rate
from npd.selection import KEPT
from npd.store import SCHEMA, Store

COLUMNS = ["sample_id", "prompt_ids", "response_ids", "behavior_logprobs", "verdict", "topk_ids", "topk_logprobs"]

# 64-bit offsets: a generation's top-k entries may be more than 32 bits can count.
LARGE = pa.schema(
    [
        (name, pa.large_list(kind.value_type) if pa.types.is_list(kind) else kind)
        for name, kind in ((name, SCHEMA.field(name).type) for name in COLUMNS)
    ]
)


class Samples:
    """The kept samples of a generation, ragged columns as flat arrays with offsets."""

    def __init__(self, store: Store, generation: Generation) -> None:
        tables = []
        for part in range(len(generation.manifest["parts"])):
            table = store.read_part(generation.index, part, COLUMNS)
            tables.append(table.filter(pc.is_in(table["verdict"], pa.array(KEPT))).cast(LARGE))
        self.by_student = generation.policy_version != REFERENCE
        """Did a snapshot of the student write them?"""
        table = pa.concat_tables(tables).combine_chunks()
        self.ids: list[str] = table["sample_id"].to_pylist()
        self.prompts, self.responses, self.behavior, self.topk_ids, self.topk_logprobs = (
            _Ragged(table[name].combine_chunks())
            for name in ("prompt_ids", "response_ids", "behavior_logprobs", "topk_ids", "topk_logprobs")
        )
        self.lengths = self.prompts.lengths + self.responses.lengths

    def __len__(self) -> int:
        return len(self.ids)

    def topk(self, samples: list[int]) -> tuple[Tensor, Tensor]:
        """Teacher's top-k ids and log-probabilities [T, K] of the samples' response tokens; K is 0 without a teacher."""
        tokens = int(self.responses.lengths[samples].sum())
        ids, logprobs = self.topk_ids.take(samples, np.int64), self.topk_logprobs.take(samples, np.float32)
        if tokens == 0 or len(ids) % tokens:
            raise UserError(f"The samples {self.ids[samples[0]]} ... hold {len(ids)} top-k entries for {tokens} tokens.")
        shape = (tokens, len(ids) // tokens)
        return torch.from_numpy(ids).view(shape), torch.from_numpy(logprobs).view(shape)


class _Ragged:
    """A list column; a null list counts as empty."""

    def __init__(self, column: pa.Array) -> None:
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, rows: list[int], dtype: Any) -> np.ndarray:
        return np.concatenate([self[i] for i in rows]).astype(dtype)


def plan_pass(lengths: np.ndarray, capacity: int, batch_tokens: int, seed: int) -> list[list[list[int]]]:
    """Optimiser steps of one pass: lists of rows, rows lists of sample indices.

    Samples are shuffled before packing, so that equally long ones meet others each pass, and rows after it.
    """
    rng = np.random.default_rng(seed)
    shuffle = rng.permutation(len(lengths))
    rows = [[int(shuffle[i]) for i in row] for row in pack(lengths[shuffle].tolist(), capacity)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    per_step = max(1, batch_tokens // capacity)
    return [rows[i : i + per_step] for i in range(0, len(rows), per_step)]


class LossModel(nn.Module):
    """Student and loss as one module, so that DDP sees a single forward pass."""

    def __init__(self, model: nn.Module, kd_weight: float, top_k_mass: TopKMass) -> None:
        super().__init__()
        self.model = model
        self.kd_weight = kd_weight
        self.top_k_mass = top_k_mass

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        labels: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
    ) -> LossOutput:
        hidden_TD = hidden_states(self.model, input_ids, position_ids).flatten(0, 1)[predictors]
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        return sparse_soft_cross_entropy(
            hidden_TD,
            head_weight(self.model),
            labels,
            topk_ids,
            topk_logprobs,
            kd_weight=self.kd_weight,
            top_k_mass=self.top_k_mass,
        )


@dataclass
class Position:
    """Where in the run the trainer stands: everything before it is done."""

    generation: int = 0
    passes: int = 0
    """Whole passes over the generation."""
    batch: int = 0
    """Steps into the next pass."""
    step: int = 0
    """Optimiser steps in all."""
    tokens: int = 0
    """Response tokens trained in all."""


def resolve_precision(config: Config) -> str:
    """accelerate's name of the training arithmetic. `auto` takes bfloat16 only on a CUDA device that has it."""
    if config.training.precision == "auto":
        return "bf16" if models.fast_bfloat16() else "no"
    return {"bfloat16": "bf16", "float32": "no"}[config.training.precision]


class Trainer:
    """Owns the student that learns, its optimiser and its place in the run."""

    def __init__(
        self,
        config: Config,
        store: Store,
        accelerator: Accelerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        events: Events,
        *,
        kd_weight: float,
        generations: int,
    ) -> None:
        self.config, self.store, self.tokenizer = config, store, tokenizer
        self.events, self.generations = events, generations
        self.position = Position()
        self._planned: tuple[int, list[list[list[int]]]] = (-1, [])
        torch.manual_seed(derive_seed(config.seed, "adapters"))
        self.student: nn.Module = add_lora(model, config.student) if config.student.lora else model
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if config.student.lora:
                model.enable_input_require_grads()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.training.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.training.learning_rate)
        self.accelerator = accelerator
        self.loss_model, self.optimizer = accelerator.prepare(
            LossModel(self.student, kd_weight, config.loss.top_k_mass), optimizer
        )

    # -- place and state

    @property
    def base(self) -> PreTrainedModel:
        """The student as transformers knows it, adapters inside."""
        return base_model(self.student)

    def save_policy(self, path: Path) -> None:
        save_model(self.student, self.tokenizer, path)

    def save_checkpoint(self) -> None:
        """Write model, optimiser and place."""

        def save(path: Path) -> None:
            with quiet_transformers():
                self.accelerator.save_state(str(path), safe_serialization=True)

        with self.events.span("checkpoint", step=self.position.step):
            self.store.save_checkpoint(
                self.position.step,
                save,
                asdict(self.position),
                self.config.checkpoint.keep,
                main=self.accelerator.is_main_process,
                wait=self.accelerator.wait_for_everyone,
            )

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged.
        """
        steps = self.store.checkpoints()
        if not steps:
            return False
        path = self.store.checkpoint(steps[-1])
        remedy = "Delete it and run the same command again: the run goes on from the one before."
        facts = self.store.check_model(path, "checkpoint", remedy)
        try:
            self.accelerator.load_state(str(path))
            self.position = Position(**{field.name: facts[field.name] for field in fields(Position)})
        except Exception as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"The checkpoint {path} is damaged ({type(error).__name__}: {detail}). {remedy}") from error
        return True

    @property
    def finished(self) -> bool:
        training, at = self.config.training, self.position
        if training.max_steps is not None and at.step >= training.max_steps:
            return True
        if training.max_tokens is not None and at.tokens >= training.max_tokens:
            return True
        return at.generation >= self.generations

    def progress(self, share_of_pass: float) -> float:
        """Share of the run that is done, 0..1: of its passes, steps or tokens, whichever will end it."""
        training, at, passes = self.config.training, self.position, self.config.schedule.passes
        shares = [(at.generation * passes + at.passes + share_of_pass) / (self.generations * passes)]
        if training.max_steps is not None:
            shares.append(at.step / training.max_steps)
        if training.max_tokens is not None:
            shares.append(at.tokens / training.max_tokens)
        return min(1.0, max(shares))

    # -- training

    def train_pass(self, samples: Samples, advance: Any) -> None:
        """Train from the current place to the end of the current pass, or of the run."""
        at, steps = self.position, self._plan(samples)
        while True:
            self._step(samples, steps, advance)
            if self.finished:
                return
            if at.batch == len(steps):
                at.passes, at.batch = at.passes + 1, 0
            if at.step % self.config.checkpoint.every_steps == 0:
                self.save_checkpoint()
            if at.batch == 0:
                return

    def _plan(self, samples: Samples) -> list[list[list[int]]]:
        seed = derive_seed(self.config.seed, "pass", self.position.generation, self.position.passes)
        if self._planned[0] != seed:
            capacity, batch_tokens = self.config.packing.length, self.config.training.batch_tokens
            self._planned = seed, plan_pass(samples.lengths, capacity, batch_tokens, seed)
        return self._planned[1]

    def steps_of_pass(self, samples: Samples) -> int:
        """Optimiser steps of the current pass."""
        return len(self._plan(samples))

    def _step(self, samples: Samples, steps: list[list[list[int]]], advance: Any) -> None:
        began = time.perf_counter()
        at, rows = self.position, steps[self.position.batch]
        tokens = int(samples.responses.lengths[[i for row in rows for i in row]].sum())
        # A rank with fewer micro-batches than others repeats one with no weight: all must join in every backward pass.
        size, world = self.config.training.micro_batch_rows, self.accelerator.num_processes
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        turns = -(-len(chunks) // world)
        mine = [(chunks[i], 1.0) if i < len(chunks) else (chunks[0], 0.0) for i in self._turns(turns)]

        torch.manual_seed(derive_seed(self.config.seed, "step", at.step, self.accelerator.process_index))  # for dropout
        self.loss_model.train()
        sums = torch.zeros(4, dtype=torch.float64)  # loss, ce, kd, near-policy KL
        counted = 0
        for turn, (chunk, weight) in enumerate(mine):
            last = turn == len(mine) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.loss_model):
                out, kl, known = self._forward(samples, chunk)
                # Scaled by the step's tokens, and by the processes that DDP averages over.
                self.accelerator.backward(out.loss * (weight * world / tokens))
            sums += weight * torch.tensor([out.loss.item(), out.ce.item(), out.kd.item(), kl], dtype=torch.float64)
            counted += int(weight) * known
        totals = self.accelerator.reduce(
            torch.cat([sums, torch.tensor([float(counted)], dtype=torch.float64)]).to(self.accelerator.device)
        ).tolist()
        loss, ce, kd = (total / tokens for total in totals[:3])
        norm = float(self.accelerator.clip_grad_norm_(self.loss_model.parameters(), self.config.training.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = [samples.ids[i] for row in rows for i in row]
            raise RunError(
                f"The loss of step {at.step + 1} is not finite (loss {loss}, gradient norm {norm}); the student was not "
                f"updated. Samples in it: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}. Lower "
                "training.learning_rate, or look at those samples; the last checkpoint is whole."
            )

        at.step, at.tokens, at.batch = at.step + 1, at.tokens + tokens, at.batch + 1
        rate = learning_rate(self.progress(at.batch / len(steps)), self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        row_tokens = sum(int(samples.lengths[row].sum()) for row in rows)
        line: dict[str, Any] = {
            "step": at.step,
            "generation": at.generation,
            "pass": at.passes,
            "tokens": at.tokens,
            "loss": loss,
            "ce": ce,
            "kd": kd,
            "near_policy_kl": totals[3] / totals[4] if totals[4] else None,
            "lr": rate,
            "grad_norm": norm,
            "fill": row_tokens / (len(rows) * self.config.packing.length),
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }
        if line["near_policy_kl"] is not None and self.near_policy_is_proxy:
            line["near_policy_kl_is_proxy"] = True
        self.log(line)
        advance(1, note=f"loss {loss:.4f}")

    @property
    def near_policy_is_proxy(self) -> bool:
        """Samples not drawn from the plain policy make the near-policy KL a proxy."""
        return self.config.rollout.temperature != 1.0 or self.config.rollout.top_p != 1.0

    def _turns(self, turns: int) -> Iterator[int]:
        return (turn * self.accelerator.num_processes + self.accelerator.process_index for turn in range(turns))

    def _forward(self, samples: Samples, rows: list[list[int]]) -> tuple[LossOutput, float, int]:
        """Loss of a micro-batch; near-policy KL summed over its tokens, and the number of tokens that has one."""
        length = max(int(samples.lengths[row].sum()) for row in rows)
        packed = pack_tokens(samples.prompts, samples.responses, rows, length, self.tokenizer.pad_token_id)  # type: ignore
        topk_ids, topk_logprobs = samples.topk(packed.samples)
        to = self.accelerator.device
        out = self.loss_model(
            packed.input_ids.to(to),
            packed.position_ids.to(to),
            packed.predictors.to(to),
            packed.labels.to(to),
            topk_ids.to(to),
            topk_logprobs.to(to),
        )
        if not samples.by_student:
            return out, 0.0, 0
        behavior = samples.behavior.take(packed.samples, np.float32)
        kl = near_policy_kl(out.label_logprobs.detach().cpu(), torch.from_numpy(behavior)).sum().item()
        return out, kl, len(behavior)

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same figures to every tracker."""
        if self.accelerator.is_main_process:
            self.store.append_metrics(line)
        figures = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        self.accelerator.log(figures, step=line["step"])


def make_accelerator(config: Config, store: Store) -> Accelerator:
    """accelerate with the run's precision and trackers.

    Raises:
        UserError: a tracker that accelerate does not know or whose package is missing.
    """
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=models.device().type == "cpu",  # accelerate would take Apple's MPS, which the other stages do not
            # Processes wait for each other through whole generations and evaluations, not only through gradients.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
            mixed_precision=resolve_precision(config),
            log_with=list(config.tracking.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(store.path), logging_dir=str(store.path / "trackers")),
        )
        missing = set(config.tracking.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    except ValueError as error:
        raise UserError(f"tracking.trackers {config.tracking.trackers} cannot be used: {error}") from None
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"tracking.trackers names {names}, whose package is not installed; pip install it.")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type.value}, but npd trains on one process or with DDP; launch "
            "it with `accelerate launch --multi_gpu`."
        )
    return accelerator
