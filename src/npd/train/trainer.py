"""One optimiser step after another: packed rows in, updated weights and metrics out.

The gradient of a step is that of the sum of the loss over all its response tokens - every micro-batch, every process -
divided by their number, so it does not depend on how samples were packed or spread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npd import models
from npd.config import Config, LossConfig
from npd.errors import RunError, UserError
from npd.losses import LossOutput, divergence_of, near_policy_kl, sparse_soft_cross_entropy
from npd.models import (
    State,
    base_model,
    copy_state,
    head_weight,
    hidden_states,
    save_model,
    with_adapters,
)
from npd.observe.events import Events, SpanName
from npd.schedule import derive_seed, learning_rate
from npd.store import DELETE_CHECKPOINT, Store
from npd.train.batches import MicroBatch, micro_batches
from npd.train.memory import checkpoints
from npd.train.samples import Samples
from npd.train.sharding import check_launch, lay_out

T = TypeVar("T")


class LossModel(nn.Module):
    """Student and loss as one module, so that what spreads it over devices sees a single forward pass."""

    def __init__(self, model: nn.Module, loss: LossConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        # The loss stays outside: it works in place and in chunks, which is what a compiler would make of it.
        self.decoder = torch.compile(models.backbone(model).forward, dynamic=True) if compiled else None
        self.loss = loss
        self.divergence = divergence_of(loss.divergence, loss.options)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        labels: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        cu_seq_lens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> LossOutput:
        """The loss of packed samples (see `npd.packing.Packed`), times `scale`; ce and kd are not scaled."""
        hidden_RLD = hidden_states(
            self.model, input_ids, position_ids, self.decoder, cu_seq_lens=cu_seq_lens, lengths=lengths
        )
        hidden_TD = hidden_RLD.flatten(0, 1)[predictors]
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        return sparse_soft_cross_entropy(
            hidden_TD,
            head_weight(self.model),
            labels,
            topk_ids,
            topk_logprobs,
            kd_weight=self.loss.kd_weight,
            top_k_mass=self.loss.top_k_mass,
            divergence=self.divergence,
            bias=models.head_bias(self.model),
            after_head=models.after_head_of(self.model),
            scale=scale,
            compiled=self.decoder is not None and hidden_TD.is_cuda,
        )


def resolve_precision(config: Config) -> str:
    """accelerate's name of the training arithmetic. `auto` takes bfloat16 only on a CUDA device that has it."""
    if config.training.precision == "auto":
        return "bf16" if models.fast_bfloat16() else "no"
    return {"bfloat16": "bf16", "float32": "no"}[config.training.precision]


class StepFigures(NamedTuple):
    """What an optimiser step found."""

    loss: float
    """Mean nats per response token, and so are ce and kd."""
    ce: float
    kd: float
    kl: float
    """Near-policy KL, summed over `kl_tokens`."""
    kl_tokens: int
    """Response tokens that a snapshot of the student wrote."""
    lr: float
    grad_norm: float
    """Before clipping."""
    fill: float
    """Share of the computed rows that is no padding."""
    tokens_per_second: float


class Trainer:
    """Owns the student that learns, and its optimiser."""

    def __init__(
        self,
        config: Config,
        store: Store,
        accelerator: Accelerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        events: Events,
    ) -> None:
        self.config, self.store, self.tokenizer, self.events = config, store, tokenizer, events
        models.freeze_unread(model)
        torch.manual_seed(derive_seed(config.seed, "adapters"))
        self.student: nn.Module = with_adapters(model, config.student)
        adapters: Any = getattr(self.student, "peft_config", {})
        self.noisy = config.training.dropout or any(each.lora_dropout > 0 for each in adapters.values())
        asked = config.training.gradient_checkpointing
        half = resolve_precision(config) == "bf16"
        self.lying = lay_out(config, model.config, accelerator, bfloat16=half)
        able = asked is True or model.supports_gradient_checkpointing
        if able and checkpoints(config, model.config, accelerator.device, bfloat16=half, shares=self.lying.shares):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if config.student.adapts:
                model.enable_input_require_grads()
        self.accelerator = accelerator
        self.lying.prepare(LossModel(self.student, config.loss, compiled=config.training.compile), self._adamw)
        self.loss_model, self.optimizer = self.lying.module, self.lying.optimizer

    def _adamw(self) -> torch.optim.Optimizer:
        training = self.config.training
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=training.learning_rate,
            fused=True if self.accelerator.device.type == "cuda" else None,
        )

    # -- state

    def gathered(self) -> AbstractContextManager[nn.Module | None]:
        """The student in one piece, for as long as this lasts, to be saved, copied or evaluated: itself, or a copy in CPU
        memory where it is sharded, and then every process has to enter. None in all processes but the main one."""
        return self.lying.gathered(self.student)

    @property
    def sharded(self) -> bool:
        return self.lying.shares > 1

    @property
    def base(self) -> PreTrainedModel:
        """The student that is trained as transformers knows it, adapters inside."""
        return base_model(self.student)

    def save_student(self, path: Path, student: nn.Module) -> None:
        """Write the finished student, which was gathered, in the type of the checkpoint that it began as, or that
        student.dtype names."""
        save_model(student, self.tokenizer, path, dtype=models.saved_dtype(self.config.student))

    def save_policy(self, path: Path, state: State | None = None, dtype: torch.dtype | None = None) -> None:
        """Write the student, or the weights that `copy_policy` gave; `dtype` None: in the type that they have."""
        save_model(self.student, self.tokenizer, path, state, dtype=dtype)

    def copy_policy(self, dtype: torch.dtype | None = None) -> State | None:
        """The student's weights as they are now, in a type, for a thread that writes them while training goes on; None in all
        processes but the main one. Where the student is sharded every process has to call this."""
        with self.gathered() as student:
            return None if student is None else copy_state(student, dtype)

    @property
    def evaluated_in(self) -> torch.dtype | None:
        """What its matrix products are rounded to where it is evaluated on a GPU: what they are in training."""
        half = self.accelerator.mixed_precision == "bf16" and self.accelerator.device.type != "cpu"
        return torch.bfloat16 if half else None

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Leave the GPU to others meanwhile: weights, gradients' buffers and the optimiser's moments go to CPU memory."""
        device = self.accelerator.device
        self._move("cpu")
        try:
            yield
        finally:
            self._move(device)

    def _move(self, device: torch.device | str) -> None:
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim  # the step counter of AdamW stays where it is
        ]
        models.move([*models.tensors_of(self.loss_model), *moments], device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_checkpoint(self, step: int, facts: dict[str, Any]) -> None:
        """Write model and optimiser as they are after a step, with `facts` beside them."""

        with self.events.span(SpanName.CHECKPOINT, step=step):
            self.store.save_checkpoint(
                step,
                self.lying.save,
                facts,
                self.config.checkpoint.keep,
                main=self.accelerator.is_main_process,
                wait=self.accelerator.wait_for_everyone,
            )

    def resume(self, read: Callable[[dict[str, Any]], T]) -> T | None:
        """Go on from the newest whole checkpoint, if there is one; what `read` makes of the facts saved with it.

        Raises:
            UserError: the checkpoint is damaged.
        """
        steps = self.store.checkpoints()
        if not steps:
            return None
        path = self.store.checkpoint(steps[-1])
        remedy = DELETE_CHECKPOINT
        facts = self.store.check_model(path, "checkpoint", remedy)
        try:
            self.lying.load(path)
            return read(facts)
        except Exception as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"The checkpoint {path} is damaged ({type(error).__name__}: {detail}).", remedy) from error

    # -- training

    def step(self, samples: Samples, rows: list[list[int]], tokens: int, step: int, progress: float) -> StepFigures:
        """One optimiser step on packed rows with `tokens` response tokens.

        Rows say which samples share the step. Its gradient is a sum over them, so for the forward passes they are laid
        into shorter rows.

        Args:
            step: its number, from 1.
            progress: share of the run that is done after it, which decides the learning rate.

        Raises:
            RunError: the loss is not finite; the student is then unchanged.
        """
        began = time.perf_counter()
        world = self.accelerator.num_processes
        ids = [i for row in rows for i in row]
        budget = self.config.training.micro_batch_rows * self.config.packing.length
        laid = models.batches_for(self.student, samples.lengths[ids].tolist(), budget)
        chunks = [([[ids[i] for i in row] for row in rows], length) for rows, length in laid]
        # A rank with fewer micro-batches than others repeats one with no weight: all must join in every backward pass.
        turns = -(-len(chunks) // world)
        mine = [(chunks[i], 1.0) if i < len(chunks) else (chunks[0], 0.0) for i in self._turns(turns)]

        torch.manual_seed(derive_seed(self.config.seed, "step", step - 1, self.accelerator.process_index))  # for dropout
        models.learning_mode(self.student, dropout=self.config.training.dropout)
        device, kd_weight = self.accelerator.device, self.config.loss.kd_weight
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, ce, kd, near-policy KL
        counted = 0
        batches = micro_batches(samples, [chunk for chunk, _ in mine], self.tokenizer.pad_token_id, device)
        # Up to the totals below nothing waits for a GPU: figures stay there.
        for turn, (batch, (_, weight)) in enumerate(zip(batches, mine, strict=True)):
            with self.lying.accumulating(last=turn == len(mine) - 1):
                # Scaled by the step's tokens, and by the processes that gradients are averaged over.
                out, kl = self._forward(batch, weight * world / tokens)
                self.accelerator.backward(out.loss)
            loss = (1 - kd_weight) * out.ce + kd_weight * out.kd
            sums += weight * torch.stack((loss, out.ce, out.kd, kl)).double()
            counted += int(weight) * len(batch.behavior)
            del out  # its gradients, before the next one's
        # What no sample of the step reaches, such as an expert, has a gradient too: the optimiser would pass it over where
        # one process has it, but not where several average theirs.
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"] if p.grad is None):
            parameter.grad = torch.zeros_like(parameter)
        found = torch.cat((sums, sums.new_full((1,), counted)))
        norms = self.lying.norm(self.config.training.max_grad_norm)
        *totals, norm = torch.cat((self.accelerator.reduce(found), norms.double().reshape(1))).tolist()
        loss, ce, kd = (total / tokens for total in totals[:3])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = [samples.id(i) for i in ids]
            raise RunError(
                f"The loss of step {step} is not finite (loss {loss}, gradient norm {norm}); the student was not "
                f"updated. Samples in it: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}. Lower "
                "training.learning_rate, or look at those samples; the last checkpoint is whole."
            )

        rate = learning_rate(progress, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        padded = sum(len(chunk) * length for chunk, length in chunks)
        return StepFigures(
            loss,
            ce,
            kd,
            kl=totals[3],
            kl_tokens=int(totals[4]),
            lr=rate,
            grad_norm=norm,
            fill=int(samples.lengths[ids].sum()) / padded,
            tokens_per_second=tokens / (time.perf_counter() - began),
        )

    def _turns(self, turns: int) -> Iterator[int]:
        return (turn * self.accelerator.num_processes + self.accelerator.process_index for turn in range(turns))

    def _forward(self, batch: MicroBatch, scale: float = 1.0) -> tuple[LossOutput, Tensor]:
        """Loss of a micro-batch, times `scale`, and near-policy KL summed over its tokens."""
        out = self.loss_model(*batch.inputs, scale=scale)
        logprobs = out.label_logprobs.detach()
        if self.noisy and (len(batch.behavior) or self.sharded):  # a sharded forward pass takes all processes
            logprobs = self._without_noise(batch)
        return out, near_policy_kl(logprobs[batch.by_student], batch.behavior).sum()

    @torch.no_grad()
    def _without_noise(self, batch: MicroBatch) -> Tensor:
        """The labels' log-probabilities [T] without dropout: with it, a student differs from itself."""
        self.student.eval()
        out: LossOutput = self.accelerator.unwrap_model(self.loss_model)(*batch.inputs)
        models.learning_mode(self.student, dropout=self.config.training.dropout)
        return out.label_logprobs


def make_accelerator(config: Config, store: Store) -> Accelerator:
    """accelerate with the run's precision and trackers, on the device that placement names.

    Raises:
        UserError: a tracker that accelerate does not know or whose package is missing; accelerate's own configuration lays
            models out (`check_launch`).
    """
    check_launch()
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=models.device().type == "cpu",  # accelerate would take Apple's MPS, which the other stages do not
            # Processes wait for each other through whole generations and evaluations, not only through gradients.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(days=7)),
                # transformers' own mixtures of experts hold experts in one tensor, which all samples reach; others may not.
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,
                    find_unused_parameters=config.student.trust_remote_code or config.training.dropout,
                ),
            ],
            mixed_precision=resolve_precision(config),
            # A step's loss is scaled here: what accelerate's own configuration says would scale it once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(config.tracking.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(store.path), logging_dir=str(store.path / "trackers")),
        )
        missing = set(config.tracking.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    except ValueError as error:
        if not config.tracking.trackers:
            raise UserError(f"accelerate cannot be set up as its own configuration says: {error}") from None
        raise UserError(f"tracking.trackers {config.tracking.trackers} cannot be used: {error}") from None
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"tracking.trackers names {names}, whose package is not installed; pip install it.")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type.value}, but npd decides by itself how a student lies on "
            "devices (training.shard); launch it with `accelerate launch --multi_gpu`."
        )
    return accelerator
