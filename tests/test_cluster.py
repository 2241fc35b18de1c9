"""The cluster on paper: small cases by hand, and what holds whatever is drawn."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import Sizes, sizes, slow_idle

import npd
from benchmarks.simulation import BUSY, DOWN, IDLE, LOST, Cluster, Schedule, Store, replay, simulate
from npd.config import load_config

ONE = Schedule(generations=1, passes=1, lead=0.0, parts=2, pass_seconds=2.0, rows=2, rows_per_step=1)


def test_one_device_by_hand():
    """Parts land at 2 and 4; the first trains from 2 to 3, the trainer waits until 4, the second trains until 5."""
    found = simulate(ONE, Cluster(devices=1, work=4.0))
    assert found.seconds == pytest.approx(5.0)
    assert found.waited == pytest.approx([3.0])
    assert found.events == [("publish", 0, 0), ("take", 0, 0), ("take", 0, 1), ("pass", 0, 0)]
    assert found.spent[BUSY] == pytest.approx(4.0)
    assert found.spent[IDLE] == pytest.approx(1.0)


def test_two_devices_halve_it():
    """Both parts land at 2."""
    found = simulate(ONE, Cluster(devices=2, work=4.0))
    assert found.seconds == pytest.approx(4.0)
    assert found.waited == pytest.approx([2.0])


def test_a_store_takes_its_time():
    """A snapshot of 10 bytes at 10 a second is written until 1.5 and read until 3 (its latency is half a second); parts of 5
    bytes: the first is made until 5, written until 6; taken until 7; the other one is made from 6 to 8 and there at 9."""
    store = Store(latency=0.5, bandwidth=10.0)
    found = simulate(ONE, Cluster(devices=1, work=4.0, store=store, snapshot=10.0, data=10.0))
    assert found.waited == pytest.approx(
        [9.0]
    )  # until 6, while it reads the first, from 8 to 9, and while it reads the other
    assert found.seconds == pytest.approx(11.0)


def test_a_node_that_fails_loses_its_unfinished_part_only():
    """At 3 the second part is half made: it begins anew at 13, lands at 15."""
    found = simulate(ONE, Cluster(devices=1, work=4.0, node=1, fail_at=((3.0, 0),), repair=10.0))
    assert found.lost_parts == 1
    assert found.lands == Counter({(0, 0): 1, (0, 1): 1})
    assert found.spent[LOST] == pytest.approx(1.0)
    assert found.spent[DOWN] == pytest.approx(10.0)
    assert found.seconds == pytest.approx(16.0)


def test_another_device_goes_on_with_it():
    """Device 0 fails at 1; device 1 lands its own part at 2 and the lost one at 4."""
    found = simulate(ONE, Cluster(devices=2, work=4.0, node=1, fail_at=((1.0, 0),), repair=100.0))
    assert found.seconds == pytest.approx(5.0)
    assert [event for event in found.events if event[0] == "take"] == [("take", 0, 1), ("take", 0, 0)]


@settings(max_examples=40)
@given(sizes(), st.lists(st.floats(0.01, 4), min_size=2, max_size=6))
def test_one_device_is_one_job_beside_the_trainer(size: Sizes, ratios):
    """Against the step-by-step reckoning of tests/test_loop.py, which knows nothing of this simulation."""
    made = [ratio * size.pass_time for ratio in ratios]
    durations = {(g, p): seconds / size.parts for g, seconds in enumerate(made) for p in range(size.parts)}
    schedule = Schedule(
        len(made), size.passes, size.option, size.parts, size.pass_time, size.per_part, 1, publishing=size.publishing
    )
    found = simulate(schedule, Cluster(durations=durations))
    assert found.waited == pytest.approx(slow_idle(size, made), abs=1e-9)


CLUSTERS = st.builds(
    Cluster,
    devices=st.integers(1, 30),
    work=st.floats(1, 1000),
    overhead=st.floats(0, 3),
    scatter=st.sampled_from([0.0, 0.3, 1.0]),
    slow=st.sampled_from([0.0, 0.2]),
    slowness=st.just(4.0),
    node=st.sampled_from([1, 4, 8]),
    failures=st.sampled_from([0.0, 20.0]),
    repair=st.floats(1, 50),
    store=st.builds(Store, st.sampled_from([0.0, 0.3]), st.sampled_from([math.inf, 50.0])),
    snapshot=st.sampled_from([0.0, 20.0]),
    data=st.sampled_from([0.0, 40.0]),
    loading=st.sampled_from([0.0, 2.0]),
)
SCHEDULES = st.builds(
    Schedule,
    generations=st.integers(1, 3),
    passes=st.just(2),
    lead=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    parts=st.integers(1, 12),
    pass_seconds=st.floats(1, 200),
    rows=st.sampled_from([1, 3]),
    rows_per_step=st.sampled_from([1, 2]),
)


@settings(max_examples=60)
@given(SCHEDULES, CLUSTERS, st.integers(0, 3))
def test_whatever_happens_time_adds_up_and_each_part_is_made_once(schedule, cluster, seed):
    found = simulate(schedule, cluster, seed)
    wanted = {(g, p) for g in range(schedule.generations) for p in range(schedule.parts)}
    assert found.lands == Counter(dict.fromkeys(wanted, 1))
    assert sum(found.spent.values()) == pytest.approx(cluster.devices * found.seconds)
    assert all(seconds >= -1e-9 for seconds in found.spent.values())
    assert found.seconds == pytest.approx(found.trained + sum(found.waited))  # publishing takes nothing here
    assert found.trained == pytest.approx(schedule.generations * schedule.passes * schedule.pass_seconds)
    takes = [event[1:] for event in found.events if event[0] == "take"]
    assert sorted(takes) == sorted(wanted)
    if not cluster.failures:
        assert found.lost_parts == 0
        assert found.spent.get(DOWN, 0.0) == found.spent.get(LOST, 0.0) == 0
    assert found == simulate(schedule, cluster, seed)


@settings(max_examples=30)
@given(SCHEDULES, CLUSTERS)
def test_one_device_is_busy_for_the_sum_of_its_parts(schedule, cluster):
    plain = replace(cluster, devices=1, scatter=0.0, slow=0.0, failures=0.0, store=Store(), loading=0.0)
    found = simulate(schedule, plain)
    assert found.spent[BUSY] == pytest.approx(schedule.generations * (plain.work + schedule.parts * plain.overhead))


@settings(max_examples=30)
@given(SCHEDULES, st.integers(1, 6), st.floats(1, 100))
def test_more_devices_never_take_longer(schedule, devices, work):
    fewer, more = (simulate(schedule, Cluster(devices=n, work=work)).seconds for n in (devices, 2 * devices))
    assert more <= fewer + 1e-6


def test_scatter_keeps_the_mean():
    drawn = [
        simulate(replace(ONE, parts=400, rows=1), Cluster(work=400.0, scatter=0.5), seed).spent[BUSY] for seed in range(5)
    ]
    assert sum(drawn) / 5 == pytest.approx(400.0, rel=0.05)


# -- a real run


@pytest.mark.parametrize("lead", [0.0, 1.0])
@pytest.mark.slow
def test_a_real_runs_events_give_its_schedule(make_tree, lead):
    """Its order, part for part and pass for pass; a busy machine's seconds are not compared."""
    config = load_config(make_tree(schedule={"lead": lead}, evaluation={"tasks": [], "kl_prompts": 0}))
    result = npd.distill(config)
    found = replay(result.run_dir, config)
    assert (found.schedule.generations, found.schedule.parts, found.cluster.devices) == (2, 3, 1)
    assert found.schedule.lead == lead
    assert found.cluster.durations.keys() == {(g, p) for g in range(2) for p in range(3)}
    outcome = simulate(found.schedule, found.cluster)
    real = [event for event in found.order if event[0] != "pass"]
    assert [event for event in real if event[0] == "publish"] == [e for e in outcome.events if e[0] == "publish"]
    assert [event[1:] for event in real if event[0] == "part"] == [e[1:] for e in outcome.events if e[0] == "take"]
    assert [e for e in found.order if e[0] == "pass"] == [e for e in outcome.events if e[0] == "pass"]
    if lead:
        ahead = found.order.index(("publish", 1, 0))
        assert found.order.index(("pass", 0, 0)) < ahead <= found.order.index(("pass", 0, 1))
        assert outcome.events.index(("publish", 1, 0)) < outcome.events.index(("pass", 0, 1))
    assert 0 < found.predict() < 100 * found.seconds
