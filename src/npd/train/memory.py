"""Does a training step fit its device, and is the student divided among several?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from npd import models
from npd.config import Config
from npd.errors import UserError
from npd.losses import chunk_for

USABLE = 0.92  # of a device's memory: the rest is gaps between what is allocated, and what kernels work with


class StepMemory(NamedTuple):
    """Bytes, as if on a GPU."""

    states: float
    """Weights, gradients and the optimiser's moments."""
    loss: float
    """A chunk of logits with what is made of it, and the gradient of the head as it grows."""
    tokens: int
    """Of the largest micro-batch."""
    activations: models.Activations | None
    """None where that is not known."""
    gathered: float = 0.0
    """Where the states are shared: whole weights and gradients at once, of what is outside the layers and of the layers whose
    turn it is."""
    shares: int = 1
    """Devices that share the states."""

    def over(self, shares: int) -> StepMemory:
        """The same step on a device of so many that share the states."""
        return self._replace(shares=shares)

    def kept(self, *, checkpointing: bool) -> float:
        """Bytes of activations at most; 0 where they are not known."""
        if self.activations is None:
            return 0.0
        kept = self.activations.bytes(self.tokens, checkpointing=checkpointing)
        # Weights that are gathered are rounded already.
        return kept if self.shares == 1 else kept - self.activations.fixed

    def total(self, *, checkpointing: bool) -> float:
        """Most at once, on one device."""
        whole = self.gathered if self.shares > 1 else 0.0
        return self.states / self.shares + whole + self.loss + self.kept(checkpointing=checkpointing)

    def needs_checkpointing(self, device_bytes: float) -> bool:
        """Must activations be computed again for a step to fit a device with so much memory?"""
        return self.activations is None or self.total(checkpointing=False) > USABLE * device_bytes

    def needs_shards(self, device_bytes: float, *, checkpointing: bool) -> bool:
        """Is it too much for a device with so much memory that holds all of the states?"""
        return self.over(1).total(checkpointing=checkpointing) > USABLE * device_bytes


def step_memory(config: Config, known: PreTrainedConfig, *, bfloat16: bool, half: bool | None = None) -> StepMemory:
    """What a step takes on a device that holds the whole student, from its own configuration.

    Args:
        bfloat16: the training arithmetic.
        half: is bfloat16 fast on that device? None: as on this process's.
    """
    student = config.student
    count = models.parameter_count(known, trust_remote_code=student.trust_remote_code)
    held = count * models.resolve_dtype(student, trained=True, half=half).itemsize
    adapters = models.adapter_bytes(known, student, half=half)
    text = known.get_text_config()
    V, D = text.vocab_size, text.hidden_size
    tokens = config.training.micro_batch_rows * config.packing.length
    # Logits, their exponentials, and the gradient in the type of the hidden states; these and their gradient.
    product = 2 if bfloat16 else 4
    chunk = min(tokens, chunk_for(V, on_cpu=False)) * V * (4 + 4 + product) + 2 * tokens * D * product
    head = V * D * ((0 if student.adapts else 4) + (product if bfloat16 else 0))
    block, outside = models.block_parameters(known, trust_remote_code=student.trust_remote_code)
    # A layer that computes and the next one that is gathered meanwhile; gradients of one, and as they are reduced in float32.
    gathered = product * (outside + 2 * block) + (0 if student.adapts else product * (outside + block) + 4 * block)
    return StepMemory(
        # What learns has a gradient and AdamW's two moments beside it; adapters come on top of weights that only read.
        states=held + adapters + 3 * (adapters or held),
        loss=chunk + head,
        tokens=tokens,
        activations=models.activations(known, bfloat16=bfloat16, trust_remote_code=student.trust_remote_code),
        gathered=gathered,
    )


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a CPU, whose memory is not counted."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def checkpoints(config: Config, known: PreTrainedConfig, device: torch.device, *, bfloat16: bool, shares: int = 1) -> bool:
    """Are activations computed again in the backward pass? training.gradient_checkpointing, auto resolved.

    Args:
        shares: devices that share the student.
    """
    asked = config.training.gradient_checkpointing
    if asked != "auto":
        return asked
    there = memory_of(device)
    return there is not None and step_memory(config, known, bfloat16=bfloat16).over(shares).needs_checkpointing(there)


class Sharding(NamedTuple):
    """Is each tensor divided among the devices that train?"""

    full: bool
    why: str


def sharding(
    config: Config,
    known: PreTrainedConfig,
    processes: int,
    device_bytes: int | None,
    *,
    bfloat16: bool,
    step: StepMemory | None = None,
) -> Sharding:
    """training.shard, auto resolved.

    Args:
        processes: that train, each on a device of its own.
        device_bytes: of a device's memory; None where that is not counted.
        step: what a step takes, if that is known already.

    Raises:
        UserError: the student is sharded, and training.compile is true, or it leaves out layers by chance.
    """
    asked = config.training.shard
    if processes == 1:
        return Sharding(False, "one process trains")
    if asked == "none" or (asked == "auto" and device_bytes is None):
        return Sharding(False, "training.shard none" if asked == "none" else "a CPU's memory is not counted")
    found = Sharding(True, "training.shard full")
    if asked == "auto":
        assert device_bytes is not None
        again = config.training.gradient_checkpointing is not False
        step = step or step_memory(config, known, bfloat16=bfloat16)
        fits = not step.needs_shards(device_bytes, checkpointing=again)
        needed, there = (size / (1 << 30) for size in (step.over(1).total(checkpointing=again), device_bytes))
        found = Sharding(
            not fits,
            f"a device {'holds' if fits else 'would need'} {needed:.1f} GiB of {there:.1f}{'' if fits else ' alone'}",
        )
    if found.full and config.training.compile:
        raise UserError(
            f"training.compile is true, but the student is sharded over {processes} processes ({found.why}), and a decoder "
            "that is gathered layer by layer is not compiled as a whole.",
            "Set training.compile: false, or training.shard: none if a device can hold the student.",
        )
    if found.full and config.training.dropout and (chance := getattr(known.get_text_config(), "layerdrop", 0)):
        raise UserError(
            f"training.dropout is true and the student leaves out layers by chance (layerdrop {chance}), but it is sharded "
            f"over {processes} processes ({found.why}), which gather each layer together.",
            "Set training.dropout: false, or training.shard: none if a device can hold the student.",
        )
    return found
