"""A run on paper: devices, memory, rates, the schedule's seconds and the split."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import assume, given
from hypothesis import strategies as st
from test_cli import config_file, npd, refused  # noqa: F401
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from benchmarks.simulation import Cluster, Schedule, simulate
from npd.config import load_config
from npd.costs import estimate, known_lengths
from npd.errors import UserError
from npd.forecast import Load, Model, Rates, Reader, generating_bytes, model_of, rates, training_bytes
from npd.hardware import DEVICES, EFFICIENCY, Hardware, named_devices
from npd.models import Activations, activations
from npd.models.loading import shape_of
from npd.plan import make_plan, plan_rows
from npd.preflight import Setup, prepare
from npd.rollout import Pace
from npd.splits import Case, pass_seconds, times
from npd.train.memory import USABLE, StepMemory, sharding
from npd.trial import costs_on, disturbed

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


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("h100-80gb", "H100", 1),
        ("NVIDIA H100 80GB HBM3", "H100", 1),
        ("2xH100-SXM5-80GB", "H100", 2),
        ("8xA100_80G", "A100-80GB", 8),
        ("A100-SXM4-40GB", "A100-40GB", 1),
        ("8x910b", "Ascend 910B", 8),
        ("RTX 4090 24GB", "4090", 1),
        ("l40s-48gb", "L40S", 1),
        ("H200 141GB", "H200", 1),
    ],
)
def test_devices_go_by_the_names_that_people_give_them(text, name, count):
    found, many = named_devices(text)
    assert (found.name, many) == (name, count)


@pytest.mark.parametrize("text", ["H100-40GB", "H100 PCIe", "L40", "A100-60GB", "GH200", "10B"])
def test_another_device_is_not_taken_for_a_known_one(text):
    with pytest.raises(UserError, match="not in the table"):
        named_devices(text)


def test_which_of_two_devices_is_asked():
    with pytest.raises(UserError, match="A100-80GB or A100-40GB") as refusal:
        named_devices("4xA100")
    assert "4xA100-80GB" in str(refusal.value)


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


QWEN: dict[str, Any] = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
QWENS = {
    "0.5B": Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                        num_key_value_heads=2, tie_word_embeddings=True, **QWEN),
    "8B": Qwen2Config(hidden_size=8192, intermediate_size=49_152, num_hidden_layers=5, num_attention_heads=64,
                      num_key_value_heads=8, tie_word_embeddings=False, **QWEN),
}  # fmt: skip


def test_of_experts_those_count_that_a_token_goes_through():
    known = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    found = model_of(known)
    each = 3 * 3 * 64 * 32  # layers, of an expert three matrices
    assert (found.experts, found.chosen) == (8 * each, 0.25)
    assert found.active == found.matrices - 6 * each
    assert found.forward(1, 0, 0) == 2 * found.active
    assert found.read(1) == found.parameters - 6 * each
    assert found.read(1e4) == pytest.approx(found.parameters)
    kept = activations(known, bfloat16=False)
    assert kept is not None
    # Each of two experts keeps a token's 64 numbers, 2 x 32 before and 2 x 32 in the gate and its product.
    dense = activations(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=32, num_hidden_layers=3,
                                    num_attention_heads=4, num_key_value_heads=2), bfloat16=False)  # fmt: skip
    assert dense is not None
    assert kept.token - dense.token >= 4 * 3 * (32 * 3)


def test_layers_with_a_window_see_and_layers_without_attention_keep_less():
    found = model_of(
        Gemma3TextConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16, sliding_window=32,
        )
    )  # fmt: skip
    assert (found.near, found.window, found.blind) == (5, 32, 0)
    assert found.seen(1000) == 1000 + 5 * 32
    assert found.seen(20) == 6 * 20
    assert MODEL.seen(100) == 400


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


@given(
    devices=st.integers(1, 400),
    more=st.integers(1, 300),
    lead=st.sampled_from([0.0, 1.0]),
    ratio=st.floats(0.01, 100),
    parts=st.integers(1, 300),
    link=st.sampled_from([1e6, 1e9]),
    size=st.sampled_from([1, 2]),
)
def test_more_devices_never_take_longer(devices, more, lead, ratio, parts, link, size):
    slower = case().rates
    mine = case(
        load=replace(LOAD, lead=lead, parts=parts, responses=20_000, step_tokens=300_000),
        rates=replace(slower, write=slower.write * ratio),
        device=replace(TOY, link=link),
        engine_devices=size,
    )
    few, many = mine.best(devices), mine.best(devices + more)
    if few is None:
        assert devices < size
        return
    assert many is not None
    assert many.times.whole <= few.times.whole * (1 + 1e-12)
    assert few.devices <= devices
    assert few.generate <= parts * size
    assert 0 <= few.wasted(devices) < 1


@given(st.integers(1, 12), st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.booleans())
def test_a_smaller_teacher_never_takes_longer(devices, less, lead, experts):
    large = MODEL._replace(parameters=90_000_000, matrices=80_000_000)
    small = large._replace(**{"experts": 70_000_000, "chosen": less} if experts else {"matrices": round(less * 80_000_000)})
    found = []
    for teacher in (small, large):
        teachers = (Reader(teacher, 2),)
        of = rates(LOAD, MODEL, Reader(MODEL, 2), teachers, TOY, PACE)
        best = case(load=replace(LOAD, lead=lead), teachers=teachers, rates=of).best(devices)
        assert best is not None
        found.append(best.times.whole)
    assert found[0] <= found[1] * (1 + 1e-12)


def test_idle_devices_are_said():
    """One part is one engine's, two micro-batches are two trainers': the others wait for them."""
    mine = case(load=replace(LOAD, lead=0.0, parts=1, passes=1, responses=10, step_tokens=100_000))
    best = mine.split(8, 0)
    assert mine.micro_batches == 2
    work = best.times.generated + 2 * best.times.trained
    assert best.wasted(8) == pytest.approx(1 - work / (8 * best.times.whole))


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
    assert not replace(mine, shard=False).split(4, 4).fits(TOY)


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


def planned(setup: Setup, student: str, teacher: str) -> Setup:
    """The same run of larger models."""
    tokens = setup.tokens
    teachers = {key: known._replace(config=QWENS[teacher]) for key, known in tokens.teachers.items()}
    return replace(setup, tokens=tokens._replace(student=QWENS[student], teachers=teachers))


@pytest.mark.parametrize(("shard", "lora"), [("auto", None), ("none", None), ("full", None), ("auto", {"r": 16})])
def test_what_a_device_holds_is_what_training_decides(make_tree, shard, lora):
    """Bytes by part against the student's own tensors, with the types that they have there and not here."""
    training = {"shard": shard, "gradient_checkpointing": True}
    tree = make_tree(training=training, student={"lora": lora}, placement={"train": "cpu"})
    setup = planned(prepare(load_config(tree), "distill"), "8B", "0.5B")
    h100 = next(device for device in DEVICES if device.name == "H100")
    found = estimate(setup, h100, 8, response_tokens=7)
    best = found.best
    wanted = sharding(setup.config, QWENS["8B"], 8, int(h100.memory), bfloat16=True, step=found.case.step).full
    assert best.shards == (best.train if wanted else 1)
    assert wanted == (shard == "full" or (shard == "auto" and lora is None))
    parts = best.memory.get("training") or best.memory["each"]
    count = sum(p.numel() for p in shape_of(QWENS["8B"]).parameters())
    learns = found.case.adapters or 4.0 * count
    base = 2.0 * count + found.case.adapters if lora else 4.0 * count
    assert parts["weights"] == pytest.approx(base / best.shards)
    assert parts["gradients"] == pytest.approx(learns / best.shards)
    assert parts["AdamW"] == pytest.approx(2 * learns / best.shards)
    assert best.fits(h100) == (shard != "none" or lora is not None)


def test_references_and_every_teacher_count(make_tree, tmp_path):
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1), "source": "ab"[n % 2]} for n in range(12)]
    data = {"train": str(write_jsonl(tmp_path / "mixed.jsonl", rows))}
    tree = make_tree(data=data, schedule={"references": 0.5})
    model = tree["teacher"]["model"]
    tree["teachers"] = {"a": {"model": model}, "b": {"model": model, "dtype": "float32"}}
    setup = prepare(load_config(tree), "distill")
    h100 = next(device for device in DEVICES if device.name == "H100")
    found = estimate(setup, h100, 1, response_tokens=7).case
    assert found.load.pass_tokens == pytest.approx(2 * 12 * (found.load.prompt + 7))
    assert found.load.references > 0
    assert sorted((t.itemsize, t.share) for t in found.teachers) == [(2, 0.5), (4, 0.5)]
    held = found.split(1, 0).memory["generating"]["teacher"]
    assert held == found.teachers[0].model.parameters * 6


def test_other_devices_need_not_be_here(make_tree):
    """Devices that placement names, engines and their sizes are the other machine's."""
    tree = make_tree(
        placement={"train": "cuda:0", "rollout": ["cuda:1", "cuda:2"]},
        rollout={"engine": "vllm", "vllm": {"tensor_parallel_size": 2}},
        schedule={"lead": 1.0},
    )
    config = load_config(tree)
    with pytest.raises(UserError):
        prepare(config, "distill")
    setup = prepare(config, "distill", on_paper=True)
    h100 = next(device for device in DEVICES if device.name == "H100")
    found = estimate(setup, h100, 5, response_tokens=7)
    assert found.case.engine_devices == 2
    assert (found.best.train, found.best.generate) in [(1, 4), (1, 2)]
    assert any("placement" in note for note in found.notes)
    with pytest.raises(UserError, match="takes 2 devices for an engine"):
        estimate(setup, h100, 2, response_tokens=7)
    assert all("cuda" not in row[1] for row in plan_rows(setup, make_plan(setup)))


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
    assert disturbed(1.0) == disturbed(1.9) == ""
    assert "65%" in disturbed(0.65)
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
    for wrong in ("nan", "-1", "inf"):
        for option in ("--price", "--response-tokens"):
            status, _, err = npd("distill", config_file(), "--dry-run", "--on", "H100", option, wrong)
            assert status == 2, (option, wrong)
            assert option in err
    assert "L40S" in refused(npd("distill", config_file(), "--dry-run", "--on", "8xH900"))
    status, out, err = npd(
        "sft", config_file(rollout={"max_new_tokens": 80}, packing={"length": 128}), "--dry-run", "--on", "2xL40S"
    )
    assert (status, err) == (0, "")
    assert "all 2 train" in out or "one device" in out
