"""A run on paper: devices, memory, rates, the schedule's seconds and the split."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_cli import config_file, npd, refused  # noqa: F401
from transformers import LlamaConfig, Qwen2Config

from benchmarks.simulation import Cluster, Schedule, simulate
from npd.config import load_config
from npd.costs import estimate, known_lengths
from npd.errors import UserError
from npd.forecast import Load, Model, Rates, Reader, generating_bytes, model_of, rates, training_bytes
from npd.hardware import DEVICES, EFFICIENCY, Hardware, named_devices
from npd.models import Activations
from npd.preflight import prepare
from npd.rollout import Pace
from npd.splits import Case, pass_seconds, times
from npd.train.memory import USABLE, StepMemory
from npd.trial import costs_on

TOY = Hardware("toy", flops=1e12, bandwidth=1e9, memory=1e9, link=1e8, source="nobody's")
MODEL = Model(
    parameters=1_200_000, matrices=1_000_000, head=200_000, layers=4, width=64, hidden=64, vocabulary=3125, cache=256
)
LOAD = Load(
    generations=2,
    passes=5,
    most_steps=math.inf,
    responses=1000,
    prompt=100.0,
    response=200.0,
    kept=0.5,
    parts=10,
    lead=1.0,
    step_tokens=10_000,
    micro_tokens=1000,
    at_once=50,
    longest=600,
    read_tokens=2048,
    free=True,
)
PACE = Pace(0.5, 1e-3, "")
STEP = StepMemory(states=19.2e6, loss=1e6, tokens=1000, activations=Activations(4000.0, 1e5, 4, 64), gathered=4.2e6)


# -- devices


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_device_is_found_by_its_name(device):
    assert device.source
    for text in (device.name, device.name.lower(), f"NVIDIA {device.name}"):
        assert named_devices(text) == (device, 1)
    for text in (f"8x{device.name}", f" 8 × {device.name} ", f"8*{device.name.replace(' ', '-')}"):
        assert named_devices(text) == (device, 8)


@pytest.mark.parametrize("text", ["TPU", "8xB9000", "", "x", "0xH100", "100001xH100", "H100x8", "8xx"])
def test_an_unknown_device_is_told_which_are_known(text):
    with pytest.raises(UserError, match="--on") as refusal:
        named_devices(text)
    if "100" not in text:
        assert all(device.name in str(refusal.value) for device in DEVICES)
    assert "\n" not in str(refusal.value)


def test_the_guide_names_every_device():
    guide = (Path(__file__).parent.parent / "docs/guide.md").read_text(encoding="utf-8")
    assert all(device.name in guide for device in DEVICES)


def test_a_device_of_this_machine_is_measured():
    here, count = named_devices("this")
    assert count == 1
    assert here.kind == "cpu"
    assert 1e8 < here.flops < 1e15
    assert 1e7 < here.bandwidth < 1e13
    assert 1e8 < here.memory < 1e15


# -- models and rates


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_a_models_shape_is_that_of_its_parameters(kind, tied):
    known: Any = kind(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    found = model_of(known)
    assert found.head == 64_000
    assert found.parameters - found.matrices == 64_000 * (1 if tied else 2)
    assert found.cache == 3 * 2 * 2 * 16  # layers, keys and values, heads, elements
    assert (found.width, found.layers, found.vocabulary) == (64, 3, 1000)


def test_rates_are_those_of_a_hand_reckoning():
    of = rates(LOAD, MODEL, Reader(MODEL, 2), [Reader(MODEL, 2)], TOY, PACE)
    share = EFFICIENCY["training"].accelerator
    # A sample of 300 tokens, 200 of them with the head, each seeing 150 on average; three times for the backward pass.
    forward = 300 * (2 * 1e6 + 4 * 150 * 64 * 4) + 200 * 2 * 2e5
    assert of.train == pytest.approx(3 * forward / 300 / (1e12 * share))
    # A step of 50 sequences reads weights, and the cache of 200 tokens each: 2.4 MB + 5.12 MB at half of 1 GB/s.
    step = (2.4e6 + 50 * 200 * 256 * 2) / 0.5e9
    assert step > 4e-3  # more than launching four layers
    prompts = 100 * (2 * 1e6 + 4 * 50 * 64 * 4) / 200 / (1e12 * EFFICIENCY["scoring"].accelerator)
    assert of.write == pytest.approx(step / 50 + prompts)
    free = 200 * (2 * 1e6 + 4 * 100 * 64 * 4) + 200 * 2 * 2e5  # teacher and student once more, without the prompt
    assert of.read == pytest.approx((forward + 2 * free) / 200 / (1e12 * EFFICIENCY["scoring"].accelerator))


def test_small_steps_of_decoding_take_their_launches():
    fast = replace(TOY, bandwidth=1e15)
    of = rates(replace(LOAD, at_once=1, prompt=1.0), MODEL, Reader(MODEL, 2), [], fast, PACE)
    assert of.write == pytest.approx(4e-3, rel=0.01)


# -- memory


@given(st.sampled_from([1, 2, 4, 7]), st.booleans(), st.sampled_from([0.0, 1e5]))
def test_training_memory_is_the_steps_own_divided(shards, checkpointing, adapters):
    held = 4.0 * MODEL.parameters
    step = STEP._replace(states=held + adapters + 3 * (adapters or held))
    found = training_bytes(step, held, adapters, shards=shards, checkpointing=checkpointing)
    states = found["weights"] + found["gradients"] + found["AdamW"]
    assert states == pytest.approx(step.states / shards)
    assert sum(found.values()) == pytest.approx(step.over(shards).total(checkpointing=checkpointing))
    assert found.get("gathered layers") == (step.gathered if shards > 1 else None)


def test_what_generates_holds_weights_cache_and_teacher():
    found = generating_bytes(
        LOAD, Reader(MODEL, 2), [Reader(MODEL._replace(parameters=9_000_000), 2)], own_copy=True, engine_devices=2
    )
    assert found["student"] == 2.4e6
    assert found["engine"] == 1.2e6
    assert found["teacher"] == 18e6
    assert found["key-value cache"] == 50 * 600 * 256 * 2 / 2
    assert "engine" not in generating_bytes(LOAD, Reader(MODEL, 2), [], own_copy=False, engine_devices=1)


# -- time


@given(
    parts=st.integers(1, 6),
    passes=st.integers(1, 4),
    lead=st.integers(0, 3),
    generations=st.integers(1, 5),
    generating=st.floats(0.01, 30),
    seconds=st.floats(0.1, 5),
)
def test_the_schedules_seconds_are_those_of_the_loop(parts, passes, lead, generations, generating, seconds):
    """The formula against npd's own loop and a clock, wherever a snapshot is taken between passes."""
    lead = min(lead, passes)
    assume(lead < passes or passes == 1)
    if lead == passes:
        lead = 0
    load = replace(LOAD, generations=generations, passes=passes, lead=float(lead), parts=parts)
    found = times(load, seconds, generating, turns=False)
    # An option half a step above means the same snapshot, however the shares of a pass are rounded.
    schedule = Schedule(generations, passes, lead + (0.01 if lead else 0.0), parts, seconds, rows=4, rows_per_step=1)
    real = simulate(schedule, Cluster(devices=1, work=generating))
    assert found.whole == pytest.approx(real.seconds)
    assert found.trained == pytest.approx(real.trained)


@given(st.floats(0.01, 30), st.floats(0.1, 5), st.integers(1, 200))
def test_turns_take_the_sum(generating, seconds, generations):
    load = replace(LOAD, generations=generations)
    found = times(load, seconds, generating, turns=True)
    assert found.whole == pytest.approx(generations * (generating + 5 * seconds))
    assert found.generated == pytest.approx(generations * generating)


@pytest.mark.parametrize(("most", "generations", "passes"), [(15, 1, 1), (150, 2, 10), (75, 1, 5), (90, 2, 6), (1e9, 2, 10)])
def test_a_limit_on_steps_ends_it_earlier(most, generations, passes):
    load = replace(LOAD, most_steps=most)
    assert load.pass_steps == 15  # 1,000 responses, half of them kept, 300 tokens each, 10,000 a step
    found = times(load, 7.0, 3.0, turns=True)
    assert found.trained == pytest.approx(7.0 * passes)
    assert found.generated == pytest.approx(3.0 * generations)


@given(st.integers(1, 40), st.sampled_from([1.0, 2.5, 100.0]))
def test_micro_batches_are_dealt_out_whole(devices, micro):
    load = replace(LOAD, micro_tokens=round(10_000 / micro))
    of, free = Rates(train=1e-3, write=1.0, read=1.0), replace(TOY, link=1e30)
    there = math.ceil(10_000 / load.micro_tokens)
    one = pass_seconds(load, of, 1e6, 1e6, free, devices=1, shards=1)
    assert one == pytest.approx(load.pass_tokens * 1e-3)
    found = pass_seconds(load, of, 1e6, 1e6, free, devices=devices, shards=1)
    assert found == pytest.approx(one * math.ceil(there / devices) / there)


def test_sharding_sends_more_than_summing_gradients():
    of, link = Rates(1e-3, 1.0, 1.0), 1e8 * EFFICIENCY["link"].accelerator
    alone = pass_seconds(LOAD, of, 4e6, 2e6, replace(TOY, link=1e30), devices=2, shards=1)
    summed = pass_seconds(LOAD, of, 4e6, 2e6, TOY, devices=2, shards=1)
    sharded = pass_seconds(LOAD, of, 4e6, 2e6, TOY, devices=2, shards=2)
    assert summed - alone == pytest.approx(15 * 2 * 4e6 * 0.5 / link)
    assert sharded - alone == pytest.approx(15 * 5 * (2 * 2e6 + 4e6) * 0.5 / link)


# -- splits


def case(**changes: Any) -> Case:
    options: dict[str, Any] = {
        "load": LOAD,
        "rates": rates(LOAD, MODEL, Reader(MODEL, 2), [Reader(MODEL, 2)], TOY, PACE),
        "student": MODEL,
        "writer": Reader(MODEL, 2),
        "teachers": (Reader(MODEL, 2),),
        "step": STEP,
        "held": 4.0 * MODEL.parameters,
        "adapters": 0.0,
        "device": TOY,
        "half": True,
        "own_copy": False,
    }
    return Case(**options | changes)


@given(st.integers(1, 30), st.floats(0, 5), st.floats(0.01, 100), st.sampled_from([1, 2]))
def test_the_best_split_is_the_least_of_all(devices, lead, ratio, size):
    slower = case().rates
    mine = case(
        load=replace(LOAD, lead=lead), rates=replace(slower, write=slower.write * ratio), engine_devices=min(size, devices)
    )
    best = mine.best(devices)
    every = [mine.split(turns, 0) for turns in range(1, devices + 1) if turns >= mine.engine_devices]
    if lead:
        every += [mine.split(t, (devices - t) // mine.engine_devices * mine.engine_devices) for t in range(1, devices)
                  if devices - t >= mine.engine_devices]  # fmt: skip
    assert best is not None
    assert best.times.whole == pytest.approx(min(split.times.whole for split in every))
    assert best.devices <= devices
    assert 0 <= best.wasted(devices) < 1
    assert best.fits(TOY)


def test_weights_are_shared_only_where_they_do_not_fit():
    large = MODEL._replace(parameters=100_000_000, matrices=90_000_000)
    held = 4.0 * large.parameters
    states = 4 * held
    mine = case(student=large, held=held, step=STEP._replace(states=states), checkpointing=False)
    assert states > USABLE * TOY.memory
    assert not mine.split(1, 4).fits(TOY)
    four = mine.split(4, 4)
    assert four.shards == 4
    assert four.fits(TOY)
    assert case().split(4, 4).shards == 1
    assert not replace(mine, shard="none").split(4, 4).fits(TOY)


def test_an_engine_that_shares_with_one_trainer_only_takes_turns_on_one_device():
    alone = case(load=replace(LOAD, lead=0.0), together=False).best(4)
    assert alone is not None
    assert (alone.train, alone.generate) == (1, 0)
    assert alone.wasted(4) > 0.7
    beside = case(together=False).best(4)
    assert beside is not None
    assert beside.devices == 4


def test_where_nothing_fits_the_nearest_is_said():
    best = case(held=1e12, step=STEP._replace(states=4e12)).best(8)
    assert best is not None
    assert not best.fits(TOY)
    assert best.shards == best.train == 8 - best.generate  # as many as there are share them


def test_activations_are_repeated_only_where_they_would_not_fit():
    wide = STEP._replace(activations=Activations(1.2e6, 0.0, 4, 64))
    assert STEP.total(checkpointing=False) < USABLE * TOY.memory < wide.total(checkpointing=False)
    assert not case().split(1, 1).checkpointing
    assert case(step=wide).split(1, 1).checkpointing
    assert case(step=wide).split(1, 1).fits(TOY)
    assert not case(step=wide, checkpointing=False).split(1, 1).fits(TOY)


# -- from a configuration


def test_a_case_is_the_configurations_own(make_tree):
    tree = make_tree(schedule={"lead": 1.0}, placement={"train": "cpu"})
    setup = prepare(load_config(tree), "distill")
    h100 = next(device for device in DEVICES if device.name == "H100")
    found = estimate(setup, h100, 4, response_tokens=7)
    load, plan = found.case.load, found.best
    assert (load.generations, load.passes, load.responses, load.parts) == (2, 2, 12, 3)
    assert load.response == 7
    assert load.prompt == pytest.approx(np.mean([len(ids) for ids in setup.prompts.table["prompt_ids"].to_pylist()]))  # type: ignore[union-attr]
    assert (load.step_tokens, load.micro_tokens) == (128, 64)
    assert found.case.writer.itemsize == 2
    assert load.free
    assert plan.devices <= 4
    assert found.others.keys() == {"vllm"}


def test_lengths_come_from_an_earlier_generation(make_tree):
    import npd as package

    tree = make_tree(training={"max_steps": 1})
    config = load_config(tree)
    assert known_lengths(config).response == 6
    assert known_lengths(config, 9).response == 9
    assert known_lengths(config, 900).response == 12  # no more than may be written
    package.distill(tree)
    found = known_lengths(config)
    assert "generation 0" in found.source
    assert 0 < found.response <= 12
    assert found.kept == 1.0


def test_a_trial_gives_every_rate(make_tree):
    from npd.observe.display import Display

    tree = make_tree(schedule={"generations": 4})
    setup = prepare(load_config(tree), "distill")
    found = costs_on(setup, None, measure=True, response_tokens=None, display=Display(quiet=True))
    assert found.measured is not None
    of = found.measured.rates
    assert min(of.train, of.write, of.read, of.fixed) > 0
    assert found.case.rates == of
    assert found.lengths.source == "the trial's"
    generations = 4 * (found.case.load.response_tokens * (of.write + of.read) + of.snapshot)
    trained = 8 * found.case.load.pass_tokens * of.train
    checkpoints = found.case.checkpoints * of.checkpoint
    assert found.best.times.whole == pytest.approx(generations + trained + checkpoints + of.fixed)
    with pytest.raises(UserError, match="says nothing of H100"):
        costs_on(setup, "H100", measure=True, response_tokens=None, display=Display(quiet=True))


def test_the_dry_run_says_it(npd, config_file, tmp_path):  # noqa: F811
    status, out, err = npd("distill", config_file(), "--dry-run", "--on", "8xH100", "--price", "2", "--schedule.lead", "1")
    assert (status, err) == (0, "")
    assert "On 8 × H100, on paper" in out
    for row in ("memory, training", "memory, generating", "split", "lead", "device-hours", "cost", "next to run out"):
        assert re.search(rf"│ {row} +│", out), row
    assert not (tmp_path / "run").exists()
    assert "--dry-run" in refused(npd("distill", config_file(), "--on", "8xH100"))
    assert "--on" in refused(npd("distill", config_file(), "--dry-run", "--price", "2"))
    assert "L40S" in refused(npd("distill", config_file(), "--dry-run", "--on", "8xH900"))
    status, out, err = npd(
        "sft", config_file(rollout={"max_new_tokens": 80}, packing={"length": 128}), "--dry-run", "--on", "2xL40S"
    )
    assert (status, err) == (0, "")
    assert "all 2 train" in out or "one device" in out
