"""How devices are shared between training and generating: how long a run takes on each split, and which wastes least."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    busy: float
    """Seconds of all devices together in which they train or generate."""
    memory: dict[str, dict[str, float]]
    """Bytes of a device by its role, and there by part."""
    turns: bool

    @property
    def devices(self) -> int:
        return self.train + self.generate

    def wasted(self, devices: int) -> float:
        """Share of the time of so many devices in which they do nothing."""
        whole = devices * self.times.whole
        return max(0.0, 1 - self.busy / whole) if whole else 0.0

    def fullest(self, device: Hardware) -> tuple[str, float]:
        """The role whose memory is fullest, and what share of what can be used it takes."""
        role = max(self.memory, key=lambda name: sum(self.memory[name].values()))
        return role, sum(self.memory[role].values()) / (USABLE * device.memory)

    def lacking(self) -> list[float]:
        """Bytes of a device by role, the most first: of splits that do not fit the least comes nearest."""
        return sorted((sum(parts.values()) for parts in self.memory.values()), reverse=True)

    def fits(self, device: Hardware) -> bool:
        return self.fullest(device)[1] <= 1


@dataclass(frozen=True)
class Case:
    """A run, models and devices: all that a split is reckoned from."""

    load: Load
    rates: Rates
    student: Model
    writer: Reader
    teachers: tuple[Reader, ...]
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
    shard: bool | None = None
    """Are weights shared among several devices that train? None: where they do not fit otherwise."""
    together: bool = True
    """Can the engine stand in each of several processes that train, so that all devices take turns?"""

    def split(self, train: int, generate: int) -> Split:
        """One split; `generate` 0: all devices take turns."""
        load, device, turns = self.load, self.device, generate == 0
        shards, again = self._laid_out(train)
        found = self.memory_by_role(train, turns=turns)
        learns = self.adapters or self.held
        gathered = self.student.parameters * (2 if self.half else 4)
        each = pass_seconds(load, self.rates, learns, gathered, device, devices=train, shards=shards)
        engines = max(1, (generate or train) // self.engine_devices)
        part = load.response_tokens * (self.rates.write + self.rates.read) / load.parts
        rounds = math.ceil(load.parts / engines)
        generating = rounds * part if load.written else 0.0  # a part is one engine's
        made = times(load, each, generating, turns=turns, per_generation=self.rates.snapshot)
        read = load.references * load.response * self.rates.read / engines
        whole = made.whole + read + self.rates.fixed + self.checkpoints * self.rates.checkpoint
        micro = self.micro_batches
        busy = made.trained * micro / math.ceil(micro / train)
        busy += (made.generated * load.parts / rounds + read * engines) * self.engine_devices
        return Split(train, generate, shards, again, made._replace(whole=whole), busy, found, turns)

    @property
    def micro_batches(self) -> int:
        """Of a step: no more devices can train."""
        return max(1, math.ceil(min(self.load.step_tokens, self.load.pass_tokens) / self.load.micro_tokens))

    def _laid_out(self, train: int) -> tuple[int, bool]:
        """Devices that share the states, and whether activations are computed again: as training does it by itself."""
        memory, again = self.device.memory, self.checkpointing is not False
        full = self.shard
        if full is None:
            full = self.device.kind != "cpu" and self.step.needs_shards(memory, checkpointing=again)
        shards = train if full else 1
        if self.checkpointing is not None:
            return shards, self.checkpointing
        return shards, self.step.over(shards).needs_checkpointing(memory)

    def memory_by_role(self, train: int, *, turns: bool) -> dict[str, dict[str, float]]:
        """Bytes by part of a device that trains, one of so many, and of one that generates; `each` does both at once."""
        shards, checkpointing = self._laid_out(train)
        training = training_bytes(self.step, self.held, self.adapters, shards=shards, checkpointing=checkpointing)
        if not self.load.written:
            return {"training": training}
        generating = generating_bytes(
            self.load, self.writer, self.teachers, own_copy=self.own_copy, engine_devices=self.engine_devices
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
        """Every split of so many devices or fewer: turns, and where there is a lead each number that trains, with as many
        others generating as a generation has parts. None where an engine takes more devices than there are."""
        load, size = self.load, self.engine_devices
        # An engine of one process alone: beside a trainer it has one device.
        most = devices if self.together or not load.written else int(size == 1)
        for train in self._counts(most, load.parts if load.written else 0):
            if train >= size or not load.written:
                yield self.split(train, 0)
        if not load.written or not load.lead or self.device.kind == "cpu":
            return
        for train in self._counts(devices - 1, 0):
            generate = min((devices - train) // size, load.parts) * size
            if generate:
                yield self.split(train, generate)

    def best(self, devices: int) -> Split | None:
        """The split that ends first of those that fit, of equals the one of fewest devices, then of fewest that train; else
        the one that comes nearest to fitting. Of more devices it takes no longer."""
        found = list(self.splits(devices))
        fitting = [split for split in found if split.fits(self.device)]
        if fitting:
            return min(fitting, key=lambda split: (split.times.whole, split.devices, split.train))
        return min(found, key=lambda split: (split.lacking(), split.times.whole), default=None)

    def _counts(self, most: int, engines: int) -> list[int]:
        """Numbers of devices up to `most`, the same for every `most`: all of a few, some thirty a power of ten, and each with
        which a step or a generation has a round less."""
        grid = {*range(1, 129), *(round(10 ** (k / 30)) for k in range(63, 151))}
        counts = grid | _rounds(self.micro_batches) | {count * self.engine_devices for count in _rounds(engines)}
        return sorted(count for count in counts if count <= most)


def _rounds(pieces: int) -> set[int]:
    """For each number of rounds that so many pieces can take, the fewest hands with which they take no more."""
    root = math.isqrt(pieces)
    return {-(-pieces // rounds) for rounds in range(1, root + 2)} | set(range(1, root + 2)) if pieces else set()
