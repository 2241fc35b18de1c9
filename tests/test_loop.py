from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from npd.config import Config
from npd.schedule import SMOOTHING
from npd.train.loop import KL_BUDGET, MAX_STEPS, MAX_TOKENS, PASSES, Loop, Position, Trained

CAPACITY = 16
Name = tuple[int, int, int]  # generation (-1: a reference), part, row


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run_dir": "-",
        "student": {"model": "-"},
        "data": {"train": "-", "max_prompt_tokens": 1},
        "rollout": {"max_new_tokens": CAPACITY - 1},
        "packing": {"length": CAPACITY},
        "training": {"batch_tokens": CAPACITY},
        "checkpoint": {"every_steps": 1},
    }
    for name, options in sections.items():
        tree[name] = {**tree.get(name, {}), **options}
    return Config.model_validate(tree)


class Part(NamedTuple):
    lengths: list[int]
    """Response tokens of each kept sample."""
    dropped: int = 0


@dataclass
class Step:
    generation: int
    passes: int
    rows: list[list[Name]]
    tokens: int
    progress: float
    share: float
    kl: float | None
    """Smoothed, before the step."""


@dataclass
class Ended:
    generation: int
    reason: str
    passes: float


Event = Step | Ended | tuple[str, int]


class FakeWork:
    """Notes what the loop asks for. After n parts are taken, the first n + 1 + `ahead` of `order` have landed."""

    def __init__(
        self,
        generations: Sequence[Sequence[Part]],
        references: Sequence[int] = (),
        order: Sequence[int] = (),
        ahead: int = 0,
        kl: Callable[[Position], float] = lambda at: 0.0,
    ) -> None:
        self.generations, self.references, self.order, self.ahead, self.kl = generations, references, order, ahead, kl
        self.events: list[Event] = []
        self.saved: list[tuple[int, str]] = []
        """(events by then, position as JSON) of each checkpoint."""

    def run(self, config: Config, position: Position | None = None, lead: float | None = None) -> FakeWork:
        self.loop = Loop(
            config,
            self,
            position or Position(),
            generations=config.schedule.generations,
            lead=config.schedule.lead if lead is None else lead,
        )
        self.loop.run()
        return self

    @property
    def at(self) -> Position:
        return self.loop.at

    @property
    def lengths(self) -> np.ndarray:
        return self.response_lengths + 1  # a prompt of one token

    @property
    def response_lengths(self) -> np.ndarray:
        return np.array(self._lengths, np.int64)

    def parts(self, generation: int) -> Sequence[Part]:
        return self.generations[generation % len(self.generations)]

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        self.generation = generation
        self._lengths = list(self.references)
        self.names: list[Name] = [(-1, 0, i) for i in range(len(self.references))]
        parts = self.parts(generation)
        responses = sum(len(part.lengths) + part.dropped for part in parts)
        return len(parts), responses, np.arange(len(self.references))

    def next_part(self, taken: list[int]) -> int:
        order = [p for p in self.order if p < len(self.parts(self.generation))] or range(len(self.parts(self.generation)))
        return min(set(order[: len(taken) + 1 + self.ahead]) - set(taken))

    def take(self, part: int) -> tuple[np.ndarray, int]:
        self.events.append(("take", part))
        lengths, dropped = self.parts(self.generation)[part]
        first = len(self._lengths)
        self._lengths += lengths
        self.names += [(self.generation, part, row) for row in range(len(lengths))]
        return np.arange(first, len(self._lengths)), len(lengths) + dropped

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        assert rows
        assert max(int(self.lengths[row].sum()) for row in rows) <= CAPACITY
        assert tokens == sum(int(self.response_lengths[row].sum()) for row in rows)
        names = [[self.names[i] for i in row] for row in rows]
        self.events.append(Step(self.generation, self.at.passes, names, tokens, progress, steps, self.at.near_policy_kl))
        written = sum(int(self.response_lengths[i]) for row in rows for i in row if self.names[i][0] >= 0)
        return Trained(self.kl(self.at) * written, written)

    def publish(self, version: int) -> None:
        self.events.append(("publish", version))

    def checkpoint(self) -> None:
        self.saved.append((len(self.events), json.dumps(asdict(self.at))))

    def pass_done(self) -> None:
        self.events.append(("pass", self.at.passes))

    def generation_done(self, reason: str, passes: float) -> None:
        self.events.append(Ended(self.at.generation, reason, passes))

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    @property
    def ends(self) -> list[Ended]:
        return [event for event in self.events if isinstance(event, Ended)]

    def of_generation(self, generation: int) -> list[Event]:
        """Events from the end of the generation before to its own."""
        cuts = [-1, *(i for i, event in enumerate(self.events) if isinstance(event, Ended))]
        return self.events[cuts[generation] + 1 : cuts[generation + 1] + 1]


# -- time


class Simulation(FakeWork):
    """One job makes parts one after another from the newest snapshot; it and the trainer are timed by one clock."""

    def __init__(self, times: Sequence[float], pass_time: float, parts: int, per_part: int, publishing: float, turns: bool):
        """Generation g takes times[g] to make and pass_time to train once, in equal parts of `per_part` steps each."""
        super().__init__([[Part([CAPACITY - 1] * per_part)] * parts])
        self.times, self.turns, self.publishing = times, turns, publishing
        self.token_time = pass_time / (parts * per_part * (CAPACITY - 1))
        self.now = self.free = 0.0
        self.idle = [0.0] * len(times)
        self.landing: list[list[float]] = []
        self._make(0)

    def _make(self, generation: int) -> None:
        start, parts = max(self.now, self.free), len(self.parts(generation))
        self.landing.append([start + self.times[generation] * (part + 1) / parts for part in range(parts)])
        self.free = self.landing[-1][-1]

    def _wait(self, until: float) -> None:
        self.idle[self.generation] += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def publish(self, version: int) -> None:
        super().publish(version)
        self.now += self.publishing
        self._make(version)

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        begun = super().begin(generation)
        if self.turns:
            self._wait(self.free)
        return begun

    def next_part(self, taken: list[int]) -> int:
        landing = {part: time for part, time in enumerate(self.landing[self.generation]) if part not in taken}
        self._wait(min(landing.values()))
        return min(part for part, time in landing.items() if time <= self.now)

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        self.now += tokens * self.token_time
        return super().step(rows, tokens, progress, steps)


class Sizes(NamedTuple):
    parts: int
    per_part: int
    """Steps on a part: whole ones, so that no rows wait for the next part."""
    passes: int
    before: int
    """Steps on a generation before the snapshot of the next one."""
    pass_time: float
    publishing: float

    @property
    def steps(self) -> int:
        return self.parts * self.per_part

    @property
    def lead(self) -> float:
        """Passes between that snapshot and the end, exactly."""
        return self.passes - self.before / self.steps

    @property
    def option(self) -> float:
        """A value of schedule.lead that means it, half a step away from any other."""
        return self.lead + (0.5 / self.steps if self.before else 0.0)

    def simulate(self, times: Sequence[float], turns: bool = False) -> Simulation:
        schedule = {"generations": len(times), "passes": self.passes, "lead": 0.0 if turns else self.option}
        simulation = Simulation(times, self.pass_time, self.parts, self.per_part, self.publishing, turns)
        simulation.run(make_config(schedule=schedule))
        trained = len(times) * self.passes * self.pass_time
        publishing = (len(times) - 1) * self.publishing
        assert simulation.now == pytest.approx(trained + publishing + sum(simulation.idle))  # nothing else takes time
        return simulation

    def least_idle(self, time: float, lead: float) -> float:
        """The trainer's idle time before a generation that takes `time`, its snapshot taken `lead` passes ahead.

        Of P parts, part k lands kG/P after the snapshot, and P - k + 1 parts are then left to train, t/P each; so the
        first pass ends at the latest of lead * t + t (never idle) and kG/P + (P - k + 1) t/P, which is largest for
        k = 1 or k = P.
        """
        t, parts = self.pass_time, self.parts
        return max(0.0, time / parts - lead * t, time + t / parts - (lead + 1) * t)


@st.composite
def sizes(draw: st.DrawFn, last_pass: bool = False) -> Sizes:
    """With `last_pass` the snapshot is never taken within the first pass: the job is then idle when it comes."""
    parts, per_part, passes = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1 + last_pass, 4))
    before = draw(st.integers(parts * per_part if last_pass else 0, passes * parts * per_part - 1))
    return Sizes(parts, per_part, passes, before, draw(st.floats(0.1, 10)), draw(st.floats(0, 0.3)))


RATIOS = st.lists(st.floats(0.01, 4), min_size=2, max_size=6)


def slow_idle(size: Sizes, times: Sequence[float]) -> list[float]:
    """Idle time per generation, one step after another, knowing nothing of Loop."""
    now = free = 0.0
    idle, starts = [0.0] * len(times), [0.0]
    for g, time in enumerate(times):
        free = starts[g] + time
        for n in range(size.passes * size.steps):
            if n == size.before and g + 1 < len(times):
                now += size.publishing
                starts.append(max(now, free))
            if n < size.steps and n % size.per_part == 0:
                landed = starts[g] + time * (n // size.per_part + 1) / size.parts
                idle[g] += max(0.0, landed - now)
                now = max(now, landed)
            now += size.pass_time / size.steps
    return idle


@settings(max_examples=60)
@given(sizes(last_pass=True), RATIOS)
def test_idle_time_is_the_least_possible(size, ratios):
    times = [ratio * size.pass_time for ratio in ratios]
    expected = [size.least_idle(time, size.lead if g else 0.0) for g, time in enumerate(times)]
    assert size.simulate(times).idle == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60)
@given(sizes(), RATIOS)
def test_a_busy_job_delays_only_what_it_must(size, ratios):
    """A snapshot taken within the first pass may find the job still writing the generation that is being read."""
    times = [ratio * size.pass_time for ratio in ratios]
    assert size.simulate(times).idle == pytest.approx(slow_idle(size, times), abs=1e-9)


@settings(max_examples=60)
@given(sizes(), st.lists(st.floats(0.01, 1), min_size=2, max_size=8))
@example(Sizes(1, 1, 5, 4, 1.0, 0.0), [1.0] * 5)
@example(Sizes(3, 2, 2, 0, 1.0, 0.1), [1.0] * 8)
def test_no_idle_time_where_a_generation_fits_into_the_lead(size, ratios):
    """G <= lead * t; the first generation's wait, which nothing can overlap, stands apart."""
    assert sum(size.simulate([ratio * size.lead * size.pass_time for ratio in ratios]).idle[1:]) == pytest.approx(0, abs=1e-9)


@settings(max_examples=60)
@given(sizes(last_pass=True), st.integers(2, 6))
def test_no_idle_time_where_reading_overlaps_as_well(size, generations):
    """G <= (lead + 1) t - t/P, as long as the first part lands in time: G <= P * lead * t."""
    longest = min(size.lead + 1 - 1 / size.parts, size.parts * size.lead) * size.pass_time
    assume(longest > 0)
    assert sum(size.simulate([longest] * generations).idle[1:]) == pytest.approx(0, abs=1e-9)


@settings(max_examples=40)
@given(sizes(), st.floats(1, 3))
def test_the_longest_lead_reaches_the_jobs_own_pace(size, ratio):
    """Snapshots taken when a generation begins: the job never rests, so each generation costs G - passes * t more."""
    size = size._replace(before=0, publishing=0.0)
    idle = size.simulate([ratio * size.passes * size.pass_time] * 12).idle
    assert idle[-1] == pytest.approx((ratio - 1) * size.passes * size.pass_time, abs=1e-9)


@pytest.mark.parametrize(("generations", "ratio"), [(2, 0.9), (2, 1.0), (10, 1.0), (10, 15 / 8), (40, 15 / 8)])
def test_a_whole_run_is_idle_for_two_percent_at_most(generations, ratio):
    size = Sizes(parts=8, per_part=3, passes=5, before=4 * 24, pass_time=60.0, publishing=0.5)
    simulation = size.simulate([ratio * 60.0] * generations)
    assert sum(simulation.idle) <= 0.02 * simulation.now
    assert sum(simulation.idle[1:]) == pytest.approx(0, abs=1e-9)


@settings(max_examples=40)
@given(sizes(), RATIOS)
def test_turns_wait_for_every_generation(size, ratios):
    times = [ratio * size.pass_time for ratio in ratios]
    assert size.simulate(times, turns=True).idle == pytest.approx(times)


# -- what is trained


class Case(NamedTuple):
    config: Config
    generations: list[list[Part]]
    references: list[int]
    order: list[int]
    ahead: int
    growth: float
    block: int

    def work(self) -> FakeWork:
        return FakeWork(self.generations, self.references, self.order, self.ahead, lambda at: self.growth * at.step)

    def run(self, position: Position | None = None) -> FakeWork:
        with mock.patch("npd.train.loop.BLOCK", self.block):
            return self.work().run(self.config, position)


LENGTHS = st.lists(st.integers(1, CAPACITY - 1), max_size=6)


@st.composite
def cases(draw: st.DrawFn, budget: bool = False, references: bool = False, limits: bool = False) -> Case:
    passes, generations = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    part = st.builds(Part, LENGTHS, st.integers(0, 3)).filter(lambda p: p.lengths or p.dropped)
    lead = draw(st.one_of(st.sampled_from([0.0, 1.0, float(passes)]), st.floats(0, passes)))
    schedule = {"passes": passes, "generations": generations, "lead": lead}
    training = {"batch_tokens": draw(st.integers(1, 3)) * CAPACITY}
    if budget:
        schedule["kl_budget"] = draw(st.floats(0.05, 2))
    if references:
        schedule["references"] = draw(st.floats(0.05, 0.8))
    if limits:
        training |= draw(st.sampled_from([{}, {"max_steps": 5}, {"max_tokens": 60}]))
    return Case(
        make_config(schedule=schedule, training=training),
        draw(st.lists(st.lists(part, min_size=1, max_size=4), min_size=generations, max_size=generations)),
        draw(st.lists(st.integers(1, CAPACITY - 1), min_size=1, max_size=5)) if references else [],
        draw(st.permutations(range(4))),
        draw(st.integers(0, 3)),
        draw(st.floats(0, 0.2)) if budget else 0.0,
        draw(st.sampled_from([3, 1 << 16])),
    )


@given(cases())
def test_a_pass_trains_every_kept_sample_once(case):
    work = case.run()
    trained: defaultdict[tuple[int, int], Counter[Name]] = defaultdict(Counter)
    for step in work.steps:
        trained[step.generation, step.passes].update(name for row in step.rows for name in row)
    for g, parts in enumerate(case.generations):
        kept = Counter((g, p, row) for p, part in enumerate(parts) for row in range(len(part.lengths)))
        assert all(trained[g, p] == kept for p in range(case.config.schedule.passes))
    assert [end.reason for end in work.ends] == [PASSES] * len(case.generations)
    assert work.loop.finished


@given(cases())
def test_only_the_last_step_of_a_pass_may_be_short(case):
    per_step = case.config.training.batch_tokens // CAPACITY
    for _, steps in groupby(case.run().steps, lambda step: (step.generation, step.passes)):
        *whole, last = (len(step.rows) for step in steps)
        assert set(whole) <= {per_step}
        assert last <= per_step


@given(cases())
def test_parts_are_taken_as_they_land(case):
    work, reference = case.run(), case.work()
    for g, parts in enumerate(case.generations):
        reference.begin(g)
        seen: list[int] = []
        for event in work.of_generation(g):
            if isinstance(event, tuple) and event[0] == "take":
                assert event[1] == reference.next_part(seen)
                seen.append(event[1])
            if isinstance(event, Step):
                assert {name[1] for row in event.rows for name in row} <= set(seen)
        assert sorted(seen) == list(range(len(parts)))


@given(cases())
def test_progress_grows_to_one(case):
    steps = case.run().steps
    progress = [step.progress for step in steps]
    assert progress == sorted(progress)
    last = case.generations[-1]
    # A last part without a kept sample can't be known to be the last step's before it is there.
    if any(part.lengths for part in last) and (case.config.schedule.passes > 1 or all(part.lengths for part in last)):
        assert progress[-1] == 1


@given(cases())
def test_snapshots_are_published_once_as_soon_as_due(case):
    work, schedule = case.run(), case.config.schedule
    published = [event[1] for event in work.events if isinstance(event, tuple) and event[0] == "publish"]
    assert published == list(range(1, schedule.generations))
    for g in range(schedule.generations - 1):
        events = work.of_generation(g)
        done = [0.0]  # passes before each decision
        for event in events:
            if isinstance(event, Step):
                done.append(event.passes + event.share)
            elif isinstance(event, tuple) and event[0] == "pass":
                done[-1] = event[1]
        due = [n for n, passes in enumerate(done) if passes >= schedule.passes - schedule.lead]
        if schedule.lead and due[0] < len(done) - 1:
            before = events[: events.index(("publish", g + 1))]
            assert sum(isinstance(event, Step) for event in before) == due[0]
        if not schedule.lead:  # with the generation's last weights
            assert work.of_generation(g + 1)[0] == ("publish", g + 1)


def test_a_snapshot_that_is_due_does_not_wait_for_parts():
    schedule = {"generations": 2, "passes": 1, "lead": 0.5}
    work = FakeWork([[Part([15]), Part([15])]] * 2).run(make_config(schedule=schedule))
    assert [event if isinstance(event, tuple) else type(event).__name__ for event in work.of_generation(0)] == [
        ("take", 0),
        "Step",
        ("publish", 1),
        ("take", 1),
        "Step",
        ("pass", 1),
        "Ended",
    ]


@settings(max_examples=60)
@given(cases(budget=True, references=True, limits=True), st.randoms(use_true_random=False))
def test_a_run_interrupted_anywhere_goes_on_alike(case, random):
    whole = case.run()
    for count, saved in random.sample(whole.saved, min(6, len(whole.saved))):
        rest = case.run(Position(**json.loads(saved)))
        again: list[Event] = [("take", part) for part in json.loads(saved)["parts"]]  # from the store
        if isinstance(rest.events[0], Ended):  # a limit was reached
            again = []
        assert rest.events[: len(again)] == again
        known = [event for event in whole.events[:count] if isinstance(event, tuple) and event[0] == "publish"]
        assert [event for event in rest.events[len(again) :] if event not in known] == whole.events[count:]
        assert asdict(rest.at) == asdict(whole.at)


# -- when a generation ends


def smoothed(steps: Sequence[Step], kl: Callable[[int], float]) -> float:
    """Near-policy KL after these steps, each of which weighs 0.9 of the next."""
    weights = np.array([SMOOTHING ** (len(steps) - 1 - i) * step.tokens for i, step in enumerate(steps)])
    values = np.array([kl(i + 1) for i in range(len(steps))])
    return float((weights * values).sum() / weights.sum())


@given(st.floats(0.001, 0.05), st.floats(0.02, 0.5), st.integers(1, 4), st.floats(0.1, 4), st.lists(LENGTHS, min_size=3))
def test_a_generation_ends_with_its_kl_budget(slope, budget, passes, lead, lengths):
    lead = min(lead, passes)
    schedule = {"generations": 3, "passes": passes, "kl_budget": budget, "lead": lead}
    work = FakeWork([[Part(part, 1) for part in lengths]])
    begun = Counter[int]()

    def kl(at: Position) -> float:
        begun[at.generation] += 1
        return slope * begun[at.generation]

    work.kl = kl
    work.run(make_config(schedule=schedule))
    for g, end in enumerate(work.ends):
        events = work.of_generation(g)
        steps = [event for event in events if isinstance(event, Step)]
        kls = [smoothed(steps[: n + 1], lambda i: slope * i) for n in range(len(steps))]
        assert [step.kl for step in steps[1:]] == pytest.approx(kls[:-1])
        measured = [step.kl for step in steps[1:] if step.kl is not None]
        assert all(value <= budget for value in measured)
        assume(not kls or abs(kls[-1] - budget) > 1e-9)
        assert (end.reason == KL_BUDGET) == bool(kls and kls[-1] > budget)
        if end.reason == PASSES:
            assert end.passes == passes
        share = budget * (1 - lead / passes)
        assume(all(abs(value - share) > 1e-9 for value in measured))  # a tie is decided by the last bit
        early = [n + 1 for n, value in enumerate(measured) if value >= share]
        done = [n + 1 for n, step in enumerate(steps) if step.passes + step.share >= passes - lead]
        due = min([*early, *done, *([0] if lead == passes else [])], default=len(steps))
        if g < 2 and due < len(steps):
            before = events[: events.index(("publish", g + 1))]
            assert sum(isinstance(event, Step) for event in before) == due
    assert [event for event in work.events if event in (("publish", 1), ("publish", 2))] == [("publish", 1), ("publish", 2)]


@pytest.mark.parametrize(
    ("limit", "steps", "reason"),
    [({"max_steps": 7}, 7, MAX_STEPS), ({"max_tokens": 76}, 6, MAX_TOKENS), ({}, 16, PASSES)],
)
def test_limits_end_the_run(limit, steps, reason):
    """Four steps of 15 tokens a pass, two passes, two generations."""
    config = make_config(schedule={"generations": 2, "passes": 2}, training=limit)
    work = FakeWork([[Part([15, 15]), Part([15, 15])]]).run(config)
    assert len(work.steps) == work.at.step == steps
    assert work.ends[-1].reason == reason
    assert work.loop.finished
    assert work.steps[-1].progress == 1
    progress = [step.progress for step in work.steps]
    assert progress == sorted(progress)


# -- references


@given(cases(references=True))
def test_references_are_mixed_in_evenly(case):
    share, usage = case.config.schedule.references, Counter[int]()
    for _, steps in groupby(case.run().steps, lambda step: (step.generation, step.passes)):
        mine = theirs = 0
        for generation, part, row in (name for step in steps for names in step.rows for name in names):
            if generation < 0:
                theirs += case.references[row]
                usage[row] += 1
            else:
                mine += case.generations[generation][part].lengths[row]
        assert abs(theirs - mine * share / (1 - share)) <= max(case.references) / 2 + 1e-6
    counts = [usage[i] for i in range(len(case.references))]
    assert max(counts) - min(counts) <= 1


def test_generations_that_end_early_use_further_references():
    """Every generation ends in its first pass; all references have their turn nevertheless."""
    schedule = {"generations": 8, "passes": 2, "kl_budget": 0.1, "references": 0.5}
    work = FakeWork([[Part([15] * 3), Part([15] * 3)]], references=[15] * 9, kl=lambda at: 1.0)
    work.run(make_config(schedule=schedule))
    assert {end.reason for end in work.ends} == {KL_BUDGET}
    assert work.at.references >= 9
