"""A cluster against a clock: npd's own loop (`npd.train.loop`) trains, simulated devices generate, fail and come back.

Time is in seconds. Nothing is computed but the schedule, and everything that is drawn follows from a seed: a part's duration
from its generation and number, whoever makes it; a node's failures from its number.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from npd.config import Config
from npd.observe.events import SpanName, read_events
from npd.records import Span
from npd.train.loop import Loop, Position, Trained

CAPACITY = 16  # tokens of a row: a prompt of one token and a response
IDLE, BUSY, LOST, DOWN = "idle", "busy", "lost", "down"


@dataclass(frozen=True)
class Store:
    """Where snapshots and parts lie: a pipe that transfers take one after another, and a latency beside it."""

    latency: float = 0.0
    bandwidth: float = float("inf")
    """Bytes a second, of all transfers together."""


@dataclass(frozen=True)
class Schedule:
    """A run."""

    generations: int = 2
    passes: int = 5
    lead: float = 1.0
    parts: int = 8
    """Of a generation."""
    pass_seconds: float = 1.0
    """Of training once on a generation."""
    rows: int = 0
    """Of a part, at most; 0: as many as make 2,048 in all, at least one."""
    rows_per_step: int = 8
    publishing: float = 0.0
    """For which training stands still at a snapshot."""

    @property
    def each(self) -> int:
        """Rows of a part."""
        return self.rows or max(1, 2048 // self.parts)

    def config(self) -> Config:
        """As the loop takes it."""
        return Config.model_validate(
            {
                "run_dir": "-",
                "student": {"model": "-"},
                "data": {"train": "-", "max_prompt_tokens": 1},
                "rollout": {"max_new_tokens": CAPACITY - 1},
                "packing": {"length": CAPACITY},
                "training": {"batch_tokens": CAPACITY * self.rows_per_step},
                "checkpoint": {"every_steps": 10**9},
                "schedule": {"generations": self.generations, "passes": self.passes, "lead": self.lead},
            }
        )


@dataclass(frozen=True)
class Cluster:
    """Devices that generate."""

    devices: int = 1
    work: float = 1.0
    """Device-seconds of a generation, in equal parts but for `scatter`."""
    overhead: float = 0.0
    """Seconds of a part besides."""
    scatter: float = 0.0
    """Standard deviation of the logarithm of a part's duration; its mean stays."""
    slow: float = 0.0
    """Share of the devices that are slow, drawn by seed."""
    slowness: float = 1.0
    """How many times longer a slow device takes."""
    node: int = 8
    """Devices that fail together."""
    failures: float = 0.0
    """Of a node, an hour, on average; they come at any moment."""
    repair: float = 600.0
    """Seconds until a node is back, without what it had."""
    fail_at: tuple[tuple[float, int], ...] = ()
    """(second, node) of failures that are not drawn."""
    store: Store = Store()
    snapshot: float = 0.0
    """Bytes of a snapshot: written once, and read by each device before its first part with it."""
    data: float = 0.0
    """Bytes of a generation's parts, written once and read by the trainer."""
    loading: float = 0.0
    """Seconds from a snapshot that is read to the first token."""
    durations: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Measured device-seconds of (generation, part), instead of `work`."""


@dataclass
class Device:
    """What one of them does."""

    slowness: float
    state: str = IDLE
    since: float = 0.0
    version: int = -1
    """The snapshot that it holds."""
    part: tuple[int, int] | None = None
    turn: int = 0
    """Grows with each failure: what was due before does not come any more."""


class Devices:
    """Makes parts, the lowest number first, as an event loop beside the trainer's clock."""

    def __init__(self, cluster: Cluster, parts: int, seed: int) -> None:
        self.cluster, self.parts, self.seed = cluster, parts, seed
        drawn = np.random.default_rng([seed, 1]).random(cluster.devices) < cluster.slow
        self.devices = [Device(cluster.slowness if slow else 1.0) for slow in drawn]
        self.idle = list(range(cluster.devices))  # a heap: the lowest number works first
        self.wanted: list[tuple[int, int]] = []  # a heap of (generation, part)
        self.landed: dict[int, list[int]] = {}  # generation -> a heap of parts
        self.lands: Counter[tuple[int, int]] = Counter()
        self.lost_parts = 0
        self.spent: defaultdict[str, float] = defaultdict(float)  # device-seconds by what was done
        self.pipe = 0.0  # when the store is free
        self._events: list[tuple[float, int, str, int, int]] = []  # when, in which order, what, whose, its turn
        self._order = itertools.count()
        self._factors: dict[int, np.ndarray] = {}
        self.nodes = -(-cluster.devices // cluster.node)
        self._fates = np.random.default_rng([seed, 2])
        if cluster.failures:
            for node in range(self.nodes):
                self._push(self._life(), "fail", node)
        for when, node in cluster.fail_at:
            self._push(when, "fail once", node)

    # -- time

    @property
    def next(self) -> float:
        """When something happens next."""
        return self._events[0][0] if self._events else float("inf")

    def advance(self, until: float) -> None:
        """Let everything happen that is due by then."""
        while self._events and self._events[0][0] <= until:
            self.happen()

    def happen(self) -> None:
        """Let the next thing happen."""
        now, _, what, whose, turn = heapq.heappop(self._events)
        if what == "publish":
            for part in range(self.parts):
                heapq.heappush(self.wanted, (whose, part))
            self.landed.setdefault(whose, [])
        elif what == "written":
            if turn == self.devices[whose].turn:
                self._push(self.transfer(now, self.cluster.data / self.parts), "land", whose, turn)
        elif what == "land":
            if turn == self.devices[whose].turn:
                self._land(now, whose)
        elif what == "back":
            self._turn_to(now, whose, IDLE)
            heapq.heappush(self.idle, whose)
        else:
            self._fail(now, whose, again=what == "fail")
        while self.wanted and self.idle:
            self._begin(now, heapq.heappop(self.idle), heapq.heappop(self.wanted))

    def transfer(self, now: float, size: float) -> float:
        """When a transfer that begins now ends."""
        self.pipe = max(now, self.pipe) + size / self.cluster.store.bandwidth
        return self.pipe + self.cluster.store.latency

    def publish(self, now: float, version: int) -> None:
        """A snapshot: its generation is wanted once it is in the store."""
        self.advance(now)
        self._push(self.transfer(now, self.cluster.snapshot), "publish", version)

    def close(self, now: float) -> None:
        """The end: what devices are still at counts until now."""
        for number in range(len(self.devices)):
            self._turn_to(now, number, IDLE)

    # -- what happens

    def _push(self, when: float, what: str, whose: int, turn: int = 0) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, whose, turn))

    def _life(self) -> float:
        return float(self._fates.exponential(3600 / self.cluster.failures))

    def _turn_to(self, now: float, number: int, state: str) -> None:
        device = self.devices[number]
        self.spent[device.state] += now - device.since
        device.state, device.since = state, now

    def duration(self, generation: int, part: int) -> float:
        """Seconds of a part on a device that is not slow."""
        known = self.cluster.durations.get((generation, part))
        if known is not None:
            return known
        if generation not in self._factors:
            sigma = self.cluster.scatter
            rng = np.random.default_rng([self.seed, 3, generation])
            self._factors[generation] = rng.lognormal(-(sigma**2) / 2, sigma, self.parts)
        return self.cluster.overhead + self.cluster.work / self.parts * float(self._factors[generation][part])

    def _begin(self, now: float, number: int, part: tuple[int, int]) -> None:
        device = self.devices[number]
        self._turn_to(now, number, BUSY)
        device.part = part
        if device.version != part[0]:
            device.version = part[0]
            now = self.transfer(now, self.cluster.snapshot) + self.cluster.loading
        self._push(now + device.slowness * self.duration(*part), "written", number, device.turn)

    def _land(self, now: float, number: int) -> None:
        device = self.devices[number]
        assert device.part is not None, "who lands a part has one"
        heapq.heappush(self.landed[device.part[0]], device.part[1])
        self.lands[device.part] += 1
        device.part = None
        self._turn_to(now, number, IDLE)
        heapq.heappush(self.idle, number)

    def _fail(self, now: float, node: int, *, again: bool) -> None:
        first = node * self.cluster.node
        for number in range(first, min(first + self.cluster.node, len(self.devices))):
            device = self.devices[number]
            if device.state == DOWN:
                continue
            if device.part is not None:
                self.spent[LOST] += now - device.since
                device.since = now
                self.lost_parts += 1
                heapq.heappush(self.wanted, device.part)
                device.part = None
            else:
                self.idle.remove(number)
                heapq.heapify(self.idle)
            self._turn_to(now, number, DOWN)
            device.turn, device.version = device.turn + 1, -1
            self._push(now + self.cluster.repair, "back", number)
        if again:
            self._push(now + self.cluster.repair + self._life(), "fail", node)


@dataclass
class Outcome:
    """What a simulated run was."""

    seconds: float
    waited: list[float]
    """For each generation's parts, by the trainer."""
    trained: float
    spent: dict[str, float]
    """Device-seconds of those that generate: busy, idle, lost with a failure, down."""
    lost_parts: int
    lands: Counter[tuple[int, int]]
    events: list[tuple[str, int, int]]
    """In the trainer's order: ("publish", version, 0), ("take", generation, part), ("pass", generation, number)."""

    @property
    def wait_share(self) -> float:
        return sum(self.waited) / self.seconds

    @property
    def idle_share(self) -> float:
        return 1 - self.spent.get(BUSY, 0.0) / max(1e-12, sum(self.spent.values()))


class Simulated:
    """The loop's work (`npd.train.loop.Work`) against a clock."""

    def __init__(self, schedule: Schedule, cluster: Cluster, seed: int = 0) -> None:
        self.schedule = schedule
        self.others = Devices(cluster, schedule.parts, seed)
        self.now = 0.0
        self.trained = 0.0
        self.waited = [0.0] * schedule.generations
        self.events: list[tuple[str, int, int]] = []
        self._token = schedule.pass_seconds / (schedule.parts * schedule.each * (CAPACITY - 1))
        self._whole = np.full(schedule.parts * schedule.each, CAPACITY, np.int64)
        self._taken = 0
        self._generation = 0

    def run(self) -> Outcome:
        loop = Loop(self.schedule.config(), self, Position(), generations=self.schedule.generations, lead=self.schedule.lead)
        self.loop = loop
        self.publish(0)
        loop.run()
        self.others.close(self.now)
        return Outcome(
            self.now,
            self.waited,
            self.trained,
            dict(self.others.spent),
            self.others.lost_parts,
            self.others.lands,
            self.events,
        )

    # -- what the loop asks for

    @property
    def lengths(self) -> np.ndarray:
        return self._whole[: self._taken]

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - 1

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        self._generation, self._taken = generation, 0
        parts = self.schedule.parts
        return parts, parts * self.schedule.each, np.empty(0, np.int64)

    def next_part(self, taken: list[int]) -> int:
        self.others.advance(self.now)
        there = self.others.landed.setdefault(self._generation, [])
        while not there:
            assert self.others.next < float("inf"), "parts that are waited for are made"
            when = self.others.next
            self.others.advance(when)
            self.waited[self._generation] += max(0.0, when - self.now)
            self.now = max(self.now, when)
        return heapq.heappop(there)

    def take(self, part: int) -> tuple[np.ndarray, int]:
        self.events.append(("take", self._generation, part))
        cluster = self.others.cluster
        there = self.others.transfer(self.now, cluster.data / self.schedule.parts)
        self.waited[self._generation] += there - self.now
        self.now = there
        first, self._taken = self._taken, self._taken + self.schedule.each
        return np.arange(first, self._taken), self.schedule.each

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        self.now += tokens * self._token
        self.trained += tokens * self._token
        return Trained(0.0, 0)

    def publish(self, version: int) -> None:
        self.events.append(("publish", version, 0))
        self.now += self.schedule.publishing
        self.others.publish(self.now, version)

    def checkpoint(self) -> None: ...

    def pass_done(self) -> None:
        self.events.append(("pass", self._generation, self.loop.at.passes - 1))

    def generation_done(self, reason: str, passes: float) -> None: ...


def simulate(schedule: Schedule, cluster: Cluster, seed: int = 0) -> Outcome:
    """One run."""
    return Simulated(schedule, cluster, seed).run()


# -- from a real run


@dataclass(frozen=True)
class Replay:
    """What a real run's events say, as a schedule and a cluster."""

    schedule: Schedule
    cluster: Cluster
    fixed: float
    """Seconds of the run that are none of its loop's: loading before, saving afterwards, evaluation."""
    seconds: float
    """Of the run, from its start to its end."""
    order: list[tuple[str, int, int]]
    """("part", generation, part), ("pass", generation, number) and ("publish", version, 0), as they were begun."""

    def predict(self, devices: int | None = None) -> float:
        """Seconds of the run; with other devices than it had."""
        cluster = self.cluster if devices is None else replace(self.cluster, devices=devices)
        return self.fixed + simulate(self.schedule, cluster).seconds


def replay(run_dir: Path, config: Config) -> Replay:
    """Durations of parts and passes from a run's events.jsonl; made in turns, or by workers beside the trainer."""
    spans = list(read_events(run_dir / "events.jsonl"))
    return replay_of(spans, config)


def replay_of(spans: Sequence[Span], config: Config) -> Replay:
    """The same, from spans."""
    made: defaultdict[tuple[int, int], float] = defaultdict(float)
    makers: set[str] = set()
    passes: defaultdict[tuple[int, int], float] = defaultdict(float)
    order: list[tuple[float, tuple[str, int, int]]] = []
    totals: defaultdict[str, float] = defaultdict(float)
    first_train = min((s.start for s in spans if s.name == SpanName.TRAIN), default=0.0)
    for span in sorted(spans, key=lambda s: s.start):
        generation, part = span.facts.get("generation", -1), span.facts.get("part", -1)
        totals[span.name] += span.seconds
        if span.name == SpanName.GENERATE:
            makers.add(span.role)
            order.append((span.start, ("part", generation, part)))
        if span.name in (SpanName.GENERATE, SpanName.PART):
            made[generation, part] += span.seconds
        elif span.name == SpanName.TRAIN:
            passes[generation, span.facts["passes"]] += span.seconds
            order.append((span.start, ("pass", generation, span.facts["passes"])))
        elif span.name == SpanName.PUBLISH and "version" in span.facts:
            order.append((span.start, ("publish", span.facts["version"], 0)))
    beside = any(role != "trainer" for role in makers)
    generations = 1 + max((g for g, _ in passes), default=0)
    parts = 1 + max((p for _, p in made), default=0)
    published = max(1, sum(event[0] == "publish" for _, event in order))
    schedule = Schedule(
        generations=generations,
        passes=config.schedule.passes,
        lead=config.schedule.lead if beside else 0.0,
        parts=parts,
        pass_seconds=sum(passes.values()) / max(1, len(passes)),
        rows=max(1, 512 // parts),
        rows_per_step=1,
        publishing=totals[SpanName.PUBLISH] / published,
    )
    writes = totals[SpanName.WRITE] / published
    cluster = Cluster(devices=max(1, len(makers)), durations=dict(made), store=Store(latency=writes))
    began, ended = min(s.start for s in spans), max(s.end for s in spans)
    start = min((s.start for s in spans if s.name == SpanName.PUBLISH), default=first_train) - began
    fixed = start + totals[SpanName.EVALUATE] + totals[SpanName.SAVE] + totals[SpanName.CHECKPOINT]
    return Replay(schedule, cluster, fixed, ended - began, _once([event for _, event in sorted(order)]))


def _once(events: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Each event where it comes first."""
    return list(dict.fromkeys(events))
