"""The optimiser loop against hand computations: packing, batching and processes must not change what is learned."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import HANG, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import npd
from npd import models
from npd.config import TrainingConfig, load_config
from npd.observe.events import Events
from npd.records import StepLine
from npd.schedule import learning_rate
from npd.store import Store
from npd.train.batches import MicroBatch
from npd.train.loop import PassPlan
from npd.train.samples import Samples
from npd.train.trainer import StepFigures, Trainer, make_accelerator

VOCABULARY, TOP_K = 20, 4
KD_WEIGHT = 0.9


def make_samples(store: Store, count: int = 9, seed: int = 0) -> Samples:
    """Samples of very unequal lengths with a made-up teacher."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tokens = int(rng.integers(1, 14))
        logits = torch.tensor(rng.normal(size=(tokens, VOCABULARY)) * 2, dtype=torch.float32)
        best = logits.log_softmax(-1).topk(TOP_K)
        values = best.values.ravel().tolist()
        rows.append(
            {
                "sample_id": f"sample-{i}",
                "prompt_id": f"prompt-{i}",
                "source": "",
                "prompt_ids": rng.integers(4, VOCABULARY, int(rng.integers(1, 9))).tolist(),
                "response_ids": rng.integers(2, VOCABULARY, tokens).tolist(),
                "behavior_logprobs": (-rng.exponential(size=tokens)).tolist(),
                "verdict": "proximal",
                "topk_ids": best.indices.ravel().tolist(),
                "topk_logprobs": values,
            }
        )
    store.write_part(0, 0, pa.Table.from_pylist(rows))
    samples = Samples(store)
    samples.fetch(0, 0)
    samples.add(0, 0)
    return samples


def test_parts_with_float32_log_probabilities_are_read_as_they_are(tmp_path):
    """Parts written before float16 became the store's type."""
    make_samples(Store(tmp_path))
    path = Store(tmp_path).part(0, 0)
    table = pq.read_table(path)
    values = [[v * (1 + 1e-6) - 1e-6 for v in row] for row in table["topk_logprobs"].to_pylist()]  # no float16 is so
    at = table.column_names.index("topk_logprobs")
    pq.write_table(table.set_column(at, "topk_logprobs", pa.array(values, pa.list_(pa.float32()))), path)
    samples = Samples(Store(tmp_path))
    samples.fetch(0, 0)
    samples.add(0, 0)
    for i, row in enumerate(values):
        assert samples.topk([i])[1].ravel().tolist() == pytest.approx(row, rel=1e-7)


class Recorded(Trainer):
    """A trainer that keeps what its steps found."""

    passes = 0
    """Passes over the samples so far."""
    figures: list[StepFigures]


def make_trainer(tree: dict) -> Recorded:
    config = load_config(tree)
    store = Store(config.run_dir)
    accelerator = make_accelerator(config, store)
    store.open(config, "distill")
    student = models.load_model(config.student, trained=True)
    tokenizer = models.load_tokenizer(config.student)
    trainer = Recorded(config, store, accelerator, student, tokenizer, Events(store.path / "events.jsonl"))
    trainer.figures = []
    return trainer


def batch_of(trainer: Trainer, samples: Samples, rows: list[list[int]], length: int) -> MicroBatch:
    return MicroBatch.of(samples, rows, length, trainer.tokenizer.pad_token_id)


def plan_pass(trainer: Recorded, samples: Samples) -> list[list[list[int]]]:
    plan = PassPlan(trainer.config.packing.length, trainer.config.training.batch_tokens, seed=trainer.passes)
    return list(plan.steps(np.arange(len(samples)), samples.lengths, last=True))


def train_pass(trainer: Recorded, samples: Samples) -> None:
    """Train on all samples once, as the loop does."""
    passes = trainer.config.schedule.passes
    steps = plan_pass(trainer, samples)
    for n, rows in enumerate(steps, 1):
        tokens = int(samples.response_lengths[[i for row in rows for i in row]].sum())
        progress = (trainer.passes + n / len(steps)) / passes
        trainer.figures.append(trainer.step(samples, rows, tokens, len(trainer.figures) + 1, progress))
    trainer.passes += 1


def steps_of(run_dir: Path) -> list[StepLine]:
    return [line for line in Store(run_dir).read_metrics() if isinstance(line, StepLine)]


def dense_loss(model: torch.nn.Module, samples: Samples, i: int) -> torch.Tensor:
    """One sample alone, through the plain model and a dense softmax: the sum of METHOD's loss over its tokens."""
    prompt, response = samples.prompts[i].tolist(), samples.responses[i].tolist()
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    ce = -logp.gather(1, torch.tensor(response)[:, None]).sum()
    ids, teacher = (t.view(len(response), TOP_K) for t in samples.topk([i]))
    teacher = teacher.to(logp.dtype)
    kd = (teacher.exp() * (teacher - logp.gather(1, ids))).sum()
    return (1 - KD_WEIGHT) * ce + KD_WEIGHT * kd


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        error = (mine[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()
        assert error <= relative, f"{name}: relative error {error:.2g}"


# -- gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[3, 0], [8, 7, 6, 5], [1, 2, 4]]], ids=["one row", "three"])
def test_packed_rows_give_the_gradients_of_the_samples(make_tree, attention, rows):
    trainer = make_trainer(make_tree(student={"attention": attention}))
    assert trainer.base.config._attn_implementation == attention
    samples = make_samples(trainer.store)
    reference = copy.deepcopy(trainer.base)
    loss = 0.0
    for i in range(len(samples)):
        one = dense_loss(reference, samples, i)
        one.backward()
        loss += one.item()
    length = max(int(samples.lengths[row].sum()) for row in rows)
    batch = batch_of(trainer, samples, rows, length)
    out, _ = trainer._forward(batch)
    out.loss.backward()
    assert len(batch.behavior) == samples.response_lengths.sum()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_close(gradients(trainer.base), gradients(reference), 1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(make_tree):
    found = []
    for name, on in (("plain", False), ("checkpointed", True)):
        trainer = make_trainer(make_tree(name, training={"gradient_checkpointing": on}))
        assert trainer.base.is_gradient_checkpointing == on
        trainer.loss_model.train()
        samples = make_samples(trainer.store)
        trainer._forward(batch_of(trainer, samples, [[0, 1, 2, 3], [4, 5, 6, 7, 8]], 128))[0].loss.backward()
        found.append(gradients(trainer.base))
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_decoder_gives_the_same_gradients(make_tree, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    plain, compiled = (
        make_trainer(make_tree(name, training=options | {"compile": name == "compiled"})) for name in ("plain", "compiled")
    )
    assert plain.loss_model.decoder is None
    for rows in ([[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[3, 0], [8, 7, 6, 5], [1, 2, 4]], [[4], [2]]):
        found = []
        for trainer in (plain, compiled):
            trainer.loss_model.train()
            trainer.loss_model.zero_grad()
            samples = make_samples(trainer.store)
            length = max(int(samples.lengths[row].sum()) for row in rows)
            out, _ = trainer._forward(batch_of(trainer, samples, rows, length))
            out.loss.backward()
            found.append((gradients(trainer.base), out.label_logprobs))
        assert_close(found[1][0], found[0][0], 1e-5)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


# -- one optimiser step


def one_step(make_tree, name="run", *, seen=None, **training):
    """Train all samples in one step; `seen` collects the gradients that the optimiser was given."""
    options = {"batch_tokens": 10**6, "learning_rate": 1e-3, **training}
    trainer = make_trainer(make_tree(name, training=options))
    samples = make_samples(trainer.store)
    real = trainer.optimizer.step

    def step(*args, **kwargs):
        if seen is not None:
            seen.update(gradients(trainer.base))
        return real(*args, **kwargs)

    trainer.optimizer.step = step
    train_pass(trainer, samples)
    return trainer, samples


def hand_gradients(trainer: Trainer, samples: Samples) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss per response token and its gradients in float64, from the weights that the student starts with."""
    model = AutoModelForCausalLM.from_pretrained(trainer.config.student.model).double()
    losses = [dense_loss(model, samples, i) for i in range(len(samples))]
    loss = torch.stack(losses).sum() / int(samples.response_lengths.sum())
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 50])
def test_the_loss_is_the_mean_over_all_response_tokens_of_the_step(make_tree, micro_batch_rows):
    seen: dict[str, torch.Tensor] = {}
    trainer, samples = one_step(make_tree, seen=seen, max_grad_norm=1e9, micro_batch_rows=micro_batch_rows)
    assert len(trainer.figures) == 1
    found = trainer.figures[0]
    assert found.fill == 1  # samples lie end to end
    assert len(set(samples.response_lengths.tolist())) > 4  # unequal, or a mean of means would do as well
    loss, wanted = hand_gradients(trainer, samples)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert_close(seen, wanted, 1e-5)
    assert found.grad_norm == pytest.approx(math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values())), rel=1e-4)


def test_clipping(make_tree):
    seen: dict[str, torch.Tensor] = {}
    trainer, samples = one_step(make_tree, seen=seen, max_grad_norm=0.05)
    _, wanted = hand_gradients(trainer, samples)
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values()))
    assert norm > 0.1
    assert trainer.figures[0].grad_norm == pytest.approx(norm, rel=1e-4)  # as it was before clipping
    assert_close(seen, {name: g * (0.05 / norm) for name, g in wanted.items()}, 1e-4)


def test_weights_depend_neither_on_micro_batches_nor_on_packing(make_tree):
    found = []
    for name, length, micro in (("a", 64, 1), ("b", 64, 3), ("c", 46, 1), ("d", 128, 2)):
        tree = make_tree(name, packing={"length": length}, schedule={"generations": 1, "passes": 4},
                         training={"batch_tokens": 10**6, "micro_batch_rows": micro, "learning_rate": 1e-2})  # fmt: skip
        trainer = make_trainer(tree)
        samples = make_samples(trainer.store)
        for _ in range(4):
            train_pass(trainer, samples)
        assert len(trainer.figures) == 4
        found.append({k: v.clone() for k, v in trainer.base.state_dict().items()})
    start = AutoModelForCausalLM.from_pretrained(trainer.config.student.model).state_dict()
    for other in found[1:]:
        for name, value in found[0].items():
            moved = (value - start[name]).norm()
            assert (other[name] - value).norm() <= 1e-2 * moved, name
            assert moved > 0


def poison(samples: Samples, which: int) -> None:
    """Put a NaN into a sample's top-k, of which a part that holds one is not read at all."""
    sound = samples.topk

    def topk(samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logprobs = sound(samples)
        return ids, torch.full_like(logprobs, math.nan) if which in samples else logprobs

    samples.topk = topk  # type: ignore[method-assign]


def test_non_finite_loss_stops_before_the_weights_change(make_tree):
    tree = make_tree(training={"batch_tokens": 64})
    trainer = make_trainer(tree)
    samples = make_samples(trainer.store)
    poison(samples, 5)
    plan = plan_pass(trainer, samples)
    bad = next(i for i, rows in enumerate(plan) if any(5 in row for row in rows))
    before: dict[str, torch.Tensor] = {}
    real = trainer.step

    def step(*args):
        before.update({k: v.clone() for k, v in trainer.base.state_dict().items()})
        return real(*args)

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(npd.RunError) as caught:
        train_pass(trainer, samples)
    assert f"The loss of step {bad + 1} is not finite" in str(caught.value)
    for i in range(len(samples)):
        together = any(i in row for row in plan[bad])
        assert (f"sample-{i}" in str(caught.value)) == together
    assert len(trainer.figures) == bad
    after = trainer.base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in after.values())


# -- learning rate


def test_learning_rate_by_hand():
    config = TrainingConfig(learning_rate=2.0, final_learning_rate=0.5, warmup_ratio=0.2)
    for progress, wanted in [(0, 0), (0.1, 1.0), (0.2, 2.0), (0.6, 1.25), (1.0, 0.5), (1.5, 0.5)]:
        assert learning_rate(progress, config) == pytest.approx(wanted)
    assert learning_rate(0.4, config) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(0.0, TrainingConfig(learning_rate=2.0, warmup_ratio=0)) == 2.0


def test_the_optimiser_gets_the_schedule(make_tree):
    tree = make_tree(schedule={"generations": 1, "passes": 4},
                     training={"batch_tokens": 10**6, "learning_rate": 1e-2, "final_learning_rate": 1e-3,
                               "warmup_ratio": 0.5})  # fmt: skip
    trainer = make_trainer(tree)
    samples = make_samples(trainer.store)
    for wanted in (5e-3, 1e-2, 5.5e-3, 1e-3):
        train_pass(trainer, samples)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
        assert trainer.figures[-1].lr == pytest.approx(wanted)


def test_weight_decay_spares_vectors(make_tree):
    trainer = make_trainer(make_tree(training={"weight_decay": 0.1}))
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.base.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


# -- the near-policy monitor


def test_near_policy_kl_is_zero_while_the_weights_are_those_that_sampled(make_tree):
    tree = make_tree(training={"batch_tokens": 64, "learning_rate": 1e-2})
    npd.distill(tree)
    lines = steps_of(Path(tree["run_dir"]))
    for generation in (0, 1):
        mine = [line.near_policy_kl or 0.0 for line in lines if line.generation == generation]
        assert 0 <= mine[0] < 1e-6
        assert max(mine[1:]) > 1e-4
    assert not any(line.near_policy_kl_is_proxy for line in lines)


@pytest.mark.parametrize("rollout", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_near_policy_kl_is_marked_a_proxy_where_it_is_one(make_tree, rollout):
    tree = make_tree(rollout=rollout, training={"max_steps": 2})
    npd.distill(tree)
    lines = steps_of(Path(tree["run_dir"]))
    assert all(line.near_policy_kl_is_proxy for line in lines)
    assert lines[0].near_policy_kl is not None
    assert lines[0].near_policy_kl < 1e-6  # behaviour log-probabilities are kept at temperature 1 all the same


# -- planning


@settings(max_examples=80, deadline=None)
@given(
    pools=st.lists(st.lists(st.integers(1, 40), max_size=30), min_size=1, max_size=4),
    capacity=st.integers(40, 100),
    batch_tokens=st.integers(1, 600),
    seed=st.integers(0, 2**62),
)
def test_a_pass_takes_every_sample_once_in_full_steps(pools, capacity, batch_tokens, seed):
    lengths = np.array([length for pool in pools for length in pool], np.int64)
    ends = np.cumsum([len(pool) for pool in pools])

    def steps() -> list[list[list[int]]]:
        plan = PassPlan(capacity, batch_tokens, seed)
        found: list[list[list[int]]] = []
        for n, end in enumerate(ends):
            indices = np.arange(end - len(pools[n]), end)
            found += plan.steps(indices, lengths[:end], last=n == len(pools) - 1)
        return found

    planned = steps()
    assert planned == steps()
    rows = [row for step in planned for row in step]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))  # every sample once
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    per_step = max(1, batch_tokens // capacity)
    assert all(len(step) == per_step for step in planned[:-1])
    assert all(1 <= len(step) <= per_step for step in planned[-1:])


def test_a_pass_shuffles_by_its_seed():
    def plan_of(lengths: np.ndarray, seed: int) -> list[list[list[int]]]:
        return list(PassPlan(64, 128, seed).steps(np.arange(30), lengths, last=True))

    assert plan_of(np.arange(1, 31), 1) != plan_of(np.arange(1, 31), 2)
    # Samples of one length meet other samples, too.
    together = [{frozenset(row) for step in plan_of(np.full(30, 16), seed) for row in step} for seed in (1, 2)]
    assert together[0] != together[1]


# -- adapters


def test_lora_snapshots_hold_merged_weights(make_tree, tmp_path, student_dir):
    tree = make_tree(student={"lora": {"r": 4, "alpha": 16.0}}, training={"learning_rate": 3e-2})
    trainer = make_trainer(tree)
    trained = [name for name, p in trainer.student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    samples = make_samples(trainer.store)
    train_pass(trainer, samples)
    state = trainer.copy_policy()
    assert state is not None
    trainer.save_policy(tmp_path / "merged", state)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    start: Any = AutoModelForCausalLM.from_pretrained(student_dir)
    ids = torch.randint(4, VOCABULARY, (2, 11))
    trainer.student.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.student(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert (merged(ids).logits - start(ids).logits).abs().max() > 1e-2
    assert merged.state_dict().keys() == start.state_dict().keys()
    assert torch.equal(merged.get_input_embeddings().weight, start.get_input_embeddings().weight)
    # The base under the adapters is as it was: merging left nothing behind.
    base: Any = {k.replace(".base_layer", ""): v for k, v in trainer.base.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[name], value) for name, value in start.state_dict().items())


def test_a_lora_run_trains_resumes_and_loads(make_tree, monkeypatch):
    options = {
        "student": {"lora": {"r": 4, "dropout": 0.1}},
        "training": {"batch_tokens": 64, "gradient_checkpointing": True},
    }
    whole = npd.distill(make_tree("whole", **options))
    tree = make_tree("stopped", **options)
    real = Trainer.step

    def step(self, samples, rows, tokens, step, progress):
        if step == 6:
            raise KeyboardInterrupt
        return real(self, samples, rows, tokens, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            npd.distill(tree)
    again = npd.distill(tree)
    assert (again.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()
    snapshots = [AutoModelForCausalLM.from_pretrained(whole.run_dir / f"policy/v00000{v}") for v in (0, 1)]
    ids = torch.randint(4, VOCABULARY, (1, 9))
    assert not torch.equal(snapshots[0](ids).logits, snapshots[1](ids).logits)
    AutoModelForCausalLM.from_pretrained(whole.student)


# -- precision and processes


def test_bfloat16_after_float32_in_one_process(make_tree):
    exact = npd.distill(make_tree("exact", training={"max_steps": 2, "precision": "float32"}))
    rough = npd.distill(make_tree("rough", training={"max_steps": 2, "precision": "bfloat16"}))
    losses = []
    for result in (exact, rough):
        losses.append(steps_of(result.run_dir)[0].loss)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    weights = [load_file(result.student / "model.safetensors") for result in (exact, rough)]
    assert all(value.dtype == torch.float32 for value in weights[1].values())  # master weights stay exact


def test_two_processes_train_the_same_weights(make_tree, tmp_path):
    """An odd number of micro-batches a step, so that one process has nothing to do in the last turn."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{n}*{n % 7}+3="} for n in range(10, 19)])
    options = {
        "data": {"train": str(data)},
        "schedule": {"generations": 1, "passes": 2},
        "rollout": {"part_size": 3},
        "training": {"batch_tokens": 192, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 1},
    }
    one = npd.distill(make_tree("one", **options))
    tree = make_tree("two", **options)
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(tree))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "npd.cli", "distill", str(config)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=HANG)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    run_dir = Path(tree["run_dir"])
    lines = [steps_of(d) for d in (one.run_dir, run_dir)]
    assert [line.tokens for line in lines[1]] == [line.tokens for line in lines[0]]
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "ce", "kd", "grad_norm", "lr"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-4), name
        assert b.near_policy_kl == pytest.approx(a.near_policy_kl, rel=1e-3, abs=1e-6)
    for part in sorted((one.run_dir / "generations/g000").glob("part-*")):
        assert part.read_bytes() == (run_dir / "generations/g000" / part.name).read_bytes()
    mine, theirs = (load_file(d / "student/model.safetensors") for d in (run_dir, one.run_dir))
    start = load_file(Path(tree["student"]["model"]) / "model.safetensors")
    for name, value in theirs.items():
        assert (mine[name] - value).norm() <= 1e-2 * (value - start[name]).norm(), name
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    processes = {(event["role"], event["process"]) for event in events}
    assert sorted(role for role, _ in processes) == ["trainer", "trainer-1"]
