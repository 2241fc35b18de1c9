"""What runs where: devices and CPU threads of the trainer and of the refresh beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from npd.config import Config, PlacementConfig, ScheduleConfig
from npd.errors import UserError
from npd.registry import ENGINES, PRODUCERS
from npd.threads import cores

GPUS_OF_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class WorkerDevices:
    """Devices of a process that makes generations beside the trainer."""

    rollout: str
    teacher: str
    beside: tuple[str, ...] = ()
    """Further devices of the rollout, where its engine takes several."""

    @property
    def gpus(self) -> list[str]:
        """Every GPU that it uses, those of the rollout first."""
        return [d for d in dict.fromkeys((self.rollout, *self.beside, self.teacher)) if d != "cpu"]


@dataclass(frozen=True)
class Placement:
    train: list[str]
    """One device for each training process."""
    workers: list[WorkerDevices]
    """Processes that make generations beside the trainer; empty where it makes them itself, in turns, or others do."""
    producer: str | None
    """The producer that placement.rollout names, instead of devices."""
    turns: bool
    """Do training and generation take turns? Then `lead` is 0."""
    lead: float
    """Passes of lead that are really taken."""
    rollout: str
    """Device of the rollout where turns are taken."""
    teacher: str
    """Device of the teacher where turns are taken."""
    train_threads: int | None
    """CPU threads of the trainer while a refresh runs beside it; None: as many as ever."""
    rollout_threads: int | None
    """CPU threads of each refresh while it generates; None: as many as ever."""
    teacher_threads: int | None
    """CPU threads of each refresh while it scores; None: as many as ever."""
    first_threads: int | None
    """CPU threads of each refresh for generation 0 and the references, which the trainer has to wait for."""
    why: str = ""
    """Why turns are taken though `lead` asks for none."""

    def in_training(self, processes: int) -> Placement:
        """As a process that trains, one of `processes`, sees it.

        With several of them, and where others generate, a teacher that evaluates stands beside the process's own model.
        """
        if self.turns and processes == 1:
            return self
        here = "" if processes > 1 else self.train[0]
        return replace(self, rollout=here, teacher=here)

    @property
    def shared_gpu(self) -> bool:
        """Must models leave the GPU while others use it?"""
        return self.turns and len(self.train) == 1 and "cuda" in self.train[0]


def resolve_placement(config: Config, *, take_turns: bool = False, processes: int = 1, generates: bool = True) -> Placement:
    """Where a run's parts stand on this machine.

    Args:
        take_turns: nothing runs beside the trainer, whatever schedule.lead says.
        processes: trainers.
        generates: the student writes responses, with the rollout's engine.

    Raises:
        UserError: as `assign_devices`.
    """
    engine = ENGINES[config.rollout.engine]
    size = engine.devices(config.rollout.engine_options) if generates else 1
    placement, schedule = config.placement, config.schedule
    if take_turns:
        schedule = schedule.model_copy(update={"lead": 0.0})
        if names_producer(placement):
            placement = placement.model_copy(update={"rollout": "auto"})
    first = generates and engine.takes_first_gpus
    return assign_devices(placement, schedule, processes=processes, engine_gpus=size, engine_first=first)


def check_engine(config: Config, placed: Placement, processes: int, *, trains: bool) -> None:
    """See that the rollout's engine is installed where it is wanted, and can stand where the placement puts it.

    Where a producer writes elsewhere, this environment need not have it.

    Args:
        processes: trainers.
        trains: does this process train as well?

    Raises:
        UserError: it is not installed, does not know its options, or can't stand there.
    """
    engine = ENGINES[config.rollout.engine]
    engine.check(config)
    if writes_here(config, placed):
        engine.require(config)
    if placed.turns:
        engine.check_shared(config, placed.rollout, processes=processes, trains=trains)
    for worker in placed.workers:
        engine.check_device(config, worker.rollout)


def writes_here(config: Config, placed: Placement) -> bool:
    """Are generations made in this environment, so that it has to have the engine?"""
    return placed.producer is None or PRODUCERS[placed.producer].uses_cores(config.placement)


class EngineHere(NamedTuple):
    """The engine that writes in a process that evaluates or makes references."""

    name: str
    why: str = ""
    """Why it is not the rollout's; nothing where it is."""

    def note(self, config: Config) -> str:
        """What a person should know of it; nothing where it is the one that was asked for."""
        if not self.why:
            return ""
        return (
            f"What is written in this process, as in evaluation, is written by {self.name}, not by rollout.engine "
            f"{config.rollout.engine}: {self.why.rstrip('.')}."
        )


def engine_beside_training(config: Config, placed: Placement, processes: int, *, trains: bool = True) -> EngineHere:
    """The engine that writes in a process that evaluates or makes references: the rollout's where it can stand there."""
    if config.rollout.engine == ENGINES.default:
        return EngineHere(ENGINES.default)
    if not placed.turns:
        return EngineHere(ENGINES.default, "that one stands where generations are made, beside the training")
    try:
        ENGINES[config.rollout.engine].check_shared(config, placed.rollout, processes=processes, trains=trains)
    except UserError as error:
        return EngineHere(ENGINES.default, error.what)
    return EngineHere(config.rollout.engine)


def unused_gpus() -> str:
    """What a person should know of GPUs that are there, and that PyTorch does not use; nothing where there are none."""
    there = len(list(GPUS_OF_DRIVER.glob("*"))) if GPUS_OF_DRIVER.is_dir() else 0
    if not there or torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    built = "is built without CUDA" if torch.version.cuda is None else f"(for CUDA {torch.version.cuda}) can't use its driver"
    return (
        f"This machine has {there} NVIDIA GPU{'s' * (there > 1)}, but PyTorch {torch.__version__} {built}, so that all "
        "runs on the CPU. Install a PyTorch that fits (https://pytorch.org), or set CUDA_VISIBLE_DEVICES= if that is meant."
    )


def names_producer(config: PlacementConfig) -> bool:
    """Does placement.rollout name who makes the generations, instead of devices here?"""
    return isinstance(config.rollout, str) and config.rollout in PRODUCERS and bool(PRODUCERS[config.rollout].elsewhere)


def assign_devices(
    config: PlacementConfig,
    schedule: ScheduleConfig,
    *,
    processes: int = 1,
    gpus: int | None = None,
    cpus: int | None = None,
    engine_gpus: int = 1,
    engine_first: bool = False,
) -> Placement:
    """Devices and threads on a machine with `gpus` GPUs and `cpus` cores (default: this one) and `processes` trainers.

    Each rollout takes `engine_gpus` GPUs, in the order in which they are named. With `engine_first` an engine inside the
    trainer's process, where turns are taken, can only have the first GPU.

    Raises:
        UserError: a device that does not exist, or lists that do not fit each other.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    cpus = cores() if cpus is None else cpus
    train = _devices("train", config.train, gpus) or [f"cuda:{i}" if gpus else "cpu" for i in range(processes)]
    if processes > 1 and "cuda" in train[0] and train != [f"cuda:{i}" for i in range(processes)]:
        raise UserError(
            "With several training processes placement.train can't choose GPUs: accelerate gives them the first ones. Leave "
            "it auto, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if len(train) != processes:
        raise UserError(
            f"placement.train names {len(train)} devices ({', '.join(train)}), but {processes} training processes run. "
            f"Start as many with `accelerate launch --num_processes {len(train)} -m npd.cli distill ...`, or name one."
        )
    if gpus and processes > gpus:
        raise UserError(f"{processes} training processes run, but this machine has {gpus} GPUs; start no more than that.")
    producer = str(config.rollout) if names_producer(config) else None
    external = producer is not None
    rollout = [] if external else _devices("rollout", config.rollout, gpus)
    if not rollout and not external:
        free = [f"cuda:{i}" for i in range(gpus) if f"cuda:{i}" not in train]
        if engine_first and schedule.lead == 0:
            free = [f"cuda:{i}" for i in range(min(gpus, engine_gpus))]
        rollout = free[: len(free) // engine_gpus * engine_gpus] or [train[0]]
        if engine_gpus > 1 and len(rollout) < engine_gpus:
            raise UserError(
                f"rollout.vllm asks for {engine_gpus} GPUs an engine, but only {len(free)} of {gpus} are there for it. Lower "
                "tensor_parallel_size, or generate elsewhere (placement.rollout external)."
            )
    if len(rollout) % engine_gpus:
        raise UserError(
            f"placement.rollout names {len(rollout)} devices, and rollout.vllm takes {engine_gpus} for each engine; name a "
            "multiple of that."
        )
    engines = [tuple(rollout[i : i + engine_gpus]) for i in range(0, len(rollout), engine_gpus)]
    rollout = [engine[0] for engine in engines]
    teacher = _devices("teacher", config.teacher, gpus) or rollout or [train[0]]
    if rollout and len(teacher) not in (1, len(rollout)):
        raise UserError(
            f"placement.teacher names {len(teacher)} devices for {len(rollout)} of placement.rollout; name one, or as many."
        )
    workers = [WorkerDevices(engine[0], teacher[i % len(teacher)], engine[1:]) for i, engine in enumerate(engines)]
    used = {device for worker in workers for device in (worker.rollout, *worker.beside, worker.teacher)}
    shared = sorted(device for device in used & set(train) if device != "cpu")
    why = ""
    if shared and schedule.lead:
        why = f"training and generation share {', '.join(shared)}"
    elif schedule.lead and not external and "cpu" in used and cpus < 2:
        why = "there is one CPU core"
    turns = not external and (schedule.lead == 0 or bool(why))
    away = producer is not None and not PRODUCERS[producer].uses_cores(config)
    mine, each, first = config.train_threads, config.rollout_threads, config.rollout_threads
    if not turns:
        on_gpu = all("cuda" in device for device in train)
        mine = mine or (None if on_gpu or away else max(1, -(-cpus // 2)))
        first = first or max(1, cpus // max(1, len(workers)))
        each = each or max(1, (cpus - (mine or 0)) // max(1, len(workers)))
    return Placement(
        train=train,
        workers=[] if turns else workers,
        producer=producer,
        turns=turns,
        lead=0.0 if turns else schedule.lead,
        rollout=(rollout or train)[0],
        teacher=teacher[0],
        train_threads=None if turns else mine,  # nothing runs beside it
        rollout_threads=each,
        teacher_threads=config.teacher_threads or each,
        first_threads=first,
        why=why,
    )


def _devices(name: str, value: str | list[str], gpus: int) -> list[str]:
    """The devices an option names; none where it says auto."""
    if value == "auto":
        return []
    devices = [value] if isinstance(value, str) else value
    for device in devices:
        if device == "cpu":
            continue
        match = re.fullmatch(r"cuda:(\d+)", device)
        if not match and name == "rollout" and device in PRODUCERS:
            if isinstance(value, list) and PRODUCERS[device].elsewhere:
                raise UserError(
                    f"placement.rollout lists {device!r}, which makes all generations by itself and stands beside nothing "
                    f"else; set placement.rollout: {device}, or name devices."
                )
            raise UserError(
                f"placement.rollout names the producer {device!r}, which takes devices of this machine: the machine and "
                "schedule.lead choose it. Name devices, or leave it auto."
            )
        if not match:
            raise UserError(f"placement.{name} names {device!r}; a device is cpu, cuda:0, cuda:1, ...")
        if int(match[1]) >= gpus:
            raise UserError(f"placement.{name} names {device}, but this machine has {gpus or 'no'} GPUs.")
    return devices
