"""What a training step does to a device, seen without one: the meta device plays the GPU, and every operation is counted.

A step may wait for its device once, and copies to it only what a micro-batch is given.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from test_trainer import make_samples
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npd import models
from npd.config import load_config
from npd.models import devices
from npd.observe.events import Events
from npd.placement import WorkerDevices, resolve_placement
from npd.scoring import Prefill
from npd.store import Store
from npd.train.batches import AHEAD, MicroBatch, micro_batches
from npd.train.memory import StepMemory
from npd.train.publisher import snapshot_dtype
from npd.train.trainer import Trainer, make_accelerator

META = torch.device("meta")
READ = ("_local_scalar_dense", "is_nonzero", "equal")  # what asks for a value
SHAPED = ("nonzero", "masked_select", "_unique2", "repeat_interleave")  # whose shape hangs on values


def site() -> str:
    """Whose code asks for the operation."""
    hidden = ("/torch/", __file__)
    frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in hidden)]
    return f"{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno}"


class Device(TorchDispatchMode):
    """Counts what makes the host wait, copies to the device, and operations on tensors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if "meta" in kinds and (name in READ or name in SHAPED):
            self.waits[f"{name}, {site()}"] += 1
            if name in READ:
                return 0.0
        elif name == "_to_copy" and kinds == {"meta"} and target == "cpu":
            self.waits[f"{name}, {site()}"] += 1
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        elif name == "_to_copy" and kinds == {"cpu"} and target == "meta":
            self.copies["waited for" if not kwargs.get("non_blocking") else "in the stream"] += 1
        elif len(kinds) > 1:
            if name == "copy_" and tensors[0].device.type == "cpu":
                self.waits[f"{name}, {site()}"] += 1
                return tensors[0].zero_()
            if any(tensor.ndim for tensor in tensors if tensor.device.type == "cpu"):  # numbers may come from anywhere
                self.mixed[name] += 1
        return func(*args, **kwargs)


@pytest.fixture
def on_device(make_tree, monkeypatch):
    """A trainer whose device is the one that is watched."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False if kind == ("meta",) else enabled(*kind))

    def make(**options):
        config = load_config(make_tree(**options))
        store = Store(config.run_dir)
        accelerator = make_accelerator(config, store)
        for state in (PartialState, AcceleratorState):
            monkeypatch.setitem(state._shared_state, "device", META)
        store.open(config, "distill")
        student = models.load_model(config.student, trained=True).to(META)  # type: ignore[arg-type]
        events = Events(store.path / "events.jsonl")
        return Trainer(config, store, accelerator, student, models.load_tokenizer(config.student), events)

    return make


@pytest.fixture
def on_cpu(make_tree, tmp_path):
    """A trainer as it is."""

    def make(run_dir="run", **options):
        config = load_config(make_tree(run_dir, **options))
        store = Store(config.run_dir)
        accelerator = make_accelerator(config, store)
        store.open(config, "distill")
        student = models.load_model(config.student, trained=True)
        events = Events(store.path / "events.jsonl")
        return Trainer(config, store, accelerator, student, models.load_tokenizer(config.student), events)

    return make


def watched_step(trainer: Trainer, count: int) -> tuple[Device, int]:
    """A step on so many samples, and its micro-batches."""
    samples = make_samples(trainer.store, count)
    turns, forward = 0, trainer._forward

    def counted(*args):
        nonlocal turns
        turns += 1
        return forward(*args)

    trainer._forward = counted  # type: ignore[method-assign]
    with Device() as device:
        trainer.step(samples, [[*range(count)]], int(samples.response_lengths.sum()), 1, 0.5)
    return device, turns


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("mass", ["raw", "tail"])
def test_a_step_waits_once_and_copies_what_it_reads(on_device, mass, dropout):
    options = {"packing": {"length": 64}, "loss": {"top_k_mass": mass}, "training": {"dropout": dropout}}
    found = {}
    for count in (3, 30):
        device, turns = watched_step(on_device(**options), count)
        # With padded rows transformers looks, in each forward pass, whether they are packed.
        mine = {site: n for site, n in device.waits.items() if "masking_utils" not in site}
        assert sum(mine.values()) == 1, device.waits
        assert not device.mixed
        assert device.copies == {"in the stream": 9 * turns}  # MicroBatch's tensors
        found[count] = turns
    assert found[30] > found[3]


def test_the_watch_sees_what_it_is_there_for():
    with Device() as device:
        there = torch.ones(3).to(META)
        there.sum().item()
        there.cpu()
        torch.zeros(3).copy_(there)
        with pytest.raises(RuntimeError):
            _ = there + torch.ones(3)
    assert [what.split(",")[0] for what in device.waits] == ["_local_scalar_dense", "_to_copy", "copy_"]
    assert device.copies == {"waited for": 1}
    assert device.mixed == {"add": 1}


# -- what is made for a GPU, on a CPU


@pytest.mark.parametrize("count", [1, AHEAD, AHEAD + 1, 9])
def test_a_thread_lays_out_the_same_micro_batches(tmp_path, count):
    samples = make_samples(Store(tmp_path))
    turns = [([[i]], int(samples.lengths[i])) for i in range(count)]
    plain, threaded = (
        list(micro_batches(samples, turns, 0, torch.device("cpu"), threaded=threaded)) for threaded in (False, True)
    )
    assert len(plain) == len(threaded) == count
    for mine, theirs in zip(threaded, plain, strict=True):
        for a, b in zip(tree_leaves(tuple(mine)), tree_leaves(tuple(theirs)), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_what_fails_in_the_thread_fails_in_its_turn(tmp_path):
    samples = make_samples(Store(tmp_path), 3)
    turns = [([[0]], 64), ([[1, 99]], 64), ([[2]], 64)]
    batches = micro_batches(samples, turns, 0, torch.device("cpu"), threaded=True)
    assert isinstance(next(batches), MicroBatch)
    with pytest.raises(IndexError):
        next(batches)


def test_tensors_move_in_place_and_shared_ones_stay_shared():
    layer = torch.nn.Linear(3, 3)
    tied = torch.nn.Linear(3, 3)
    tied.weight = layer.weight
    before = layer.weight.clone()
    models.move(models.tensors_of(torch.nn.Sequential(layer, tied)), "cpu")
    assert tied.weight is layer.weight
    assert torch.equal(before, layer.weight)


def test_snapshots_have_the_type_in_which_they_are_read(on_cpu, monkeypatch):
    """Where every engine of this machine rounds the weights, they are rounded before they are written; tied ones stay one."""
    trainer = on_cpu(student={"dtype": "bfloat16"})
    placed = resolve_placement(trainer.config)
    assert snapshot_dtype(trainer.config, placed) == torch.bfloat16
    assert snapshot_dtype(trainer.config, replace(placed, producer="external", workers=[])) is None
    auto = on_cpu(run_dir="auto").config
    assert snapshot_dtype(auto, placed) is None
    monkeypatch.setattr(devices, "fast_bfloat16", lambda on=None: on == "cuda:1")
    both = [WorkerDevices("cuda:1", "cpu"), WorkerDevices("cpu", "cpu")]
    assert snapshot_dtype(auto, replace(placed, workers=both[:1])) == torch.bfloat16
    assert snapshot_dtype(auto, replace(placed, workers=both)) is None

    exact, rounded = trainer.copy_policy(), trainer.copy_policy(torch.bfloat16)
    assert exact is not None
    assert rounded is not None
    for name, value in exact.weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(rounded.weights[name], value.bfloat16())
    path = trainer.store.path / "snapshot"
    trainer.save_policy(path, rounded, torch.bfloat16)
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    whole = trainer.store.path / "whole"
    trainer.save_policy(whole, exact)
    read, once = (models.load_model(trainer.config.student.model_copy(update={"model": str(p)})) for p in (path, whole))
    ids = torch.arange(4, 10)[None]
    assert read.dtype == once.dtype == torch.bfloat16
    assert torch.equal(read(ids).logits, once(ids).logits)


def test_a_parked_trainer_goes_on_as_if_it_had_not_been(on_cpu):
    weights = []
    for name, parks in (("stays", False), ("parks", True)):
        trainer = on_cpu(run_dir=name)
        samples = make_samples(trainer.store)
        tokens = int(samples.response_lengths.sum())
        for step in (1, 2):
            trainer.step(samples, [[*range(len(samples))]], tokens, step, 0.5)
            if parks:
                with trainer.parked():
                    pass
        weights.append({name: value.clone() for name, value in trainer.base.state_dict().items()})
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)


# -- memory


@pytest.mark.parametrize("bfloat16", [False, True])
def test_activations_are_counted_as_they_are_kept(on_cpu, bfloat16):
    """Against a forward pass with values, of another length than those that were counted."""
    model, tokens = on_cpu().base, 700
    known = models.activations(model.config, bfloat16=bfloat16)
    assert known is not None
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
    model.train()
    model.config._attn_implementation = "sdpa"
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model.model(input_ids=ids, position_ids=positions, use_cache=False)
    wanted = sum(storage.nbytes() for storage in kept.values())
    assert known.fixed + tokens * known.token == pytest.approx(wanted, rel=0.02)


def test_checkpointing_follows_from_what_a_device_holds():
    found = models.Activations(token=1000.0, fixed=10.0, layers=10, width=8)
    memory = StepMemory(states=1e6, loss=1e5, tokens=100, activations=found)
    plain, again = (memory.total(checkpointing=on) for on in (False, True))
    assert plain == 1e6 + 1e5 + 10 + 100 * (1000 + 100)
    assert again == 1e6 + 1e5 + 10 + 100 * (4 * 8 * 10 + 100 + 100)
    assert memory.needs_checkpointing(plain)  # some is left to others
    assert not memory.needs_checkpointing(1.1 * plain)
    assert memory._replace(activations=None).needs_checkpointing(1e15)  # what is not known may be too much


@pytest.mark.parametrize("asked", [True, False, "auto"])
def test_on_a_cpu_auto_is_off(on_cpu, asked):
    trainer = on_cpu(training={"gradient_checkpointing": asked})
    assert trainer.base.is_gradient_checkpointing == (asked is True)


def test_reading_under_autocast_rounds_products_alone(on_cpu):
    trainer = on_cpu()
    vocabulary = models.shared_vocabulary(trainer.tokenizer, trainer.base.config, stop_ids=[])
    contexts, responses = [[4, 5, 6]] * 3, [[7, 8, 9], [5], [4, 4]]
    exact, rounded = (
        np.concatenate([r.logprobs for r in Prefill(trainer.base, vocabulary, 0, 64, dtype)(contexts, responses)])
        for dtype in (None, torch.bfloat16)
    )
    assert 0 < np.abs(exact - rounded).max() < 0.1
