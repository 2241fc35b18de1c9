"""What can be known and checked before any weights are loaded: models' configurations, tokenizers, data, servers, places."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from npd import models
from npd.config import Config, load_config
from npd.errors import UserError
from npd.evaluation import Task, load_task
from npd.placement import EXTERNAL, Placement, place
from npd.prompts import Chat, Prompts, count_sources, read_data
from npd.refresher import usable_references
from npd.rollout.vllm import check_options, devices_per_engine
from npd.scoring.served import check_server
from npd.store import Store

AnyConfig = Config | Mapping[str, Any] | str | Path


@dataclass
class Setup:
    """What can be known and checked before any weights are loaded."""

    config: Config
    command: str
    tokenizer: Any
    vocabulary: models.Vocabulary
    prompts: Prompts | None
    """None where nothing is trained."""
    held_out: Prompts | None
    tasks: list[Task]
    student_config: Any
    teacher_configs: dict[str | None, Any]
    """Of teachers that are loaded here, by their keys in `Config.all_teachers`."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before it begins."""
    chat: Chat | None = None
    """The tokenizer with the template's options and all stop tokens."""


def as_config(config: AnyConfig) -> Config:
    return config if isinstance(config, Config) else load_config(config)


def placement_of(config: Config, *, turns: bool = False, processes: int = 1, writes: bool = True) -> Placement:
    """Where a run's parts stand; with `turns` nothing runs beside the trainer, whatever schedule.lead says.

    `writes`: the student writes responses, by the rollout's engine.
    """
    vllm = writes and config.rollout.engine == "vllm"
    engine: dict[str, Any] = {"engine_gpus": devices_per_engine(config.rollout.vllm) if vllm else 1, "engine_first": vllm}
    if not turns:
        return place(config.placement, config.schedule, processes=processes, **engine)
    here = config.placement.model_copy(update={"rollout": "auto"} if config.placement.rollout == EXTERNAL else {})
    return place(here, config.schedule.model_copy(update={"lead": 0.0}), processes=processes, **engine)


def load_tokenizers(config: Config) -> tuple[Any, models.Vocabulary, Any, dict[str | None, Any]]:
    """Tokenizer, what the models share, the student's configuration and those of the teachers that are loaded here.

    Raises:
        UserError: they cannot be loaded, or do not fit each other.
    """
    tokenizer = models.load_tokenizer(config.student)
    student_config = models.load_model_config(config.student)
    stop_ids = models.stop_ids_of(config.student)
    teacher_configs, notes = {}, []
    for key, teacher in config.all_teachers.items():
        if teacher.server is None:
            theirs = models.load_tokenizer(teacher)
            models.check_compatible(tokenizer, theirs, (config.student.model, teacher.model))
            if difference := models.template_difference(tokenizer, theirs, config.data.template_options):
                notes.append(f"The chat template of {teacher.model} is another one than the student's: {difference}.")
            teacher_configs[key] = models.load_model_config(teacher)
            stop_ids += models.stop_ids_of(teacher)
    vocabulary = models.shared_vocabulary(
        tokenizer,
        student_config,
        *teacher_configs.values(),
        stop_ids=stop_ids,
        template_options=config.data.template_options,
    )
    vocabulary = replace(vocabulary, notes=tuple(notes))
    if len(teacher_configs) < len(config.all_teachers):  # how far a served teacher's vocabulary is padded is not known
        vocabulary = replace(vocabulary, size=min(vocabulary.size, 1 + max(tokenizer.get_vocab().values())))
    if config.scoring.top_k > vocabulary.size:
        raise UserError(f"scoring.top_k is {config.scoring.top_k}, but the models share only {vocabulary.size} tokens.")
    return tokenizer, vocabulary, student_config, teacher_configs


def chat_of(config: Config, tokenizer: Any, vocabulary: models.Vocabulary) -> Chat:
    """How this run's tokenizer writes conversations: with its options, its stop tokens, and the date it began."""
    now = Store(config.run_dir).began
    return Chat(tokenizer, config.data.template_options, now=now, stop_ids=vocabulary.stop_ids)


def check_sources(config: Config, prompts: Prompts, name: str) -> list[str]:
    """See that every source has a teacher.

    Returns:
        Teachers for sources that do not occur.

    Raises:
        UserError: a source has none.
    """
    counts = count_sources(prompts.table)
    without = {source: n for source, n in sorted(counts.items()) if config.teacher_of(source) not in config.all_teachers}
    if without:
        shown = ", ".join(f"{source or '(none)'!r} ({n:,} prompts)" for source, n in list(without.items())[:5])
        raise UserError(
            f"{name} has prompts whose source has no teacher: {shown}{', ...' if len(without) > 5 else ''}. teachers has "
            f"{', '.join(config.teachers)}; add the source there, or set teacher for all others."
        )
    idle = [source for source in config.teachers if source not in counts]
    return [f"No prompt of {name} has the source {source!r}, which teachers has a teacher for." for source in idle]


def prepare(config: Config, command: str, *, turns: bool = False) -> Setup:
    """Load configuration, tokenizers and data, and check all that can be checked without weights, servers among it.

    Raises:
        UserError: whatever is wrong with what the user gave.
    """
    needs_teacher = command in ("distill", "refresh") or (command == "sft" and config.data.references == "teacher")
    if needs_teacher and not config.has_teacher:
        raise UserError(f"`npd {command}` needs a teacher; set teacher.model.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    writes = command == "distill"
    placed = placement_of(config, turns=turns or not writes, processes=processes, writes=writes)
    if config.rollout.engine == "vllm" and writes:
        check_options(config.rollout.vllm)
        check_engine_place(config, placed, processes, trains=not turns)
    models.place_on(placed.train[0] if processes == 1 else None)
    if config.training.compile and command in ("distill", "sft"):
        models.check_compiler()
    tokenizer, vocabulary, student_config, teacher_configs = load_tokenizers(config)
    chat = chat_of(config, tokenizer, vocabulary)
    need = "answer" if any(task.name == "answer" for task in config.evaluation.tasks) else None
    prompts, held_out = read_data(config, command, chat, need)
    if command == "distill" and config.schedule.references and prompts and not len(usable_references(config, prompts)):
        raise UserError(
            "schedule.references asks for reference responses, but no row of data.train has a completion of at most "
            "rollout.max_new_tokens tokens. Add them, or set data.references: teacher so that the teacher writes them."
        )
    tasks = [load_task(task, tokenizer, held_out, chat) for task in config.evaluation.tasks]
    asked = [p.longest for p in (prompts, held_out) if p is not None]
    longest = max([0, *asked, *(max(map(len, task.prompts["prompt_ids"].to_pylist())) for task in tasks)])
    option, new = max(
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens or 0),
        key=lambda pair: pair[1],
    )
    for model, model_config in (
        (config.student, student_config),
        *((config.all_teachers[k], c) for k, c in teacher_configs.items()),
    ):
        context = models.context_length(model_config)
        if context is not None and longest + new > context:
            raise UserError(
                f"The longest prompt ({longest} tokens) and {option} ({new}) together pass the context of "
                f"{model.model} ({context} tokens). Lower data.max_prompt_tokens or {option}."
            )
    notes = [
        f"{name}: {note}" for read, name in ((prompts, "data.train"), (held_out, "data.eval")) if read for note in read.notes
    ]
    if any(read is not None and read.templated for read in (prompts, held_out)):
        notes += vocabulary.notes
    compared = held_out if config.has_teacher and config.evaluation.kl_prompts else None
    for read, name in ((prompts if needs_teacher else None, "data.train"), (compared, "data.eval")):
        if read is not None:
            notes += check_sources(config, read, name)
    reads = (needs_teacher or compared is not None) and not (command != "eval" and Store(config.run_dir).finished)
    for teacher in config.all_teachers.values() if reads else ():
        if teacher.server is not None:
            notes += check_server(teacher, tokenizer, config.scoring.top_k, longest + new, vocabulary)
    if command != "eval":
        Store(config.run_dir).check(config, command)
    return Setup(
        config, command, tokenizer, vocabulary, prompts, held_out, tasks, student_config, teacher_configs, notes, chat
    )


def check_engine_place(config: Config, placed: Placement, processes: int, *, trains: bool) -> None:
    """See that vLLM can stand where the placement puts it.

    Args:
        trains: does this process train as well?

    Raises:
        UserError: it would share its process with several trainers, or with one on another GPU than the first, or stand on
            the CPU of a machine with GPUs, where vLLM takes a GPU all the same.
    """
    where = [placed.rollout] if placed.turns else [job.rollout for job in placed.jobs]
    if "cpu" in where and torch.cuda.is_available():
        raise UserError("placement.rollout is cpu, but vLLM takes a GPU where there is one; name a GPU, or leave it auto.")
    size = devices_per_engine(config.rollout.vllm)
    if placed.turns and (processes > 1 or (trains and size > 1) or placed.rollout not in ("cpu", "cuda:0")):
        raise UserError(
            "Where training and generation take turns, and in `npd refresh`, rollout.engine vllm shares the process and its "
            f"first GPU; here it would be {processes} trainers, {size} GPUs an engine, the first on {placed.rollout}. "
            "Give the rollout GPUs of its own (placement.rollout) and a schedule.lead above 0, choose GPUs by "
            "CUDA_VISIBLE_DEVICES, or generate elsewhere (placement.rollout external)."
        )
