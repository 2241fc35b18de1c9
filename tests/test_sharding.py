"""A student that is divided among processes learns what one process would: gradients, weights, snapshots, checkpoints."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model, write_jsonl
from safetensors.torch import load_file
from test_trainer import make_samples, steps_of
from together import together
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import npd
from npd import models
from npd.config import Config, load_config
from npd.errors import UserError
from npd.hardware import GIB
from npd.models import copy_state
from npd.models.loading import shape_of
from npd.models.memory import COUNTED
from npd.models.saving import place_of
from npd.observe.events import Events
from npd.plan import Plan, make_plan, plan_rows
from npd.preflight import DISTILL, prepare
from npd.records import EvaluationLine
from npd.store import Store
from npd.train.memory import USABLE, StepMemory, sharding, step_memory
from npd.train.samples import Samples
from npd.train.sharding import SHARDS
from npd.train.trainer import StepFigures, Trainer, make_accelerator

EXACT = 1e-10
"""Of float64, in which a step is computed here: rounding, and what AdamW makes of it, is 1e-14; a fault is none of both."""
RELATIVE = 1e-6
"""Of float32."""
STEPS = 3
LORA = {"r": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sharding")
    rows = [{"prompt": f"{n}*{n % 7}+3="} for n in range(10, 19)]
    return {
        "data": str(write_jsonl(folder / "data.jsonl", rows)),
        "tied": str(save_model(folder / "tied", seed=3)),
        "untied": str(save_model(folder / "untied", seed=3, tied=False)),
        # A vocabulary that no number of processes shares evenly, and a width of which the last of four gets nothing.
        "odd": str(save_model(folder / "odd", seed=3, hidden=6, vocabulary=23, head_dim=4)),
        "teacher": str(save_model(folder / "teacher", seed=1)),
    }


@pytest.fixture(autouse=True, scope="module")
def exact_norms() -> Iterator[None]:
    """transformers normalises in float32, whatever it is given; here float64 stays so."""
    real = LlamaRMSNorm.forward

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return real(self, x)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm)
        yield


@pytest.fixture
def tree_of(files, tmp_path):
    """A configuration; sections as for npd itself."""

    def make(name: str, *, head: str = "tied", shard: str = "full", **sections: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "run_dir": str(tmp_path / name),
            "student": {"model": files[head]},
            "teacher": {"model": files["teacher"]},
            "data": {"train": files["data"], "max_prompt_tokens": 16},
            "rollout": {"max_new_tokens": 16, "part_size": 3},
            "selection": {"rule": "none"},
            "packing": {"length": 32},
            "schedule": {"generations": 1, "passes": 2, "lead": 0.0},
            "training": {"batch_tokens": 64, "learning_rate": 1e-3, "shard": shard},
            "checkpoint": {"every_steps": 1, "keep": 9},
            "tracking": {"trackers": [], "report": False},
        }
        for section, options in sections.items():
            tree[section] = tree.get(section, {}) | options
        return tree

    return make


# -- what each process does


def trainer_of(tree: dict[str, Any], *, exact: bool = False) -> Trainer:
    """`exact`: in float64, but for what its configuration says is smaller."""
    config = load_config(tree)
    store = Store(config.run_dir)
    accelerator = make_accelerator(config, store)
    if accelerator.is_main_process:
        store.open(config, "distill")
    accelerator.wait_for_everyone()
    student, tokenizer = models.load_model(config.student, trained=True), models.load_tokenizer(config.student)
    if exact and (config.student.dtype, config.training.precision) == ("auto", "auto"):
        student.double()
    return Trainer(config, store, accelerator, student, tokenizer, Events(store.path / "events.jsonl"))


def samples_of(trainer: Trainer) -> Samples:
    if trainer.accelerator.is_main_process:
        make_samples(trainer.store)
    trainer.accelerator.wait_for_everyone()
    samples = Samples(trainer.store)
    samples.add(0, 0)
    return samples


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Learned:
    """What steps have found: figures, the gradients before clipping, and at the end the weights."""

    def __init__(self) -> None:
        self.figures: list[StepFigures] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: dict[str, Tensor] = {}
        """As they are saved: adapters merged."""
        self.adapter: dict[str, Tensor] | None = None
        self.began: dict[str, Tensor] = {}
        self.ended: dict[str, Tensor] = {}
        """As they are trained."""
        self.kind = ""
        self.shares: list[int] = []
        """Elements of each weight in this process."""

    @property
    def held(self) -> int:
        return sum(self.shares)


def learn(
    tree: dict[str, Any], steps: int = STEPS, *, snapshot: str | None = None, keep: bool = False, exact: bool = True
) -> Learned:
    """Train on three micro-batches a step, from the newest checkpoint on if there is one; `keep`: write one after each."""
    trainer, found = trainer_of(tree, exact=exact), Learned()
    samples = samples_of(trainer)
    found.kind = type(trainer.lying).__name__
    found.shares = [(p.to_local() if isinstance(p, DTensor) else p).numel() for p in trainer.student.parameters()]
    found.began = {name: whole(p) for name, p in trainer.student.named_parameters()}
    norm = trainer.lying.norm

    def seen(most: float) -> Tensor:
        named = trainer.student.named_parameters()
        found.gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})
        return norm(most)

    trainer.lying.norm = seen  # type: ignore[method-assign]
    done = trainer.resume(lambda facts: facts["step"]) or 0
    rows = [[0, 3], [1, 2], [4, 5, 6], [7, 8]]
    tokens = int(samples.response_lengths.sum())
    for step in range(done + 1, steps + 1):
        found.figures.append(trainer.step(samples, rows, tokens, step, step / 10))
        if keep:
            trainer.save_checkpoint(step, {"step": step, "generation": 0})
    found.ended = {name: whole(p) for name, p in trainer.student.named_parameters()}
    state = trainer.copy_policy()
    if state is not None:
        found.weights, found.adapter = dict(state.weights), state.adapter  # transformers takes tied ones out as it saves
        if snapshot is not None:
            trainer.save_policy(Path(snapshot), state)
    trainer.accelerator.wait_for_everyone()
    return found


def apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative difference of the worst tensor."""
    assert mine.keys() == theirs.keys()
    norms = [(float((mine[n].double() - theirs[n].double()).norm()), float(theirs[n].double().norm())) for n in mine]
    return max(difference / size if size else difference for difference, size in norms)


def whole_apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative difference of all tensors as one."""
    names = sorted(theirs)
    return apart(*({"all": torch.cat([each[name].flatten() for name in names])} for each in (mine, theirs)))


def assert_alike(mine: Learned, theirs: Learned, relative: float = EXACT) -> None:
    for a, b in zip(mine.gradients, theirs.gradients, strict=True):
        assert apart(a, b) <= 5 * relative
    for ours, other in zip(mine.figures, theirs.figures, strict=True):
        for name in ("loss", "ce", "kd", "kl", "grad_norm", "lr", "fill", "kl_tokens"):
            assert getattr(ours, name) == pytest.approx(getattr(other, name), rel=relative, abs=1e-7), name
    assert apart(mine.ended, theirs.ended) <= relative


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tied": (2, {}),
    "lora on an untied one, checkpointing": (
        2, {"head": "untied", "student": {"lora": LORA}, "training": {"gradient_checkpointing": True}}
    ),
    "untied": (3, {"head": "untied"}),
    "checkpointing": (3, {"training": {"gradient_checkpointing": True}}),
    "lora": (3, {"student": {"lora": LORA}}),
    "six wide, clipped and decaying": (4, {"head": "odd", "training": {"max_grad_norm": 1e-3, "weight_decay": 0.5}}),
    "six wide, lora of rank 1, one micro-batch": (4, {
        "head": "odd", "student": {"lora": LORA | {"r": 1}},
        "training": {"micro_batch_rows": 9, "max_grad_norm": float("inf")},
    }),
}  # fmt: skip
"""So many processes, and what they train."""


def learn_each(trees: list[dict[str, Any]], **options: Any) -> list[Learned]:
    return [learn(tree, snapshot=tree["run_dir"] + "-snapshot", **options) for tree in trees]


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_processes_learn_what_one_does(tree_of, world):
    """Some micro-batches have no other process to go to, some processes no share of a tensor; adapters are merged where the
    student is gathered."""
    cases = {name: case for name, (processes, case) in CASES.items() if processes == world}
    trees = [tree_of(name, **case) for name, case in cases.items()]
    found = together(world, learn_each, trees)
    for name, tree, mine, *others in zip(cases, trees, *found, strict=True):
        plain = tree_of(f"{name}, alone", shard="none", **cases[name])
        (one,) = learn_each([plain])
        assert one.kind == "Whole"
        assert {each.kind for each in (mine, *others)} == {"Sharded"}
        assert sum(each.held for each in (mine, *others)) == one.held
        if "six wide" in name:
            assert min(others[-1].shares) == 0  # of six rows the others have two each
        assert not any(other.weights for other in others)
        assert_alike(mine, one)
        merged = RELATIVE if "lora" in name else EXACT  # in float32, where there are adapters
        assert apart(mine.weights, one.weights) <= merged
        snapshots = [load_file(each["run_dir"] + "-snapshot/model.safetensors") for each in (tree, plain)]
        assert apart(*snapshots) <= merged
        assert (mine.adapter is None) == (one.adapter is None) == ("lora" not in name)
        if mine.adapter is not None and one.adapter is not None:
            assert apart(mine.adapter, one.adapter) <= EXACT


def optimised(found: Learned, config: Config) -> dict[str, Tensor]:
    """What AdamW makes, in float64, of the weights that were there and the gradients that were found."""
    training = config.training
    weights = {name: nn.Parameter(found.began[name].double()) for name in found.gradients[0]}
    wide = [p for p in weights.values() if p.ndim >= 2]
    narrow = [p for p in weights.values() if p.ndim < 2]
    groups = [{"params": wide, "weight_decay": training.weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    for gradients, figures in zip(found.gradients, found.figures, strict=True):
        norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
        for name, weight in weights.items():
            weight.grad = gradients[name].double() * min(1.0, training.max_grad_norm / (float(norm) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = figures.lr
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def test_float32_rounds_and_no_more(tree_of):
    """Over three processes, which round most: the loss is divided by what is no power of two.

    Gradients are compared as a whole, and weights with what AdamW makes of these very gradients. Not with those of one
    process: AdamW divides a gradient by its own size, so an element whose gradient is next to nothing for once (terms that
    cancel; 1e-5 of the largest, near AdamW's epsilon) moves by a share of the rate that its rounding decides. In an adapter's
    B, which is all such moves, one element of 128 is then 7e-6 of the tensor; in float64 the same one is 8e-15 of it.
    """
    options: list[dict[str, Any]] = [{}, {"student": {"lora": LORA}}]
    trees = [tree_of(f"three-{number}", **each) for number, each in enumerate(options)]
    found = together(3, partial(learn_each, exact=False), trees)[0]
    for mine, tree, each in zip(found, trees, options, strict=True):
        one = learn(tree_of(f"{tree['run_dir']}-alone", shard="none", **each), exact=False)
        # The first ones are of the same weights.
        assert whole_apart(mine.gradients[0], one.gradients[0]) <= RELATIVE
        for learned in (mine, one):
            assert all(gradient.dtype == torch.float32 for gradient in learned.gradients[0].values())
            ended = {name: learned.ended[name] for name in learned.gradients[0]}
            assert apart(ended, optimised(learned, load_config(tree))) <= RELATIVE
        assert apart(mine.weights, one.weights) <= RELATIVE


def test_what_samples_do_not_reach(tree_of, monkeypatch):
    """A layer's products that only some micro-batches go through, as experts may be: the others give them a gradient of zero,
    also where no sample of a step reaches them. Whole copies look for that only where the student's code is foreign."""

    real, reached = LlamaMLP.forward, True
    load = models.load_model

    def routed(self: LlamaMLP, x: Tensor) -> Tensor:
        return real(self, x) if x.shape[1] % 2 == 0 and reached else x / 2

    def each(trees: list[dict[str, Any]]) -> list[Learned]:
        nonlocal reached
        reached = True
        first = learn_each(trees[:1])
        reached = False
        return first + learn_each(trees[1:])

    def loaded(*args: Any, **options: Any) -> Any:
        """The layer is as others where the model is looked at."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", real)
            return load(*args, **options)

    monkeypatch.setattr(models, "load_model", loaded)
    monkeypatch.setattr(LlamaMLP, "forward", routed)

    def trees(name: str, shard: str) -> list[dict[str, Any]]:
        student, training = {"trust_remote_code": True}, {"weight_decay": 0.5}
        return [tree_of(f"{name}-{n}", shard=shard, student=student, training=training) for n in range(2)]

    alone = each(trees("one", "none"))
    some, none = ({n for n, g in one.gradients[0].items() if not g.any()} for one in alone)
    assert not some
    assert {name.split(".")[-2] for name in none} == {"gate_proj", "up_proj", "down_proj"}
    for shard in ("full", "none"):
        for mine, one in zip(together(2, each, trees(shard, shard))[0], alone, strict=True):
            assert_alike(mine, one)


@pytest.mark.slow
def test_each_process_draws_its_own_noise(tree_of):
    """As with whole copies; and each takes part in the pass without noise, whoever's samples it has. Of weights in bfloat16
    gradients are rounded as copies round them, which is otherwise than in one process where the loss is divided by three."""
    students = {"noisy": {"lora": LORA | {"dropout": 0.5}}, "half": {"lora": LORA, "dtype": "bfloat16"}}
    sharded, whole = (
        together(
            3, learn_each, [tree_of(f"{name}-{shard}", shard=shard, student=student) for name, student in students.items()]
        )[0]
        for shard in ("full", "none")
    )
    for mine, theirs, relative in zip(sharded, whole, (EXACT, RELATIVE), strict=True):
        assert (mine.kind, theirs.kind) == ("Sharded", "Whole")
        assert whole_apart(mine.gradients[0], theirs.gradients[0]) <= relative
    assert_alike(sharded[0], whole[0])
    assert {value.dtype for value in sharded[1].began.values()} == {torch.bfloat16, torch.float32}


def test_bfloat16_rounds_products_alone(tree_of):
    """As far from float32 as whole copies are; what is summed, kept and said is float32."""
    exact = learn(tree_of("exact", shard="none"))
    options = {"training": {"precision": "bfloat16"}}
    sharded, whole = (together(2, learn, tree_of(shard, shard=shard, **options))[0] for shard in ("full", "none"))
    first = [found.gradients[0] for found in (sharded, whole, exact)]
    assert 0 < apart(first[0], first[2]) <= 1.5 * apart(first[1], first[2])
    assert all(value.dtype == torch.float32 for value in sharded.weights.values())
    assert any(not torch.equal(g.bfloat16().float(), g) for g in first[0].values())
    for ours, other in zip(sharded.figures, exact.figures, strict=True):
        assert ours.loss == pytest.approx(other.loss, rel=0.01)


@pytest.mark.slow
def test_checkpoints_are_read_by_any_number_of_processes(tree_of, tmp_path):
    """Written sharded by four, of whom one has no share of some tensors, whole by one and whole by two; read by each, and
    sharded by three."""
    options = {"head": "odd", "training": {"weight_decay": 0.5}}
    write = partial(learn, keep=True)
    undisturbed = together(4, write, tree_of("shards", **options))[0]
    together(2, write, tree_of("copies", shard="none", **options))
    wanted = write(tree_of("one", shard="none", **options))
    for kept in ("shards", "copies", "one"):
        shutil.rmtree(Store(tmp_path / kept).checkpoint(STEPS))

    def after(kept: str, by: str, **more: Any) -> dict[str, Any]:
        """A tree that goes on from a copy of a run's checkpoint."""
        shutil.copytree(tmp_path / kept, tmp_path / f"{kept} by {by}")
        return tree_of(f"{kept} by {by}", **options, **more)

    checkpoint = Store(tmp_path / "shards").checkpoint(2)
    assert {path.name for path in checkpoint.iterdir()} == {SHARDS, "npd.json"}
    kept_as = FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    assert [name for name in kept_as if name.startswith("model.") and ("embed" in name or "head" in name)] == [
        "model.model.model.embed_tokens.weight"
    ]
    same = together(4, learn, after("shards", "four"))[0]
    assert len(same.figures) == 1
    assert all(torch.equal(same.weights[name], value) for name, value in undisturbed.weights.items())

    def by(readers: str, world: int, **more: Any) -> list[list[Learned]]:
        trees = [after(kept, readers, **more) for kept in ("shards", "copies", "one")]
        return together(world, learn_each, trees) if world > 1 else [learn_each(trees)]

    for readers, kind, found in (
        ("one", "Whole", by("one", 1)),
        ("copies", "Whole", by("copies", 2, shard="none")),
        ("shards", "Sharded", by("shards", 3)),
    ):
        assert {(each.kind, len(each.figures)) for process in found for each in process} == {(kind, 1)}
        for each in found[0]:
            assert apart(each.weights, wanted.weights) <= EXACT, f"by {readers}"


def killed_writing(tree: dict[str, Any]) -> None:
    """The main process is killed when shards of the second checkpoint are written, and what lists them is not."""
    real, count = FileSystemWriter.finish, 0

    def finish(self: FileSystemWriter, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *args, **options)

    FileSystemWriter.finish = finish  # type: ignore[method-assign,assignment]
    learn(tree, STEPS, keep=True)


def test_a_checkpoint_that_was_cut_short_is_none(tree_of):
    """Shards that a killed process has left stand in nobody's way; two begin it, one goes on, four end it."""
    wanted = learn(tree_of("wanted", shard="none"))
    tree = tree_of("killed")
    together(2, killed_writing, tree, die=True)
    assert Store(tree["run_dir"]).checkpoints() == [1]
    learn(tree, 2, keep=True)
    assert Store(tree["run_dir"]).checkpoints() == [1, 2]
    found = together(4, learn, tree)
    assert [len(one.figures) for one in found] == [1] * 4
    assert apart(found[0].weights, wanted.weights) <= EXACT


# -- whole runs


def distill(tree: dict[str, Any], die_at: int | None = None) -> None:
    """A run; `die_at`: the last process kills itself in this step's optimiser."""
    if die_at is not None and os.environ.get("RANK") == str(int(os.environ["WORLD_SIZE"]) - 1):
        real = Trainer.step

        def step(self: Trainer, *args: Any) -> StepFigures:
            if args[3] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args)

        Trainer.step = step  # type: ignore[method-assign,assignment]
    npd.distill(tree)


def test_a_sharded_run_is_a_run(tree_of, tmp_path):
    """Four processes: snapshots, metrics and evaluation as of one; killed by the death of one, and gone on with by two."""
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(5)])
    options: dict[str, Any] = {
        "data": {"eval": str(held_out)},
        "evaluation": {"tasks": ["answer"], "kl_prompts": 4},
        "schedule": {"generations": 2, "passes": 1},
    }
    one = npd.distill(tree_of("one", shard="none", **options))
    tree = tree_of("four", **options)
    last = steps_of(one.run_dir)[-1].step
    assert last >= 4
    together(4, distill, tree, last, die=True)
    store = Store(tree["run_dir"])
    assert not store.finished
    assert store.checkpoints()[-1] == last - 1
    together(2, distill, tree)
    lines = [steps_of(d) for d in (store.path, one.run_dir)]
    for ours, other in zip(*lines, strict=True):
        for name in ("loss", "ce", "kd", "grad_norm", "near_policy_kl"):
            assert getattr(ours, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=1e-7), name
    figures = [
        [line.figures for line in Store(d).read_metrics() if isinstance(line, EvaluationLine)]
        for d in (store.path, one.run_dir)
    ]
    assert len(figures[0]) == len(figures[1]) > 1
    for mine, theirs in zip(*figures, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name in ("policy/v000000", "policy/v000001", "student"):
        weights = [load_file(d / name / "model.safetensors") for d in (store.path, one.run_dir)]
        assert apart(*weights) <= 1e-5, name
    assert sorted(path.name for path in (store.path / "student").iterdir()) == sorted(p.name for p in one.student.iterdir())
    for part in sorted(one.run_dir.glob("generations/g000/part-*")):
        assert part.read_bytes() == (store.path / "generations/g000" / part.name).read_bytes()


# -- what is copied by where it lies


def test_nothing_is_copied_that_is_not_here(files):
    """A shard's address, like that of a tensor on the meta device, is that of every other one."""
    config = load_config({"run_dir": "", "student": {"model": files["tied"]}, "data": {"train": files["data"]}})
    model = models.load_model(config.student, trained=True).to("meta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no values of its own here"):
        copy_state(model)
    assert place_of(torch.empty(0, 3)) == place_of(torch.empty(0, 3))


def copied_shards(tree: dict[str, Any]) -> str:
    trainer = trainer_of(tree)
    with pytest.raises(ValueError, match="DTensor"):
        copy_state(trainer.student)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match="DTensor"):
            models.save_model(trainer.student, trainer.tokenizer, trainer.store.path / "wrong", dtype=dtype)
    return type(trainer.lying).__name__


def test_shards_are_not_copied_as_they_are(tree_of):
    assert together(2, copied_shards, tree_of("run")) == ["Sharded", "Sharded"]


# -- what is decided


STEP = StepMemory(states=160.0, loss=1.0, tokens=1, activations=models.Activations(0.0, 0.0, 1, 0), gathered=5.0)


@pytest.mark.parametrize(
    ("asked", "processes", "there", "full"),
    [
        ("auto", 1, 10, False),
        ("auto", 2, 10, True),
        ("auto", 2, 1000, False),
        ("auto", 2, None, False),
        ("none", 2, 10, False),
        ("full", 2, 1000, True),
        ("full", 2, None, True),
        ("full", 1, 10, False),
    ],
)
def test_auto_shards_what_no_device_holds(tree_of, asked, processes, there, full):
    config = load_config(tree_of("run", shard=asked))
    known = models.load_model_config(config.student)
    found = sharding(config, known, processes, there, bfloat16=False, step=STEP)
    assert found.full == full
    compiled = load_config(tree_of("run", shard=asked, training={"compile": True}))
    if full:
        with pytest.raises(UserError, match=r"training\.compile is true, but the student is sharded over 2"):
            sharding(compiled, known, processes, there, bfloat16=False, step=STEP)
    else:
        assert not sharding(compiled, known, processes, there, bfloat16=False, step=STEP).full
    dropping = load_config(tree_of("run", shard=asked, training={"dropout": True}))
    assert sharding(dropping, known, processes, there, bfloat16=False, step=STEP).full == full
    known.layerdrop = 0.1
    assert sharding(config, known, processes, there, bfloat16=False, step=STEP).full == full
    if full:
        with pytest.raises(UserError, match=r"leaves out layers by chance \(layerdrop 0\.1\), but it is sharded over 2"):
            sharding(dropping, known, processes, there, bfloat16=False, step=STEP)


def test_a_device_holds_its_share(tree_of):
    assert STEP.total(checkpointing=False) == 161
    assert STEP.over(4).total(checkpointing=False) == 160 / 4 + 5 + 1
    assert STEP.over(1) == STEP


def test_layers_are_gathered_one_by_one(files):
    """What is outside of them - embedding, norm, an untied head - stays gathered."""
    for head in ("tied", "untied"):
        config = load_config({"run_dir": "", "student": {"model": files[head]}, "data": {"train": files["data"]}})
        known, model = models.load_model_config(config.student), models.load_model(config.student, trained=True)
        decoder: Any = models.backbone(model)
        layers = list(decoder.layers)
        assert models.blocks(model) == layers[::-1]
        each = sum(p.numel() for p in layers[0].parameters())
        outside = sum(p.numel() for p in model.parameters()) - each * len(layers)
        assert models.block_parameters(known) == (each, outside)
        step = step_memory(config, known, bfloat16=True)
        assert step.gathered == 2 * (outside + 2 * each) + 2 * (outside + each) + 4 * each


# -- a student of 1.5 billion parameters, without values

QWEN = Qwen2Config(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
)


def test_the_default_trains_15b_in_rows_of_32768_tokens_on_80_gb():
    config = load_config({"run_dir": "", "student": {"model": ""}, "data": {"train": ""}})
    assert (config.packing.length, config.training.gradient_checkpointing) == (32_768, "auto")
    plan, there = step_memory(config, QWEN, bfloat16=True), 80e9
    assert plan.needs_checkpointing(there)
    assert plan.total(checkpointing=True) <= USABLE * there
    assert not sharding(config, QWEN, 8, int(there), bfloat16=True, step=plan).full

    model = shape_of(QWEN)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *moments]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == plan.states

    known = copy.deepcopy(QWEN)
    known._attn_implementation = COUNTED
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder: Any = shape_of(known, on="cpu").train().get_submodule("model")
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
        weights = {p.untyped_storage()._cdata for p in decoder.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        ids, positions = torch.zeros(1, plan.tokens, dtype=torch.long), torch.arange(plan.tokens)[None]
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            decoder(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    assert plan.activations is not None
    inputs = 4 * plan.tokens * QWEN.hidden_size * QWEN.num_hidden_layers
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(inputs, rel=0.12)
    layer = plan.tokens * plan.activations.token / QWEN.num_hidden_layers
    assert plan.activations.bytes(plan.tokens, checkpointing=True) == plan.activations.fixed + inputs + 2 * layer


def test_the_dry_run_says_what_was_decided(tree_of, monkeypatch):
    def said() -> tuple[str, dict[int, str], Plan]:
        setup = prepare(load_config(tree_of("run")), DISTILL)
        plan = make_plan(setup)
        rows = {row[0]: row[1] for row in plan_rows(setup, plan)}
        each, _, how = rows["GiB a device, if sharded over"].partition(" (")
        assert how == "with training.gradient_checkpointing)"
        return rows["sharded"], {int(n): size for n, size in (pair.split(": ") for pair in each.split(", "))}, plan

    decided, each, _ = said()
    assert decided == "no: one process trains"
    assert [*each] == [2, 4, 8]
    monkeypatch.setenv("WORLD_SIZE", "6")
    decided, each, plan = said()
    assert decided == "over 6 devices: training.shard full"
    assert each == {n: f"{plan.step.over(n).total(checkpointing=True) / GIB:.2f}" for n in (2, 4, 6, 8)}


def test_what_does_not_go_with_shards_is_refused_at_the_start(tree_of, monkeypatch):
    monkeypatch.setattr(models, "check_compiler", lambda: None)
    config = load_config(tree_of("run", training={"compile": True}))
    prepare(config, DISTILL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="sharded over 2 processes") as caught:
        prepare(config, DISTILL)
    assert "training.compile: false" in (caught.value.remedy or "")


# -- what accelerate's own configuration says


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ParallelismConfig"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "TorchDynamo"),
    ],
)
def test_a_launcher_that_lays_models_out_is_refused(tree_of, monkeypatch, variable, value, name):
    config = load_config(tree_of("run"))
    monkeypatch.setenv(variable, value)
    for start in (lambda: prepare(config, DISTILL), lambda: make_accelerator(config, Store(config.run_dir))):
        with pytest.raises(UserError, match=rf"accelerate is set to .*{name}") as caught:
            start()
        assert "training.shard" in str(caught.value)
    for harmless in ("false", "no") if variable.startswith("ACCELERATE_USE") else ("no", "NO"):
        monkeypatch.setenv(variable, harmless)
        prepare(config, DISTILL)


def test_a_launchers_accumulation_does_not_scale_gradients(tree_of, monkeypatch):
    """The loss of a step is a sum over its micro-batches already."""
    wanted = learn(tree_of("plain", shard="none"), 1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert_alike(learn(tree_of("accumulating", shard="none"), 1), wanted)
