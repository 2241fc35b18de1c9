"""What a run will do, said before it starts: `--dry-run`."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.compute as pc

from npd import models
from npd.observe.display import Display
from npd.packing import pack
from npd.prompts import count_sources
from npd.prompts.show import show_data
from npd.selection import ENOUGH
from npd.setup import Setup, placement_of
from npd.trainer import resolve_precision

GIB = 1 << 30
SAMPLE = 100_000


def show_plan(setup: Setup, display: Display) -> None:
    """Print generations, tokens, steps, disk and memory; counts that depend on what the student writes are upper bounds."""
    config, command = setup.config, setup.command
    assert setup.prompts is not None
    schedule = config.schedule
    sft = command == "sft"
    generations = 1 if sft else schedule.generations
    per_generation = len(setup.prompts) if sft or schedule.prompts == "all" else schedule.prompts
    samples = per_generation * (1 if sft else config.rollout.samples_per_prompt)
    prompt_lengths = pc.list_value_length(setup.prompts.table["prompt_ids"]).to_numpy()
    if sft and config.data.references == "given":
        responses = pc.list_value_length(setup.prompts.table["completion_ids"]).to_numpy()
    else:
        responses = np.full(len(prompt_lengths), config.rollout.max_new_tokens)
    response = float(responses.mean())
    # Rows if every response were as long as it may be, from a sample of the prompts where they are many.
    lengths = (prompt_lengths + responses)[:SAMPLE]
    rows_of_generation = -(-len(pack(lengths.tolist(), config.packing.length)) * samples // len(lengths))
    rows_per_step = max(1, config.training.batch_tokens // config.packing.length)
    steps = -(-rows_of_generation // rows_per_step) * schedule.passes * generations
    limits = []
    if config.training.max_steps is not None:
        limits.append(f"training.max_steps {config.training.max_steps:,}")
        steps = min(steps, config.training.max_steps)
    if config.training.max_tokens is not None:
        limits.append(f"training.max_tokens {config.training.max_tokens:,}")
        generations = min(generations, -(-config.training.max_tokens // max(1, samples * schedule.passes)))
    bytes_per_token = 8 if sft else 8 + 8 * config.scoring.top_k
    parts_disk = samples * response * bytes_per_token * generations

    rows = [
        ["prompts", f"{len(setup.prompts):,} of {setup.prompts.rows:,} rows"],
        *([f"  source {name or '(none)'}", f"{n:,}"] for name, n in sorted(count_sources(setup.prompts.table).items())),
        ["longest prompt", f"{prompt_lengths.max():,} tokens"],
        ["generations", f"{schedule.generations if not sft else 1:,} of {samples:,} responses"],
        ["passes over each", str(schedule.passes)],
        *([["answered by", config.rollout.engine]] if command == "distill" else []),
        ["response tokens per generation", f"at most {samples * response:,.0f}"],
        ["optimiser steps", f"about {steps:,} at most, {rows_per_step} rows of {config.packing.length:,} tokens each"],
        *(["ends earlier at", limit] for limit in limits),
        ["tokens that models share", f"{setup.vocabulary.size:,}"],
        ["stop tokens", ", ".join(map(repr, setup.tokenizer.convert_ids_to_tokens(list(setup.vocabulary.stop_ids))))],
        ["training arithmetic", {"no": "float32", "bf16": "bfloat16"}[resolve_precision(config)]],
    ]
    student = models.parameter_count(setup.student_config, trust_remote_code=config.student.trust_remote_code)
    weight = models.resolve_dtype(config.student, trained=True).itemsize
    # Weights, and for what is trained gradients and AdamW's two moments beside them.
    training = student * weight * (1 if config.student.lora else 4)
    rows.append(["student in training", f"{student:,} parameters, {training / GIB:.2f} GiB before activations"])
    disk = float(parts_disk)
    if command == "distill":
        inference = student * models.resolve_dtype(config.student, trained=False).itemsize
        rows.append(["student in rollout", f"{inference / GIB:.2f} GiB"])
        disk += student * weight * (2 + min(generations, config.checkpoint.keep))
    for key, model in config.all_teachers.items() if command == "distill" or config.data.references == "teacher" else ():
        name = "teacher" if key is None else f"teachers.{key}"
        if model.server is not None:
            rows.append([name, f"{model.model} on {model.server}, {model.concurrency} requests at once"])
            continue
        count = models.parameter_count(setup.teacher_configs[key], trust_remote_code=model.trust_remote_code)
        held = count * models.resolve_dtype(model, trained=False).itemsize
        rows.append([name, f"{count:,} parameters, {held / GIB:.2f} GiB"])
    if config.training.max_steps is None or config.training.max_steps >= config.checkpoint.every_steps:
        disk += student * weight * 3 * config.checkpoint.keep
    disk += parts_disk / max(1, generations)  # kept samples of one generation, mapped from files of their own
    disk += 4.0 * float(prompt_lengths.sum())
    rows.append(["disk", f"at most {disk / GIB:.2f} GiB"])
    placed = placement_of(config, turns=sft, writes=not sft, processes=int(os.environ.get("WORLD_SIZE", "1")))
    threads = f", CPU threads {placed.train_threads} while a refresh runs" if placed.train_threads else ""
    rows.append(["trainer on", ", ".join(placed.train) + threads])
    if command == "distill":
        for i, job in enumerate(placed.jobs):
            cpu = (
                f"CPU threads {placed.rollout_threads}, scoring {placed.teacher_threads}, generation 0 {placed.first_threads}"
            )
            local = any(teacher.server is None for teacher in config.all_teachers.values())
            teacher = f", teacher on {job.teacher}" if local else ""
            rows.append([f"refresh {i} on", f"{', '.join((job.rollout, *job.beside))}{teacher}; {cpu}"])
        if placed.turns:
            why = f" ({placed.why}; schedule.lead is not taken)" if placed.why else " (schedule.lead 0)"
            rows.append(["refresh", f"takes turns with the trainer{why}"])
        elif not placed.jobs:
            rows.append(["refresh", "made elsewhere, by `npd refresh --follow`"])
        else:
            rows.append(["next snapshot", f"passes before the end of a generation: {placed.lead:g}"])
    display.table(f"npd {command}: the plan for {config.run_dir}", ["what", "how much"], rows)
    for note in setup.notes:
        display.say(note)
    for line in setup.prompts.report():
        display.say(f"data.train: {line}")
    assert setup.chat is not None
    show_data(config, command, setup.chat, display, read=(setup.prompts, setup.held_out))
    each = min(samples, config.rollout.part_size * (1 if sft else config.rollout.samples_per_prompt))
    if config.selection.rule == "adaptive" and each < ENOUGH:
        display.say(
            f"The adaptive rule needs {ENOUGH} responses in a part to follow them, and parts have {each}: its upper bound "
            "will be the fixed one. Raise rollout.part_size."
        )
    display.say("Nothing was run. The configuration, tokenizers and data are in order.")
