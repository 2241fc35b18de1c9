"""What a run will do, said before it starts: `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from npd import models
from npd.packing import pack
from npd.preflight import Setup
from npd.prompts import count_sources
from npd.registry import RULES
from npd.scoring import teacher_kind
from npd.train.trainer import resolve_precision

GIB = 1 << 30
SAMPLE = 100_000  # prompts from which rows are estimated


@dataclass
class Plan:
    """What a run takes. Counts that depend on what the student writes are upper bounds."""

    generations: int
    samples: int
    """Responses of a generation."""
    response_tokens: float
    """Of a generation, at most."""
    steps: int
    """Optimiser steps of the run, about and at most."""
    rows_per_step: int
    student_parameters: int
    training_bytes: int
    """Weights, gradients and the optimiser's moments, before activations."""
    inference_bytes: int
    """The student's weights where they only write."""
    disk_bytes: float
    """At most."""
    limits: list[str] = field(default_factory=list)
    """What ends the run earlier."""


def make_plan(setup: Setup) -> Plan:
    """The figures of a run, from its configuration, its prompts and the shape of its models."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    schedule, training = config.schedule, config.training
    generations = schedule.generations
    samples = contents.responses(0)
    prompt_lengths = pc.list_value_length(setup.prompts.table["prompt_ids"]).to_numpy()
    if contents.is_reference(0) and config.data.references == "given":
        responses = pc.list_value_length(setup.prompts.table["completion_ids"]).to_numpy()
    else:
        responses = np.full(len(prompt_lengths), config.rollout.max_new_tokens)
    response = float(responses.mean())
    # Rows if every response were as long as it may be, from a sample of the prompts where they are many.
    lengths = (prompt_lengths + responses)[:SAMPLE]
    rows_of_generation = -(-len(pack(lengths.tolist(), config.packing.length)) * samples // len(lengths))
    rows_per_step = max(1, training.batch_tokens // config.packing.length)
    steps = -(-rows_of_generation // rows_per_step) * schedule.passes * generations
    limits = []
    if training.max_steps is not None:
        limits.append(f"training.max_steps {training.max_steps:,}")
        steps = min(steps, training.max_steps)
    if training.max_tokens is not None:
        limits.append(f"training.max_tokens {training.max_tokens:,}")
        generations = min(generations, -(-training.max_tokens // max(1, samples * schedule.passes)))
    student = models.parameter_count(setup.tokens.student, trust_remote_code=config.student.trust_remote_code)
    weight = models.resolve_dtype(config.student, trained=True).itemsize
    bytes_per_token = 8 + (8 * config.scoring.top_k if contents.by_student else 0)
    parts = samples * response * bytes_per_token
    disk = float(parts * generations)
    if contents.by_student:
        disk += student * weight * (2 + min(generations, config.checkpoint.keep))
    if training.max_steps is None or training.max_steps >= config.checkpoint.every_steps:
        disk += student * weight * 3 * config.checkpoint.keep
    disk += parts  # kept samples of one generation, mapped from files of their own
    disk += 4.0 * float(prompt_lengths.sum())
    return Plan(
        generations=schedule.generations,
        samples=samples,
        response_tokens=samples * response,
        steps=steps,
        rows_per_step=rows_per_step,
        student_parameters=student,
        # For what is trained, gradients and AdamW's two moments beside the weights.
        training_bytes=student * weight * (1 if config.student.lora else 4),
        inference_bytes=student * models.resolve_dtype(config.student, trained=False).itemsize,
        disk_bytes=disk,
        limits=limits,
    )


def plan_rows(setup: Setup, plan: Plan) -> list[list[str]]:
    """(what, how much), for a table."""
    config, contents, prompts = setup.config, setup.generations, setup.prompts
    assert prompts is not None, "only what trains is planned"
    vocabulary, tokenizer = setup.tokens.vocabulary, setup.tokens.tokenizer
    rows = [
        ["prompts", f"{len(prompts):,} of {prompts.rows:,} rows"],
        *([f"  source {name or '(none)'}", f"{n:,}"] for name, n in sorted(count_sources(prompts.table).items())),
        ["longest prompt", f"{prompts.longest:,} tokens"],
        ["generations", f"{plan.generations:,} of {plan.samples:,} responses"],
        ["passes over each", str(config.schedule.passes)],
        *([["answered by", config.rollout.engine]] if contents.by_student else []),
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
            f"{plan.student_parameters:,} parameters, {plan.training_bytes / GIB:.2f} GiB before activations",
        ],
    ]
    if contents.by_student:
        rows.append(["student in rollout", f"{plan.inference_bytes / GIB:.2f} GiB"])
    reads = contents.by_student or config.data.references == "teacher"
    for key, teacher in config.all_teachers.items() if reads else ():
        name = "teacher" if key is None else f"teachers.{key}"
        rows.append([name, teacher_kind(teacher).plan(teacher, setup.tokens.teachers[key])])
    rows.append(["disk", f"at most {plan.disk_bytes / GIB:.2f} GiB"])
    return rows + _places(setup)


def _places(setup: Setup) -> list[list[str]]:
    """What runs where."""
    config, placed = setup.config, setup.placement
    threads = f", CPU threads {placed.train_threads} while a refresh runs" if placed.train_threads else ""
    rows = [["trainer on", ", ".join(placed.train) + threads]]
    if not setup.generations.by_student:
        return rows
    for i, worker in enumerate(placed.workers):
        cpu = f"CPU threads {placed.rollout_threads}, scoring {placed.teacher_threads}, generation 0 {placed.first_threads}"
        local = any(not teacher_kind(teacher).elsewhere for teacher in config.all_teachers.values())
        teacher = f", teacher on {worker.teacher}" if local else ""
        rows.append([f"refresh {i} on", f"{', '.join((worker.rollout, *worker.beside))}{teacher}; {cpu}"])
    if placed.turns:
        why = f" ({placed.why}; schedule.lead is not taken)" if placed.why else " (schedule.lead 0)"
        rows.append(["refresh", f"takes turns with the trainer{why}"])
    elif not placed.workers:
        rows.append(["refresh", f"made elsewhere ({placed.producer})"])
    else:
        rows.append(["next snapshot", f"passes before the end of a generation: {placed.lead:g}"])
    return rows


def plan_notes(setup: Setup) -> list[str]:
    """What the user should know besides."""
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    notes = [*setup.notes, *(f"data.train: {line}" for line in setup.prompts.report())]
    each = min(contents.responses(0), config.rollout.part_size * contents.per_prompt(0))
    note = RULES[config.selection.rule]().note(config.selection, each)
    if note is not None:
        notes.append(note)
    return notes
