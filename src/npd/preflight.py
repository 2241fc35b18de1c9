"""What can be known and checked before any weights are loaded; nothing is changed. Each part brings its own check."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npd import models
from npd.config import Config, LossConfig, PlacementConfig, load_config
from npd.errors import UserError, foreign
from npd.evaluation import Benchmark, BenchmarkSetting, benchmark_kind, benchmarks
from npd.generations import asked, guards
from npd.generations.generation import Generations, ReferenceGenerations, tuning, usable_references
from npd.generations.itself import itself
from npd.generations.models import Tokens, load_tokenizers
from npd.generations.producer import producer_kind
from npd.losses import check_divergence, divergence_of
from npd.placement import (
    EngineHere,
    Placement,
    check_engine,
    engine_beside_training,
    resolve_placement,
    unused_gpus,
    writes_here,
)
from npd.prompts import ENTRY, Chat, OwnChat, Prompts, count_sources, read_data, verifiable
from npd.registry import ENGINES, RULES
from npd.scoring import Question, check_asked, teacher_kind
from npd.scoring.contexts import teacher_contexts
from npd.store import Store, check_writable, explained_disk
from npd.store.provenance import in_rows
from npd.train.memory import memory_of, sharding
from npd.train.sharding import check_launch
from npd.train.trainer import resolve_precision
from npd.verifiers import check_entries

AnyConfig = Config | Mapping[str, Any] | str | Path

DISTILL, SFT, EVAL = "distill", "sft", "eval"


@dataclass
class Setup:
    """What was found."""

    config: Config
    """As the command takes it: for fine-tuning on references see npd.generations.generation.tuning."""
    given: Config
    """As the user gave it."""
    command: str
    tokens: Tokens
    chat: Chat
    """How the student's tokenizer writes conversations."""
    prompts: Prompts | None
    """None where nothing is trained."""
    held_out: Prompts | None
    tasks: list[Benchmark]
    placement: Placement
    longest_prompt: int
    """Tokens, over all that is asked."""
    longest_of_teacher: int
    """The same, as teachers read it."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before it begins."""
    on_paper: bool = False
    """Planned for devices that need not be here? Then `placement` is nobody's."""

    @property
    def generations(self) -> Generations:
        """What the run's generations are, from the prompts as they are now."""
        assert self.prompts is not None, "only what trains has generations"
        kind = ReferenceGenerations if self.command == SFT else Generations
        return kind(self.config, self.prompts)


def as_config(config: AnyConfig) -> Config:
    """A configuration, read if need be."""
    return config if isinstance(config, Config) else load_config(config)


def prepare(given: Config, command: str, *, take_turns: bool = False, on_paper: bool = False) -> Setup:
    """Load configuration, tokenizers and data, and check all that can be checked without weights, servers among it.

    Args:
        command: distill, sft or eval.
        take_turns: nothing runs beside this process, and it does not train: `npd refresh`.
        on_paper: it is planned for other devices: what this machine lacks of devices and engines does not matter.

    Raises:
        UserError: whatever is wrong with what the user gave.
    """
    if command != EVAL:  # which goes on with nothing
        given = Store(given.run_dir).as_begun(given)
    config = tuning(given) if command == SFT else given
    if command != EVAL and Store(config.run_dir).began_in_rows:
        config = in_rows(config)
    needs_teacher = command == DISTILL or (command == SFT and config.data.references == "teacher")
    if needs_teacher and not config.has_teacher:
        raise UserError(f"`npd {command}` needs a teacher; set teacher.model.")
    processes = _processes()
    if command != EVAL and not take_turns:
        check_launch()
    generates = command == DISTILL
    placed = resolve_placement(
        config.model_copy(update={"placement": PlacementConfig()}) if on_paper else config,
        take_turns=take_turns or command == EVAL,
        processes=processes,
        generates=(generates or command == EVAL) and not on_paper,
    )
    if generates:
        if not on_paper:
            producer_kind(placed).check_config(config)
            producer_kind(placed).check_placed(config, placed)
            check_engine(config, placed, processes, trains=not take_turns)
        if config.loss.kd_weight:
            check_divergence(config.loss.divergence, config.loss.top_k_mass, config.loss.options)
    here = EngineHere(ENGINES.default)
    if not on_paper:
        here = engine_beside_training(config, placed, processes, trains=command != EVAL and not take_turns)
        if not generates and (config.evaluation.tasks or config.data.eval is not None or needs_teacher):
            ENGINES[here.name].check(config)
            ENGINES[here.name].require(config)
    models.use_device(placed.train[int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else 0])
    if config.training.compile and command != EVAL and not on_paper:
        models.check_compiler()
    tokens = load_tokenizers(config)
    if config.training.compile and command != EVAL and not take_turns and not on_paper:
        half = resolve_precision(config) == "bf16"
        sharding(config, tokens.student, processes, memory_of(models.device()), bfloat16=half)
    finished = Store(config.run_dir).finished
    if command != EVAL and not finished and not on_paper:
        check_writable(Path(config.run_dir))
    # What is not trained any more need not be there any more.
    seen: list[str] = []
    if command != EVAL and not finished:
        seen += models.check_weights(config.student, tokens.student, trained=True)
        seen += models.check_adapter(config.student, tokens.student)
    chat = chat_of(config, tokens)
    with explained_disk(Path(tempfile.gettempdir())):  # where prompts lie until the run has them
        own = own_chats(config, tokens, chat) if needs_teacher else None
        prompts, held_out = read_data(config, command, chat, needed_of_eval(config), own)
    if config.schedule.references and prompts is not None and not len(usable_references(config, prompts)):
        raise UserError(
            "schedule.references asks for reference responses, but no row of data.train has a completion of at most "
            "rollout.max_new_tokens tokens. Add them, or set data.references: teacher so that the teacher writes them."
        )
    unverified: list[str] = []
    if command == DISTILL and prompts is not None:
        unverified = check_answers(config, prompts)
    tasks = [] if command != EVAL and finished else benchmarks(BenchmarkSetting(config, chat, held_out))
    longest = max([0, *(p.longest for p in (prompts, held_out) if p is not None), *(task.longest_prompt for task in tasks)])
    option, response = max(
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens or 0),
        key=lambda pair: pair[1],
    )
    models.check_context(config.student.model, tokens.student, longest, response, option)
    read_by_teacher = max([longest, *(p.longest_of_teacher for p in (prompts, held_out) if p is not None)])
    notes = [*seen, *unverified] + [
        f"{name}: {note}" for data, name in ((prompts, "data.train"), (held_out, "data.eval")) if data for note in data.notes
    ]
    notes += [note for task in tasks for note in task.notes]
    if generates and config.loss.kd_weight:
        notes += divergence_notes(config.loss) + guards.notes(config)
    if needs_teacher and prompts is not None:
        notes += knowledge_notes(config, prompts)
    if any(data is not None and data.templated for data in (prompts, held_out)):
        notes += tokens.notes
    compared = held_out if config.has_teacher and config.evaluation.kl_prompts else None
    if not on_paper:
        notes += where_notes(config, given, command, placed, take_turns=take_turns)
    measured = bool(tasks) or compared is not None
    if (measured and not take_turns) or (command == SFT and config.data.references == "teacher"):
        notes += [note] if (note := here.note(config)) else []
    by = asked.of_student(config, tasks, here.name, compared=compared is not None) if command == EVAL else ""
    if by and models.whole_directory_of(config.student) is None:
        raise models.no_directory(config.student, by)
    for read, name in ((prompts if needs_teacher else None, "data.train"), (compared, "data.eval")):
        if read is not None:
            notes += check_sources(config, read, name)
    if compared is not None or config.evaluation.teacher or generates:
        check_aligned(config, compared is not None, generates)
    heard = list(config.all_teachers) if needs_teacher or compared is not None else []
    if not heard and config.evaluation.teacher and command != EVAL and tasks:
        heard = [None]
    question = Question(tokens.tokenizer, tokens.vocabulary, config.scoring.top_k, read_by_teacher, response, option)
    for key in heard if command == EVAL or not finished else ():
        teacher = config.all_teachers[key]
        kind = teacher_kind(teacher)
        mine = replace(question, prompt_ids=first_prompt(config, key, prompts if needs_teacher else compared))
        if any(data is not None and data.templated for data in (prompts, held_out)):
            mine = replace(mine, chat=(own(key or "") if own is not None else None) or chat)
        if command != EVAL:
            means = asked.of_teacher(config, key, tasks, here.name, refreshes=command == DISTILL)
            mine = replace(mine, **means._asdict())
        check_asked(kind, teacher, mine)
        notes += kind.check(teacher, tokens.teachers[key], mine)
    if command != EVAL:
        Store(config.run_dir).check(given, command)
    return Setup(
        config, given, command, tokens, chat, prompts, held_out, tasks, placed, longest, read_by_teacher, notes, on_paper
    )


def where_notes(config: Config, given: Config, command: str, placed: Placement, *, take_turns: bool) -> list[str]:
    """What stands elsewhere than was asked for, or might have been."""
    notes = [note] if (note := unused_gpus()) else []
    if command == DISTILL and not take_turns and placed.why:
        notes.append(f"schedule.lead {config.schedule.lead:g} is not taken: {placed.why}, so that they take turns.")
    if command == DISTILL and not writes_here(config, placed) and (missing := ENGINES[config.rollout.engine].lacks(config)):
        notes.append(f"Not needed in this environment, but where generations are made ({placed.producer}): {missing}")
    if command == SFT and config.placement.rollout != given.placement.rollout and config.data.references == "teacher":
        notes.append(
            f"placement.rollout {given.placement.rollout} is for generations: `npd sft` has references written here."
        )
    return notes


def first_prompt(config: Config, key: str | None, prompts: Prompts | None) -> tuple[int, ...]:
    """The first prompt that a teacher is asked about, as it reads it; nothing where there is none."""
    table = prompts.table if prompts is not None else None
    for batch in table.to_batches(max_chunksize=1024) if table is not None else ():
        row = next((i for i, source in enumerate(batch["source"].to_pylist()) if config.teacher_of(source) == key), None)
        if row is not None:
            return tuple(teacher_contexts(pa.Table.from_batches([batch.slice(row, 1)]))[0])
    return ()


def divergence_notes(loss: LossConfig) -> list[str]:
    """What does not go together well, though it can be computed."""
    if loss.top_k_mass == "tail" or getattr(divergence_of(loss.divergence, loss.options), "on_teacher_support", False):
        return []
    return [
        f"loss.top_k_mass {loss.top_k_mass} gives all tokens outside the teacher's top-k nothing, which {loss.divergence} "
        "takes for impossible. loss.top_k_mass: tail gives them what the teacher gave them."
    ]


def knowledge_notes(config: Config, prompts: Prompts) -> list[str]:
    """What follows from how much the teachers know, as far as prompts tell."""
    notes = []
    for key in config.all_teachers:
        who = itself(config, key)
        mine = [config.teacher_of(source) == key for source in prompts.table["source"].to_pylist()] if who else []
        told = np.array(mine) & prompts.told_otherwise if any(mine) else np.ones(1, bool)
        if not told.any():
            notes.append(
                f"The teacher is {who} and reads the same prompts: it knows no more than the student, and its part of the "
                "loss only holds the student near. A column teacher_prompt, teacher.system or teacher.template_options tell "
                "it more (docs/objectives.md)."
            )
    # A teacher with another tokenizer has ids of its own for all prompts, which need not tell it more.
    keys = {key for key, teacher in config.given_teachers.items() if not teacher.align or teacher.tells_more}
    sources = prompts.table["source"].to_pylist() if prompts.privileged else []
    more = sum(
        told for told, source in zip(prompts.told_otherwise, sources, strict=False) if config.teacher_of(source) in keys
    )
    if more and config.selection.rule == RULES.default and config.selection.lower >= 0:
        notes.append(
            f"{more:,} prompts tell the teacher something else than the student. It may then be surer of good "
            f"responses than the student is, and selection.rule {config.selection.rule} drops those (delta below "
            f"selection.lower {config.selection.lower:g}). selection.rule none keeps them."
        )
    return notes


def check_answers(config: Config, prompts: Prompts) -> list[str]:
    """See that there is something to verify responses by, where that is asked for.

    Returns:
        How many rows selection.reward drops as nothing verifies them.

    Raises:
        UserError: no row has an answer, or one names a task that is not known.
    """
    answers, reward, notes = prompts.table["answer"], config.selection.reward, []
    if reward != "any":
        right = pc.sum(verifiable(answers)).as_py() or 0
        if not right:
            blank = len(answers) - answers.null_count
            raise UserError(
                f"selection.reward {reward} judges responses by their rows' answers, but no row of data.train "
                f"has an `answer` or a `reasoning_gym` entry{f' ({blank:,} of their answers are empty)' if blank else ''}.",
                "Add them, name the column with data.columns, or set selection.reward: any.",
            )
        if right < len(answers):
            notes.append(
                f"{len(answers) - right:,} of {len(answers):,} prompts have no answer: selection.reward {reward} drops their "
                "responses as unverified, after they were written and scored. Leave these rows out, or give them an answer."
            )
    if config.scoring.verify:
        check_entries(answers.filter(pc.starts_with(answers, ENTRY)).to_pylist())
    return notes


def _processes() -> int:
    """How many train together, as a launcher says."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isascii() and said.isdigit() and 1 <= int(said[:9]) <= 65536):
        raise UserError(
            f"The environment variable WORLD_SIZE is {foreign(said, 60)!r}, which is no number of processes.",
            "Start with `accelerate launch`, or unset it.",
        )
    return int(said)


def chat_of(config: Config, tokens: Tokens) -> Chat:
    """How a run's tokenizer writes conversations: with its options, its stop tokens, and the date when the run began."""
    now = Store(config.run_dir).began
    return Chat(tokens.tokenizer, config.data.template_options, now=now, stop_ids=tokens.vocabulary.stop_ids)


def own_chats(config: Config, tokens: Tokens, chat: Chat) -> OwnChat | None:
    """How teachers with another tokenizer write the prompts of a source; None where there are none of them."""
    chats = {
        key: Chat(
            identity.tokenizer,
            {name: value for name, value in chat.options.items() if name in str(identity.tokenizer.chat_template)},
            now=chat.now,
            whose=f"the teacher {config.all_teachers[key].model}'s",
        )
        for key, identity in tokens.teachers.items()
        if identity.aligned and identity.tokenizer is not None
    }
    return (lambda source: chats.get(config.teacher_of(source))) if chats else None


def check_aligned(config: Config, compared: bool, trains: bool) -> None:
    """Refuse what a teacher with another tokenizer can't do.

    Args:
        compared: is the KL to the teachers measured?
        trains: is the student trained on what it says?

    Raises:
        UserError: it can't.
    """
    aligned = [key for key, teacher in config.all_teachers.items() if teacher.align]
    if not aligned:
        return
    name = config.all_teachers[aligned[0]].model
    if compared:
        raise UserError(
            f"The KL to the teacher is not defined where it has another tokenizer ({name}, teacher.align), as the two "
            "distributions are over different tokens.",
            "Set evaluation.kl_prompts: 0; evaluation.tasks still measure the student.",
        )
    if config.evaluation.teacher and None in aligned:
        raise UserError(
            f"evaluation.teacher asks {name} tasks as the student's tokenizer writes them, and it has another one "
            "(teacher.align).",
            "Set evaluation.teacher: false; as the student of another configuration, `npd eval` measures it by itself.",
        )
    if trains and config.loss.kd_weight and config.loss.top_k_mass == "renormalize":
        raise UserError(
            "loss.top_k_mass renormalize does not go with teacher.align: where a token of the student's is several of the "
            f"teacher's ({name}), its own probability alone is known, and scaled to one it would be called certain.",
            "Set loss.top_k_mass: raw or tail.",
        )


def needed_of_eval(config: Config) -> str | None:
    """A column that every row of data.eval must have, for some benchmark."""
    kinds = [benchmark_kind(task) for task in config.evaluation.tasks]
    return next((kind.needs for kind in kinds if kind.needs is not None), None)


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
        shown = ", ".join(f"{foreign(source or '(none)', 60)!r} ({n:,} prompts)" for source, n in list(without.items())[:5])
        raise UserError(
            f"{name} has prompts whose source has no teacher: {shown}{', ...' if len(without) > 5 else ''}. teachers has "
            f"{foreign(', '.join(config.teachers), 200)}; add the source there, or set teacher for all others."
        )
    idle = [source for source in config.teachers if source not in counts]
    return [f"No prompt of {name} has the source {source!r}, which teachers has a teacher for." for source in idle]
