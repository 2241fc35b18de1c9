"""What a run takes of devices that need not be here: memory by part, and seconds by the kind of work.

Pure arithmetic on a model's shape, a workload and a table of hardware. Rates are those of one device; whoever measured them
replaces what is computed here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from npd import models
from npd.hardware import Hardware, efficiency
from npd.rollout import Pace
from npd.train.memory import StepMemory

HOST = 0.64e9
"""Bytes of a process on a CPU before any model, measured: Python, torch, transformers and Arrow."""
BLIND = "linear_attention", "mamba", "recurrent", "conv"
READING = 12
"""Bytes a token and unit of width that a forward pass holds at once beside the weights, in numbers of two bytes."""


class Model(NamedTuple):
    """A decoder as arithmetic sees it."""

    parameters: int
    matrices: int
    """Parameters that tokens are multiplied with: embeddings and head aside."""
    head: int
    """Elements of the head."""
    layers: int
    width: int
    """Of all query heads."""
    hidden: int
    vocabulary: int
    cache: int
    """Numbers that a token leaves in the key-value cache, in all layers."""
    experts: int = 0
    """Parameters of all experts."""
    chosen: float = 1.0
    """Share of the experts that a token goes through."""
    near: int = 0
    """Layers that see no more than `window` tokens."""
    window: int = 0
    blind: int = 0
    """Layers that keep a state, and no keys and values."""

    @property
    def active(self) -> float:
        """Parameters that each token is multiplied with."""
        return self.matrices - self.experts * (1 - self.chosen)

    def seen(self, context: float) -> float:
        """Tokens that one attends to, in all layers together, behind so many."""
        return (self.layers - self.near - self.blind) * context + self.near * min(context, self.window)

    def forward(self, tokens: float, heads: float, context: float) -> float:
        """Operations of reading `tokens`, with the head on `heads` of them; each behind `context` of them."""
        return tokens * (2 * self.active + 4 * self.seen(context) * self.width) + 2 * heads * self.head

    @property
    def each(self) -> float:
        """Numbers that a token leaves in the cache of a layer that has one."""
        return self.cache / max(1, self.layers - self.blind)

    def read(self, sequences: float) -> float:
        """Parameters that a step of decoding so many sequences reads: of experts those that any of them goes through."""
        return self.parameters - self.experts * (1 - self.chosen) ** sequences


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
    kinds = Counter(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    near = kinds["sliding_attention"] + kinds["chunked_attention"] if kinds else layers * bool(window)
    blind = sum(kinds[name] for name in BLIND)
    experts, chosen = models.expert_parameters(known, trust_remote_code=trust_remote_code)
    return Model(
        parameters=count,
        matrices=max(0, count - head * (1 if tied else 2)),
        head=head,
        layers=layers,
        width=heads * each,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cache=2 * (layers - blind) * keys * each,
        experts=experts,
        chosen=chosen,
        near=near * bool(window),
        window=window,
        blind=blind,
    )


class Reader(NamedTuple):
    """A model that only reads or writes."""

    model: Model
    itemsize: int
    """Bytes of a weight."""
    share: float = 1.0
    """Of the responses that it reads."""
    own: bool = True
    """Has it weights of its own in memory?"""

    @property
    def weights(self) -> float:
        return float(self.model.parameters * self.itemsize) if self.own else 0.0


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
    mixed: float = 0.0
    """Share of the response tokens of a pass that are references'."""
    references: int = 0
    """Reference responses that the teacher reads before the first generation."""

    @property
    def pass_tokens(self) -> float:
        """Prompt and response tokens of a pass; references are taken to be as long as responses."""
        return self.responses * self.kept * (self.prompt + self.response) / (1 - self.mixed)

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
    teachers: Sequence[Reader],
    device: Hardware,
    pace: Pace,
    engine_devices: int = 1,
) -> Rates:
    """From the hardware's peaks and the efficiencies of `npd.hardware`.

    Training is 3 forward passes' operations, whatever checkpointing repeats: so its efficiency was measured. A step of
    decoding takes what the slowest of three takes: reading weights and cache once, its products, launching its kernels.

    Args:
        writer: the student as the engine holds it.
        teachers: those that are not elsewhere.
        engine_devices: devices of one engine, which share its weights, cache and work.
    """
    sample = load.prompt + load.response
    training = 3 * student.forward(sample, load.response, sample / 2) / sample
    reading = 0.0
    for teacher in teachers:
        reading += teacher.share * teacher.model.forward(sample, load.response, sample / 2)
        reading += teacher.share * teacher.model.forward(load.response, load.response, load.response / 2) * load.free
    reading += student.forward(load.response, load.response, load.response / 2) * load.free
    context = load.prompt + load.response / 2
    launches = 0.0 if device.kind == "cpu" else student.layers * pace.layer_seconds
    step = max(
        (student.read(load.at_once) + load.at_once * student.seen(context) * student.each)
        * writer.itemsize
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


def training_bytes(step: StepMemory, held: float, adapters: float, *, shards: int, checkpointing: bool) -> dict[str, float]:
    """Bytes of a training device by part; their sum is the step's `total`.

    Args:
        held: of the student's weights, adapters aside.
        adapters: of adapters, which alone learn; 0 where all weights do.
        shards: training devices that share weights, gradients and the optimiser's moments: 1 where each has all of them.
    """
    learns, step = adapters or held, step.over(shards)
    found = {
        "weights": (held + adapters) / shards,
        "gradients": learns / shards,
        "AdamW": 2 * learns / shards,
        "activations": step.kept(checkpointing=checkpointing),
        "logits": step.loss,
    }
    return found | ({"gathered layers": step.gathered} if shards > 1 else {})


def generating_bytes(
    load: Load, writer: Reader, teachers: Sequence[Reader], *, own_copy: bool, engine_devices: int
) -> dict[str, float]:
    """Bytes of a device that generates, by part.

    Args:
        own_copy: has the engine weights beside the model that reads?
    """
    largest = max([writer, *teachers], key=lambda reader: reader.model.parameters)
    tokens, model = load.read_tokens, largest.model
    found = {
        "student": writer.weights,
        "engine": writer.weights / engine_devices if own_copy else 0.0,
        "key-value cache": load.at_once * load.longest * writer.model.cache * writer.itemsize / engine_devices,
        "teacher": sum(teacher.weights for teacher in teachers),
        "reading": tokens * model.hidden * READING * largest.itemsize / 2 + min(tokens, 4096) * model.vocabulary * 8.0,
    }
    return {name: size for name, size in found.items() if size}
