"""How the student that learns lies on devices: whole on each one, or a share of every tensor on each.

Shards are PyTorch's `fully_shard` (FSDP2), called directly: accelerate, which launches the processes and does all the rest,
turns FSDP on for accelerators alone, so what runs on a GPU would not be what tests run on a CPU; and its policy for bfloat16
rounds what is reduced.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from npd import models
from npd.config import Config
from npd.errors import UserError
from npd.models import quiet_transformers
from npd.train.memory import memory_of, sharding

SHARDS = "shards"
"""What a checkpoint of a sharded student keeps weights and moments in; one of a whole student is as accelerate writes it."""


OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a ParallelismConfig",
}
"""What `accelerate launch` says in the environment where its own configuration lays models out."""


def check_launch() -> None:
    """See that accelerate does not lay the student out as well, which would be done twice or not at all.

    Raises:
        UserError: its configuration, or an option of `accelerate launch`, asks for that.
    """
    found = [name for variable, name in OTHERS.items() if os.environ.get(variable, "false").lower() in ("true", "1", "yes")]
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        found.append("TorchDynamo")
    if found:
        raise UserError(
            f"accelerate is set to {' and '.join(found)}, but npd decides by itself how a student lies on devices and if "
            "it is compiled (training.shard, training.compile).",
            "Launch it with `accelerate launch --multi_gpu --dynamo_backend no -m npd.cli ...`, which goes before what "
            "accelerate's configuration file says, and set training.shard: full to share weights.",
        )


class Whole:
    """The whole student on the device of each process; DDP averages the gradients of several."""

    shares = 1
    """Devices that share the tensors of one student."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.module: nn.Module
        self.optimizer: Any

    def prepare(self, module: nn.Module, make_optimizer: Callable[[], Optimizer]) -> None:
        """Lay out the module that a step calls, and make the optimiser of what it is then made of."""
        self.module, self.optimizer = self.accelerator.prepare(module, make_optimizer())

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of a micro-batch; `last`: of the step."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def norm(self, most: float) -> Tensor:
        """The norm of all gradients, which are clipped to `most`."""
        return _full(self.accelerator.clip_grad_norm_(self.module.parameters(), most))

    @contextmanager
    def gathered(self, student: nn.Module) -> Iterator[nn.Module | None]:
        """The student in one piece, for as long as this lasts; None in all processes but the main one."""
        yield student if self.accelerator.is_main_process else None

    def save(self, path: Path) -> None:
        """Write weights and optimiser; every process takes part."""
        with quiet_transformers():
            self.accelerator.save_state(str(path), safe_serialization=True)

    def load(self, path: Path) -> None:
        """Read what `save` wrote, of this kind or the other, by any number of processes; every process takes part."""
        if (path / SHARDS).is_dir():
            state = _state(self.module, self.optimizer.optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that one process loads what several have written
                dcp.load(state, checkpoint_id=path / SHARDS, no_dist=self.accelerator.num_processes == 1)
            options = StateDictOptions(strict=False)  # of tied weights one name is enough
            set_model_state_dict(self.module, state["model"], options=options)
            set_optimizer_state_dict(self.module, self.optimizer.optimizer, state["optimizer"])
        elif self.shares == 1 and _of_one(path) == (self.accelerator.num_processes == 1):
            self.accelerator.load_state(str(path))
        else:
            _load_whole(path, self.accelerator.unwrap_model(self.module), self.optimizer.optimizer)


class Sharded(Whole):
    """A share of every tensor, of its gradient and of its moments on each process's device.

    A decoder layer is gathered when its turn comes, and let go; what is outside of them, such as the head, stays from the
    forward pass to the end of the backward one. Gradients are reduced with each micro-batch: to keep them would take whole
    ones.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.shares = accelerator.num_processes
        self._like: nn.Module

    def prepare(self, module: nn.Module, make_optimizer: Callable[[], Optimizer]) -> None:
        device, half = self.accelerator.device, self.accelerator.mixed_precision == "bf16"
        student: Any = module.model
        self._like = _without_weights(student)
        if half:
            module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
            # What layers add to stays float32, as where weights are; so do positions, and what the loss gives.
            embedding = models.base_model(student).get_input_embeddings()
            embedding.register_forward_hook(lambda module, inputs, output: output.float())
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=None, cast_forward_inputs=False)
        else:
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        shard = partial(fully_shard, mesh=init_device_mesh(device.type, (self.shares,)), mp_policy=policy)
        for block in models.blocks(student):
            shard(block)
        shard(module)  # in place
        # What one process's samples do not reach, such as an expert, has a gradient there too: zero. Else processes would
        # send each other tensors that do not match.
        if hasattr(module, "set_reduce_scatter_unused_params"):  # older versions of PyTorch lack it
            module.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
        self.module = module
        self.optimizer = self.accelerator.prepare(make_optimizer())

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def gathered(self, student: nn.Module) -> Iterator[nn.Module | None]:
        """A copy in CPU memory; every process has to enter."""
        main, found = self.accelerator.is_main_process, {}
        parameters = dict(student.named_parameters(remove_duplicate=False))
        for parameter in student.parameters():
            full = _full(parameter.detach())
            if main:
                found[parameter] = nn.Parameter(full.to("cpu"), requires_grad=False)
        if not main:
            yield None
            return
        empty = dict(self._like.named_parameters(remove_duplicate=False))
        self._like.load_state_dict({name: found[p] for name, p in parameters.items()}, strict=False, assign=True)
        del found
        for theirs, mine in zip(self._like.buffers(), student.buffers(), strict=True):
            theirs.copy_(mine)
        try:
            yield self._like
        finally:
            self._like.load_state_dict(empty, strict=False, assign=True)

    def save(self, path: Path) -> None:
        if self.accelerator.is_main_process:  # what a process that was killed has left
            shutil.rmtree(path / SHARDS, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        dcp.save(_state(self.module, self.optimizer.optimizer), checkpoint_id=path / SHARDS)


def lay_out(config: Config, known: PreTrainedConfig, accelerator: Accelerator, *, bfloat16: bool) -> Whole:
    """What training.shard says, auto resolved by the main process's device."""
    world = accelerator.num_processes
    answer = [sharding(config, known, world, memory_of(accelerator.device), bfloat16=bfloat16).full]
    if world > 1:
        broadcast_object_list(answer)
    return Sharded(accelerator) if answer[0] else Whole(accelerator)


def _full(tensor: Tensor) -> Tensor:
    """A tensor in one piece, if need be from every process's share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _without_weights(student: nn.Module) -> nn.Module:
    """A copy whose parameters have a shape alone; tied ones stay one."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in student.parameters()}
    like = copy.deepcopy(student, memo)
    models.remember_layout(models.base_model(like), models.layout_of(models.base_model(student)))
    return like


def _state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps of this process's share; tied weights under one of their names."""
    names, once = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_parameters())
    other = {name.removeprefix("module.") for name in names.keys() - once.keys()}  # DDP's word is in no state dict
    weights = {name: tensor for name, tensor in get_model_state_dict(module).items() if name not in other}
    return {"model": weights, "optimizer": get_optimizer_state_dict(module, optimizer)}


def _of_one(path: Path) -> bool:
    """Was a checkpoint of a whole student written by a single process? DDP puts a word in front of each name."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return not next(iter(file.keys())).startswith("module.")


@torch.no_grad()
def _load_whole(path: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Read a checkpoint of a whole student, of which each process takes what it has a share of."""

    def as_in(full: Tensor, tensor: Tensor) -> Tensor:
        full = full.to(tensor.device)
        if not isinstance(tensor, DTensor):
            return full
        return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)

    with safe_open(path / "model.safetensors", "pt") as file:
        names = {name.removeprefix("module."): name for name in file.keys()}  # noqa: SIM118
        there = {id(tensor): names[name] for name, tensor in _named(module) if name in names}
        for name, tensor in _named(module):
            if id(tensor) not in there:
                raise KeyError(name)
            tensor.copy_(as_in(file.get_tensor(there[id(tensor)]), tensor))
    state = torch.load(path / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        moments.update({k: as_in(v, trained[number]) for k, v in moments.items() if isinstance(v, Tensor) and v.ndim})
    optimizer.load_state_dict(state)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, by all its names."""
    yield from module.state_dict(keep_vars=True).items()
