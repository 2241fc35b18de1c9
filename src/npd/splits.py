"""How devices are shared between training and generating: how long a run takes on each split, and which wastes least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from npd.forecast import HOST, Load, Model, Rates, Reader, generating_bytes, training_bytes
from npd.hardware import Hardware, efficiency
from npd.train.memory import USABLE, StepMemory

EXACT = 64  # generations that are reckoned one by one; of a longer run the others go on as the last of them


class Times(NamedTuple):
    """Of a run, in seconds."""

    whole: float
    trained: float
    """In which training devices train."""
    generated: float
    """In which generating devices generate; where turns are taken, in which all devices do."""


def times(load: Load, pass_seconds: float, generating: float, *, turns: bool, per_generation: float = 0.0) -> Times:
    """How long a run takes: its loop, as docs/guide.md has it, from one generation to the next.

    Parts land evenly. The first pass over a generation ends when its last part was there and is trained on, but not before
    the first part could begin it; the next snapshot is taken `lead` passes before a generation ends, and written with when
    the generation before is made.

    Args:
        generating: seconds of a generation, by all that generate.
        per_generation: seconds that each takes of both sides besides.
    """
    most = load.most_steps / load.pass_steps
    left = min(most, float(load.generations * load.passes))
    planned = max(1, math.ceil(left / load.passes - 1e-9))
    trained, lead = left * pass_seconds, 0.0 if turns else load.lead
    generating += per_generation
    part = 1 / load.parts
    now = free = start = before = 0.0
    for g in range(planned):
        if g == EXACT:  # steady by now
            each = now - before
            now += (planned - g) * each
            break
        before = now
        passes = min(float(load.passes), left)
        left -= passes
        free = max(start, free) + generating
        begun = free - generating
        whole = min(1.0, passes)
        if turns:
            now = max(now, free)
            begin = now
        else:
            begin = max(now, begun + generating * part)

        def reached(share: float, now: float = now, begin: float = begin, free: float = free, begun: float = begun) -> float:
            """When so much of the first pass is trained."""
            last = begun + share * generating + (part * pass_seconds if share == 1 else 0.0)
            return max(begin + share * pass_seconds, last)

        due = passes - lead
        start = reached(due) if 0 < due < 1 else now if due <= 0 else reached(1.0) + (due - 1) * pass_seconds
        now = reached(whole) + max(0.0, passes - 1) * pass_seconds
        if lead == 0:
            start = now
    return Times(now, trained, planned * generating)


def pass_seconds(
    load: Load, of: Rates, learns: float, gathered: float, device: Hardware, *, devices: int, shards: int
) -> float:
    """A pass over a generation on some training devices.

    Micro-batches of a step are dealt out; gradients are summed once a step, or with shards after each micro-batch, before
    whose forward and backward pass weights are gathered. Nothing is taken to overlap.

    Args:
        learns: bytes of the gradients.
        gathered: bytes of the weights as they are sent.
    """
    step = min(load.step_tokens, load.pass_tokens)
    micro = max(1, math.ceil(step / load.micro_tokens))
    each = math.ceil(micro / devices) / micro
    sent, link = (devices - 1) / devices, device.link * efficiency("link", device)
    if devices == 1:
        exchanged = 0.0
    elif shards == 1:
        exchanged = 2 * learns * sent / link
    else:
        exchanged = math.ceil(micro / devices) * (2 * gathered + learns) * sent / link
    return load.pass_steps * exchanged + load.pass_tokens * of.train * each


class Split(NamedTuple):
    """Devices, and what comes of them."""

    train: int
    generate: int
    """Devices beside those that train; 0 where turns are taken."""
    shards: int
    checkpointing: bool
    times: Times
    memory: dict[str, dict[str, float]]
    """Bytes of a device by its role, and there by part."""
    turns: bool

    @property
    def devices(self) -> int:
        return self.train + self.generate

    def wasted(self, devices: int) -> float:
        """Share of the time of so many devices in which they do nothing."""
        whole = devices * self.times.whole
        busy = self.train * self.times.trained + (self.generate or self.train) * self.times.generated
        return max(0.0, 1 - busy / whole) if whole else 0.0

    def fullest(self, device: Hardware) -> tuple[str, float]:
        """The role whose memory is fullest, and what share of what can be used it takes."""
        role = max(self.memory, key=lambda name: sum(self.memory[name].values()))
        return role, sum(self.memory[role].values()) / (USABLE * device.memory)

    def fits(self, device: Hardware) -> bool:
        return self.fullest(device)[1] <= 1


@dataclass(frozen=True)
class Case:
    """A run, models and devices: all that a split is reckoned from."""

    load: Load
    rates: Rates
    student: Model
    writer: Reader
    teacher: Reader | None
    step: StepMemory
    held: float
    adapters: float
    device: Hardware
    half: bool
    own_copy: bool
    engine_devices: int = 1
    checkpointing: bool | None = None
    """None: where a step would not fit otherwise."""
    checkpoints: float = 0.0
    """How often a checkpoint is written."""
    sharding: bool = True
    """May weights be sharded where they do not fit?"""
    together: bool = True
    """Can the engine stand in each of several processes that train, so that all devices take turns?"""

    def split(self, train: int, generate: int) -> Split:
        """One split; `generate` 0: all devices take turns."""
        load, device, turns = self.load, self.device, generate == 0
        ways = [False, True] if self.checkpointing is None else [self.checkpointing]
        sharded = [1, *([train] if self.sharding and train > 1 else [])]
        found = None
        for shards in sharded:
            for again in ways:
                found = self._memory(train, turns, shards, again)
                if max(sum(parts.values()) for parts in found.values()) <= USABLE * device.memory:
                    break
            else:
                continue
            break
        assert found is not None, "there is one way at least"
        learns = self.adapters or self.held
        gathered = self.student.parameters * (2 if self.half else 4)
        each = pass_seconds(load, self.rates, learns, gathered, device, devices=train, shards=shards)
        engines = max(1, (generate or train) // self.engine_devices)
        part = load.response_tokens * (self.rates.write + self.rates.read) / load.parts
        generating = math.ceil(load.parts / engines) * part if load.written else 0.0  # a part is one engine's
        made = times(load, each, generating, turns=turns, per_generation=self.rates.snapshot)
        whole = made.whole + self.rates.fixed + self.checkpoints * self.rates.checkpoint
        return Split(train, generate, shards, again, made._replace(whole=whole), found, turns)

    def _memory(self, train: int, turns: bool, shards: int, checkpointing: bool) -> dict[str, dict[str, float]]:
        training = training_bytes(
            self.step, self.held, self.adapters, self.student, shards=shards, checkpointing=checkpointing, half=self.half
        )
        if not self.load.written:
            return {"training": training}
        generating = generating_bytes(
            self.load, self.writer, self.teacher, own_copy=self.own_copy, engine_devices=self.engine_devices
        )
        if not turns or (train == 1 and self.device.kind != "cpu"):  # on one GPU each leaves it to the other
            return {"training": training, "generating": generating}
        # In one process: what is held stays, what is only worked with comes in turns.
        passing = ("activations", "logits", "gathered layers"), ("key-value cache", "reading")
        work, other = (
            sum(parts.get(n, 0.0) for n in names) for parts, names in zip((training, generating), passing, strict=True)
        )
        first = training if work >= other else {n: s for n, s in training.items() if n not in passing[0]}
        second = {n: s for n, s in generating.items() if work < other or n not in passing[1]}
        host = {"Python and libraries": HOST} if self.device.kind == "cpu" else {}
        return {"each": host | first | second}

    def splits(self, devices: int) -> Iterator[Split]:
        """Every split of so many devices: turns, and where there is a lead each number that trains."""
        yield self.split(devices if self.together or not self.load.written else 1, 0)
        if not self.load.written or not self.load.lead or self.device.kind == "cpu":
            return
        for train in _counts(devices - 1):
            generate = (devices - train) // self.engine_devices * self.engine_devices
            if generate:
                yield self.split(train, generate)

    def best(self, devices: int) -> Split:
        """The split that ends first of those that fit, of equals the smaller trainer; else the one with most room."""
        found = list(self.splits(devices))
        fitting = [split for split in found if split.fits(self.device)]
        if fitting:
            return min(fitting, key=lambda split: (split.times.whole, split.train))
        return min(found, key=lambda split: split.fullest(self.device)[1])


def _counts(most: int) -> Sequence[int]:
    """From 1 to `most`: all of a few, and of many some thirty a power of ten."""
    if most <= 128:
        return range(1, most + 1)
    return sorted({*range(1, 65), *(round(10 ** (k / 30)) for k in range(54, int(30 * math.log10(most)) + 1)), most})
