"""What a run will do, said before it starts: `--dry-run`."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig

from npd import models
from npd.config import Config
from npd.generations.generation import Generations
from npd.generations.itself import follows_snapshots, is_base, itself
from npd.generations.producer import producer_kind
from npd.growth import disk_note, disk_row, gib, growth, response_lengths, room_for
from npd.hardware import GIB
from npd.mirror import mirror_plan
from npd.preflight import Setup
from npd.prompts import Prompts, count_sources
from npd.registry import ENGINES, RULES
from npd.scoring import teacher_kind
from npd.store import REFERENCE
from npd.train.loop import Loop, Position, Trained
from npd.train.memory import Sharding, StepMemory, memory_of, sharding, step_memory
from npd.train.trainer import resolve_precision

SAMPLE = 20_000  # responses of which steps are counted one by one; of a longer run they are counted in proportion


@dataclass
class Plan:
    """What a run takes. Counts that depend on what the student writes are upper bounds."""

    generations: int
    samples: int
    """Responses of a generation."""
    response_tokens: float
    """Of a generation, at most."""
    steps: int
    """Optimiser steps of the run if every response is as long as it may be and is kept; about and at most."""
    rows_per_step: int
    student_parameters: int
    training_bytes: int
    """Weights, gradients and the optimiser's moments, before activations."""
    inference_bytes: int
    """The student's weights where they only write."""
    step: StepMemory
    """What a step takes at most, as on a GPU that holds the whole student."""
    sharding: Sharding
    disk_bytes: float
    """At most."""
    disk_left: float
    """Of these, those by which the run directory still grows at most."""
    copied_bytes: float
    """To a mirror, over the whole run; at most."""
    limits: list[str] = field(default_factory=list)
    """What ends the run earlier."""


def make_plan(setup: Setup) -> Plan:
    """The figures of a run, from its configuration, its prompts and the shape of its models."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    training, samples = config.training, contents.responses(0)
    responses = response_lengths(config, setup.prompts.table, given=contents.is_reference(0))
    limits = []
    if training.max_steps is not None:
        limits.append(f"training.max_steps {training.max_steps:,}")
    if training.max_tokens is not None:
        limits.append(f"training.max_tokens {training.max_tokens:,}")
    steps, generations = _steps(config, contents)
    known = setup.tokens.student
    student = models.parameter_count(known, trust_remote_code=config.student.trust_remote_code)
    held = student * models.resolve_dtype(config.student, trained=True).itemsize
    adapters = models.adapter_bytes(known, config.student)
    half, train = resolve_precision(config) == "bf16", setup.placement.train
    step = step_memory(config, known, bfloat16=half)
    sharded = sharding(config, known, len(train), memory_of(torch.device(train[0])), bfloat16=half, step=step)
    size = growth(setup, steps, generations, held, adapters)
    return Plan(
        generations=config.schedule.generations,
        samples=samples,
        response_tokens=samples * float(responses.mean()),
        steps=steps,
        rows_per_step=max(1, training.batch_tokens // config.packing.length),
        student_parameters=student,
        training_bytes=int(step.states),
        inference_bytes=student * models.resolve_dtype(config.student, trained=False).itemsize,
        step=step,
        sharding=sharded,
        disk_bytes=size.disk,
        disk_left=size.left,
        copied_bytes=size.copied,
        limits=limits,
    )


class _LongestRun:
    """The loop's work (`npd.train.loop.Work`) where every response is as long as it may be, and is kept."""

    def __init__(self, config: Config, contents: Generations, parts: int) -> None:
        self.config, self.contents, self.most = config, contents, parts
        self.generation = 0
        self.lengths = self.response_lengths = np.empty(0, np.int64)

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        self.generation = generation
        self.lengths = self.response_lengths = np.empty(0, np.int64)
        parts = self.contents.parts(generation)[: self.most]
        references = []
        if self.contents.mixed:
            references = [self._add(REFERENCE, part) for part in range(len(self.contents.parts(REFERENCE)))]
        responses = parts[-1].stop * self.contents.per_prompt(generation)
        return len(parts), responses, np.concatenate([np.empty(0, np.int64), *references])

    def next_part(self, taken: list[int]) -> int:
        return len(taken)

    def take(self, part: int) -> tuple[np.ndarray, int]:
        indices = self._add(self.generation, part)
        return indices, len(indices)

    def _add(self, generation: int, part: int) -> np.ndarray:
        table, each = self.contents.table(generation, part), self.contents.per_prompt(generation)
        responses = response_lengths(self.config, table, given=self.contents.is_reference(generation))
        prompts = pc.list_value_length(table["prompt_ids"]).to_numpy()
        first = len(self.lengths)
        self.lengths = np.concatenate([self.lengths, np.repeat(prompts + responses, each)])
        self.response_lengths = np.concatenate([self.response_lengths, np.repeat(responses, each)])
        return np.arange(first, len(self.lengths))

    def training(self) -> AbstractContextManager[object]:
        return nullcontext()

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        return Trained(0.0, 0)

    def publish(self, version: int) -> None: ...

    def checkpoint(self) -> None: ...

    def pass_done(self) -> None: ...

    def generation_done(self, reason: str, passes: float) -> None: ...


def _steps(config: Config, contents: Generations) -> tuple[int, int]:
    """Optimiser steps and generations of the longest run that the configuration allows: its loop, without models."""
    schedule, training = config.schedule, config.training
    each = contents.responses(0)
    generations = min(schedule.generations, max(1, SAMPLE // (each * schedule.passes)))
    passes = min(schedule.passes, max(1, SAMPLE // each))
    parts = max(1, min(len(contents.parts(0)), len(contents.parts(0)) * SAMPLE // each))
    shorter = config.model_copy(update={"schedule": schedule.model_copy(update={"passes": passes})})
    work, at = _LongestRun(shorter, contents, parts), Position()
    Loop(shorter, work, at, generations=generations, lead=0.0).run()
    responses = contents.parts(0)[parts - 1].stop * contents.per_prompt(0)
    scale = schedule.generations / generations * (schedule.passes / passes) * (each / responses)
    if scale == 1.0 or at.generation < generations:  # to its end, or to a limit
        return at.step, min(generations, at.generation + 1)
    steps, planned = math.ceil(at.step * scale), schedule.generations
    most = [training.max_steps]
    if training.max_tokens is not None:
        most.append(math.ceil(training.max_tokens / at.tokens * at.step))
    for limit in most:
        if limit is not None and limit < steps:
            planned = min(planned, math.ceil(limit / steps * schedule.generations))
    return min([steps, *(limit for limit in most if limit is not None)]), planned


def _steps_of_generation(setup: Setup) -> int:
    """About, by its tokens alone: a run that begins is not rehearsed for a warning."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains has prompts"
    table = setup.prompts.table
    responses = response_lengths(config, table, given=contents.is_reference(0))
    each = float((pc.list_value_length(table["prompt_ids"]).to_numpy() + responses).mean())
    tokens = each * contents.responses(0) / (1 - config.schedule.references * contents.mixed)
    step = max(1, config.training.batch_tokens // config.packing.length) * config.packing.length
    return config.schedule.passes * math.ceil(tokens / step)


def _writes(config: Config, student: PreTrainedConfig) -> str:
    """The engine, and how it fills its batches, as far as is known before weights are loaded."""
    if config.rollout.engine != ENGINES.default:
        return config.rollout.engine
    if config.rollout.batching == "static":
        return f"{config.rollout.engine}, generate(): rollout.batching is static"
    why_not = models.expected_continuing(student)
    return f"{config.rollout.engine}, " + (f"generate(): {why_not}" if why_not else "continuous batching, if that is proved")


def plan_rows(setup: Setup, plan: Plan) -> list[list[str]]:
    """(what, how much), for a table."""
    config, contents, prompts = setup.config, setup.generations, setup.prompts
    assert prompts is not None, "only what trains is planned"
    vocabulary, tokenizer = setup.tokens.vocabulary, setup.tokens.tokenizer
    rows = [
        ["prompts", f"{len(prompts):,} of {prompts.rows:,} rows"],
        *([f"  source {name or '(none)'}", f"{n:,}"] for name, n in sorted(count_sources(prompts.table).items())),
        ["longest prompt", f"{prompts.longest:,} tokens"],
        *([["prompts of the teacher's own", _privileged(prompts)]] if prompts.privileged else []),
        ["generations", f"{plan.generations:,} of {plan.samples:,} responses"],
        ["passes over each", str(config.schedule.passes)],
        *([["answered by", _writes(config, setup.tokens.student)]] if contents.by_student else []),
        ["response tokens per generation", f"at most {plan.response_tokens:,.0f}"],
        [
            "optimiser steps",
            f"about {plan.steps:,} at most, {plan.rows_per_step} rows of {config.packing.length:,} tokens each",
        ],
        *(["ends earlier at", limit] for limit in plan.limits),
        ["tokens that models share", f"{vocabulary.size:,}"],
        ["stop tokens", ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(vocabulary.stop_ids))))],
        ["training arithmetic", {"no": "float32", "bf16": "bfloat16"}[resolve_precision(config)]],
        [
            "student in training",
            f"{plan.student_parameters:,} parameters, {gib(plan.training_bytes)} before activations",
        ],
        *_activations(plan),
        *_shares(config, plan, len(setup.placement.train)),
        ["student reads", models.expected_reading(setup.tokens.student, config.student.attention)],
    ]
    rows += [["evaluation", task.plan] for task in setup.tasks if task.plan]
    if contents.by_student:
        rows.append(["student in rollout", gib(plan.inference_bytes)])
    reads = contents.by_student or config.data.references == "teacher"
    for key, teacher in config.all_teachers.items() if reads else ():
        name = "teacher" if key is None else f"teachers.{key}"
        rows.append([name, _reader(setup, key, teacher_kind(teacher).plan(teacher, setup.tokens.teachers[key]))])
    room = room_for(config.run_dir, plan.disk_bytes, plan.disk_left)
    rows.append(["disk", f"at most {gib(room.needed)}" if setup.on_paper else disk_row(config.run_dir, room)])
    if config.checkpoint.mirror is not None:
        there = mirror_plan(setup.given, setup.command)
        rows.append(["mirror", f"{there}; at most {gib(plan.copied_bytes)} copied in all"])
    return rows if setup.on_paper else rows + _places(setup)


def _privileged(prompts: Prompts) -> str:
    return f"{prompts.privileged:,}, the longest {prompts.longest_of_teacher:,} tokens"


def _reader(setup: Setup, key: str | None, plan: str) -> str:
    """A teacher, and whether it takes memory of its own."""
    config, placed = setup.config, setup.placement
    who = itself(config, key)
    beside = all(worker.rollout == worker.teacher for worker in placed.workers) and placed.rollout == placed.teacher
    told = plan if who is None else f"{who}; {plan}"
    if beside and is_base(config, key):
        return f"{told}; the student's base with its adapters off, no memory of its own"
    return f"{told}; the model that the student is scored with" if beside and follows_snapshots(config, key) else told


def _activations(plan: Plan) -> list[list[str]]:
    """What a micro-batch takes on a GPU beside weights and optimiser."""
    plain, again = ((plan.step.total(checkpointing=on) - plan.step.states) / GIB for on in (False, True))
    if plan.step.activations is None:
        return []
    told = f"{plain:.2f} GiB for {plan.step.tokens:,} tokens, {again:.2f} GiB with training.gradient_checkpointing"
    return [["activations and loss", f"on a GPU at most {told}"]]


def _shares(config: Config, plan: Plan, processes: int) -> list[list[str]]:
    """Whether the student is divided among devices, and what each of so many then holds."""
    again = config.training.gradient_checkpointing is not False
    counts = sorted({2, 4, 8, *([processes] if processes > 1 else [])})
    each = ", ".join(f"{count}: {plan.step.over(count).total(checkpointing=again) / GIB:.2f}" for count in counts)
    least = " at least" if plan.step.activations is None else ""
    return [
        ["sharded", f"over {processes} devices: {plan.sharding.why}" if plan.sharding.full else f"no: {plan.sharding.why}"],
        ["GiB a device, if sharded over", each + least + (" (with training.gradient_checkpointing)" if again else "")],
    ]


def _places(setup: Setup) -> list[list[str]]:
    """What runs where."""
    config, placed = setup.config, setup.placement
    threads = f", CPU threads {placed.train_threads} while a refresh runs" if placed.train_threads else ""
    rows = [["trainer on", ", ".join(placed.train) + threads]]
    if not setup.generations.by_student:
        return rows
    for i, worker in enumerate(placed.workers):
        cpu = f"CPU threads {placed.rollout_threads}, scoring {placed.teacher_threads}, generation 0 {placed.first_threads}"
        local = any(not teacher_kind(teacher).runs_elsewhere(teacher) for teacher in config.all_teachers.values())
        teacher = f", teacher on {worker.teacher}" if local else ""
        rows.append([f"refresh {i} on", f"{', '.join((worker.rollout, *worker.beside))}{teacher}; {cpu}"])
    if placed.turns:
        why = f" ({placed.why}; schedule.lead is not taken)" if placed.why else " (schedule.lead 0)"
        rows.append(["refresh", f"takes turns with the trainer{why}"])
    elif not placed.workers:
        rows.append(["refresh", producer_kind(placed).plan(config, placed) or f"made elsewhere ({placed.producer})"])
    else:
        rows.append(["next snapshot", f"passes before the end of a generation: {placed.lead:g}"])
    return rows


def plan_notes(setup: Setup, plan: Plan | None = None) -> list[str]:
    """What the user should know besides, of a plan too."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    notes = [*setup.notes, *(f"data.train: {line}" for line in setup.prompts.report())]
    each = min(contents.responses(0), config.rollout.part_size * contents.per_prompt(0))
    note = RULES[config.selection.rule]().note(config.selection, each)
    if note is not None:
        notes.append(note)
    if (
        plan is not None
        and not setup.on_paper
        and (short := disk_note(config.run_dir, room_for(config.run_dir, plan.disk_bytes, plan.disk_left)))
    ):
        notes.append(short)
    return notes


def begins_without_room(setup: Setup) -> str:
    """A warning where the disk will not do for a run that begins, or goes on; else nothing."""
    config, known = setup.config, setup.tokens.student
    generations = config.schedule.generations
    steps = generations * _steps_of_generation(setup)
    if config.training.max_steps is not None:
        steps = min(steps, config.training.max_steps)
    held = models.parameter_count(known, trust_remote_code=config.student.trust_remote_code)
    held *= models.resolve_dtype(config.student, trained=True).itemsize
    needed = growth(setup, steps, generations, held, models.adapter_bytes(known, config.student))
    return disk_note(config.run_dir, room_for(config.run_dir, needed.disk, needed.left))
