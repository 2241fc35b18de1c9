"""What a run takes of devices that need not be here: memory by part, and seconds by the kind of work.

Pure arithmetic on a model's shape, a workload and a table of hardware. Rates are those of one device; whoever measured them
replaces what is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from npd import models
from npd.hardware import Hardware, efficiency
from npd.rollout import Pace
from npd.train.memory import StepMemory

HOST = 0.64e9
"""Bytes of a process on a CPU before any model, measured: Python, torch, transformers and Arrow."""
READING = 12
"""Bytes a token and unit of width that a forward pass holds at once beside the weights, in numbers of two bytes."""


class Model(NamedTuple):
    """A decoder as arithmetic sees it."""

    parameters: int
    matrices: int
    """Parameters that every token is multiplied with: embeddings and head aside. Of experts all count, as if all were
    chosen."""
    head: int
    """Elements of the head."""
    layers: int
    width: int
    """Of all query heads."""
    hidden: int
    vocabulary: int
    cache: int
    """Numbers that a token leaves in the key-value cache."""

    def forward(self, tokens: float, heads: float, context: float) -> float:
        """Operations of reading `tokens`, with the head on `heads` of them; each sees `context` tokens on average."""
        return tokens * (2 * self.matrices + 4 * context * self.width * self.layers) + 2 * heads * self.head


def model_of(known: PreTrainedConfig, *, trust_remote_code: bool = False) -> Model:
    """A model's shape, from its configuration alone."""
    text = known.get_text_config()
    count = models.parameter_count(known, trust_remote_code=trust_remote_code)
    head = text.vocab_size * text.hidden_size
    tied = bool(getattr(text, "tie_word_embeddings", getattr(known, "tie_word_embeddings", False)))
    heads = getattr(text, "num_attention_heads", 1) or 1
    each = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    layers = text.num_hidden_layers
    matrices = max(0, count - head * (1 if tied else 2))
    return Model(count, matrices, head, layers, heads * each, text.hidden_size, text.vocab_size, 2 * layers * keys * each)


class Reader(NamedTuple):
    """A model that only reads or writes."""

    model: Model
    itemsize: int
    """Bytes of a weight."""

    @property
    def weights(self) -> float:
        return float(self.model.parameters * self.itemsize)


@dataclass(frozen=True)
class Load:
    """What a run has to do."""

    generations: int
    passes: int
    """Over each generation."""
    most_steps: float
    """Optimiser steps, if a limit ends the run; else infinite."""
    responses: int
    """Of a generation."""
    prompt: float
    """Tokens, on average."""
    response: float
    kept: float
    """Share of the responses that is trained on."""
    parts: int
    lead: float
    step_tokens: int
    """Of an optimiser step."""
    micro_tokens: int
    """Of a forward and backward pass on one device, at most."""
    at_once: int
    """Sequences that an engine decodes at once."""
    longest: int
    """Tokens of the longest sequence."""
    read_tokens: int
    """Of a batch of scoring."""
    free: bool
    """Are responses read without their prompts too?"""
    written: bool = True
    """By the student? Else nothing is generated."""
    static: float = 1.0
    """Steps of decoding for each that a response needs, where a batch waits for its longest."""

    @property
    def pass_tokens(self) -> float:
        """Prompt and response tokens of a pass."""
        return self.responses * self.kept * (self.prompt + self.response)

    @property
    def pass_steps(self) -> int:
        return max(1, math.ceil(self.pass_tokens / self.step_tokens))

    @property
    def response_tokens(self) -> float:
        """Of a generation, written and read."""
        return self.responses * self.response


@dataclass(frozen=True)
class Rates:
    """Seconds on one device."""

    train: float
    """A token of a pass, forward, backward and its share of the optimiser."""
    write: float
    """A response token of one engine."""
    read: float
    """A response token, by teacher and student, as often as they read it."""
    snapshot: float = 0.0
    """A new generation beside its parts: weights written and loaded."""
    checkpoint: float = 0.0
    fixed: float = 0.0
    """A run, before and after everything else."""


def rates(
    load: Load,
    student: Model,
    writer: Reader,
    teacher: Reader | None,
    device: Hardware,
    pace: Pace,
    engine_devices: int = 1,
) -> Rates:
    """From the hardware's peaks and the efficiencies of `npd.hardware`.

    Training is 3 forward passes' operations, whatever checkpointing repeats: so its efficiency was measured. A step of
    decoding takes what the slowest of three takes: reading weights and cache once, its products, launching its kernels.

    Args:
        writer: the student as the engine holds it.
        teacher: None where it is elsewhere.
        engine_devices: devices of one engine, which share its weights, cache and work.
    """
    sample = load.prompt + load.response
    training = 3 * student.forward(sample, load.response, sample / 2) / sample
    reading = 0.0
    if teacher is not None:
        reading += teacher.model.forward(sample, load.response, sample / 2)
        reading += teacher.model.forward(load.response, load.response, load.response / 2) * load.free
    reading += student.forward(load.response, load.response, load.response / 2) * load.free
    context = load.prompt + load.response / 2
    launches = 0.0 if device.kind == "cpu" else student.layers * pace.layer_seconds
    step = max(
        (writer.weights + load.at_once * context * student.cache * writer.itemsize)
        / (engine_devices * device.bandwidth * pace.bandwidth),
        load.at_once * student.forward(1, 1, context) / (engine_devices * device.flops * efficiency("decoding", device)),
        launches,
    )
    prompts = student.forward(load.prompt, 0, load.prompt / 2) / (device.flops * efficiency("scoring", device))
    return Rates(
        train=training / (device.flops * efficiency("training", device)),
        write=load.static * step / load.at_once + prompts / load.response / engine_devices,
        read=reading / load.response / (device.flops * efficiency("scoring", device)),
    )


# -- memory


def training_bytes(
    step: StepMemory, held: float, adapters: float, student: Model, *, shards: int, checkpointing: bool, half: bool
) -> dict[str, float]:
    """Bytes of a training device by part.

    Args:
        held: of the student's weights, adapters aside.
        adapters: of adapters, which alone learn; 0 where all weights do.
        shards: training devices that share weights, gradients and the optimiser's moments: 1 where each has all of them.
        half: products in bfloat16.
    """
    learns = adapters or held
    found = {
        "weights": (held + adapters) / shards,
        "gradients": learns / shards,
        "AdamW": 2 * learns / shards,
        "activations": step.activations.bytes(step.tokens, checkpointing=checkpointing) if step.activations else 0.0,
        "logits": step.loss,
    }
    if shards > 1:
        # Whole while they are used: a layer and the next one, fetched ahead, and the embeddings; a gradient beside each.
        layer = student.matrices / student.layers
        found["gathered layers"] = (2 * layer + student.head) * ((2 if half else 4) + 4)
    return found


def generating_bytes(
    load: Load, writer: Reader, teacher: Reader | None, *, own_copy: bool, engine_devices: int
) -> dict[str, float]:
    """Bytes of a device that generates, by part.

    Args:
        own_copy: has the engine weights beside the model that reads?
    """
    largest = max([writer, *([teacher] if teacher else [])], key=lambda reader: reader.model.parameters)
    tokens, model = load.read_tokens, largest.model
    found = {
        "student": writer.weights,
        "engine": writer.weights / engine_devices if own_copy else 0.0,
        "key-value cache": load.at_once * load.longest * writer.model.cache * writer.itemsize / engine_devices,
        "teacher": teacher.weights if teacher else 0.0,
        "reading": tokens * model.hidden * READING * largest.itemsize / 2 + min(tokens, 4096) * model.vocabulary * 8.0,
    }
    return {name: size for name, size in found.items() if size}
