"""Does a training step fit its device?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from npd import models
from npd.config import Config
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

    def total(self, *, checkpointing: bool) -> float:
        """Most at once."""
        kept = self.activations.bytes(self.tokens, checkpointing=checkpointing) if self.activations else 0.0
        return self.states + self.loss + kept

    def needs_checkpointing(self, device_bytes: float) -> bool:
        """Must activations be computed again for a step to fit a device with so much memory?"""
        return self.activations is None or self.total(checkpointing=False) > USABLE * device_bytes


def step_memory(config: Config, known: PreTrainedConfig, *, bfloat16: bool) -> StepMemory:
    """What a step takes, from the student's own configuration.

    Args:
        bfloat16: the training arithmetic.
    """
    student = config.student
    count = models.parameter_count(known, trust_remote_code=student.trust_remote_code)
    held = count * models.resolve_dtype(student, trained=True).itemsize
    adapters = models.adapter_bytes(known, student)
    text = known.get_text_config()
    V, D = text.vocab_size, text.hidden_size
    tokens = config.training.micro_batch_rows * config.packing.length
    # Logits, their exponentials, and the gradient in the type of the hidden states; these and their gradient.
    product = 2 if bfloat16 else 4
    chunk = min(tokens, chunk_for(V, on_cpu=False)) * V * (4 + 4 + product) + 2 * tokens * D * product
    head = V * D * ((0 if student.adapts else 4) + (product if bfloat16 else 0))
    return StepMemory(
        # What learns has a gradient and AdamW's two moments beside it; adapters come on top of weights that only read.
        states=held + adapters + 3 * (adapters or held),
        loss=chunk + head,
        tokens=tokens,
        activations=models.activations(known, bfloat16=bfloat16, trust_remote_code=student.trust_remote_code),
    )


def checkpoints(config: Config, known: PreTrainedConfig, device: torch.device, *, bfloat16: bool) -> bool:
    """Are activations computed again in the backward pass? training.gradient_checkpointing, auto resolved."""
    asked = config.training.gradient_checkpointing
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return False
    there = torch.cuda.get_device_properties(device).total_memory
    return step_memory(config, known, bfloat16=bfloat16).needs_checkpointing(there)
