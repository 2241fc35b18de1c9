"""The whole loop, read top to bottom: what `npd distill`, `npd sft`, `npd refresh` and `npd eval` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from npd import models
from npd.config import Config, load_config
from npd.errors import UserError
from npd.evaluation import Evaluator, Task, load_task
from npd.observe.display import Display
from npd.observe.events import Events, seconds_by_name
from npd.prompts import Prompts, load_prompts
from npd.refresher import REFERENCE, Generation, ReferenceMaker, Refresher
from npd.store import Store
from npd.trainer import Samples, Trainer, make_accelerator

# Runs with more passes in all show one bar, not tables and bars for each.
MANY_PASSES = 100

AnyConfig = Config | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class DistillResult:
    """A finished run."""

    run_dir: Path
    student: Path
    """The finished model and tokenizer, for from_pretrained."""
    steps: int
    tokens: int
    """Response tokens trained."""
    before: dict[str, float]
    """Evaluation of the student as it started; empty if nothing is evaluated."""
    after: dict[str, float]
    """Evaluation of the finished student."""
    seconds: dict[str, float]
    """Wall-clock seconds per kind of work: generate, score, train (checkpoints included), publish, evaluate, save."""


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
    teacher_config: Any


def as_config(config: AnyConfig) -> Config:
    return config if isinstance(config, Config) else load_config(config)


def prepare(config: Config, command: str) -> Setup:
    """Load configuration, tokenizers and data, and check all that can be checked without weights.

    Raises:
        UserError: whatever is wrong with what the user gave.
    """
    needs_teacher = command in ("distill", "refresh") or (command == "sft" and config.data.references == "teacher")
    if needs_teacher and config.teacher is None:
        raise UserError(f"`npd {command}` needs a teacher; set teacher.model.")
    tokenizer = models.load_tokenizer(config.student)
    model_configs = [models.load_model_config(config.student)]
    stop_ids = models.stop_ids_of(config.student)
    if config.teacher is not None:
        names = (config.student.model, config.teacher.model)
        models.check_compatible(tokenizer, models.load_tokenizer(config.teacher), names)
        model_configs.append(models.load_model_config(config.teacher))
        stop_ids += models.stop_ids_of(config.teacher)
    vocabulary = models.shared_vocabulary(tokenizer, *model_configs, stop_ids=stop_ids)
    if config.scoring.top_k > vocabulary.size:
        raise UserError(f"scoring.top_k is {config.scoring.top_k}, but the models share only {vocabulary.size} tokens.")
    given = command == "sft" and config.data.references == "given"
    prompts = None
    if command != "eval":
        prompts = load_prompts(
            config.data.train,
            tokenizer,
            split=config.data.split,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_completion_tokens=config.rollout.max_new_tokens if given else None,
            need="completion" if given else None,
        )
    held_out = None
    if config.data.eval is not None:
        held_out = load_prompts(
            config.data.eval,
            tokenizer,
            split=config.data.split,
            max_prompt_tokens=config.data.max_prompt_tokens,
            need="answer" if any(task.name == "answer" for task in config.evaluation.tasks) else None,
        )
    tasks = [load_task(task, tokenizer, held_out) for task in config.evaluation.tasks]
    asked = [p.table for p in (prompts, held_out) if p is not None] + [task.prompts for task in tasks]
    longest = max((max(map(len, table["prompt_ids"].to_pylist())) for table in asked), default=0)
    option, new = max(
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens or 0),
        key=lambda pair: pair[1],
    )
    for name, model_config in zip((config.student, config.teacher), model_configs, strict=False):
        context = models.context_length(model_config)
        if context is not None and longest + new > context:
            raise UserError(
                f"The longest prompt ({longest} tokens) and {option} ({new}) together pass the context of "
                f"{name.model if name else ''} ({context} tokens). Lower data.max_prompt_tokens or {option}."
            )
    student_config, teacher_config = model_configs[0], (model_configs[1] if len(model_configs) > 1 else None)
    if command != "eval":
        Store(config.run_dir).check(config, command)
    return Setup(config, command, tokenizer, vocabulary, prompts, held_out, tasks, student_config, teacher_config)


class Run:
    """One process's part in a run."""

    def __init__(self, config: Config, command: str, display: Display | None = None) -> None:
        self.config, self.command = config, command
        self.setup = prepare(config, command)
        self.store = Store(config.run_dir)
        self.accelerator: Accelerator = make_accelerator(config, self.store)
        main = self.accelerator.is_main_process
        self.display = display if display is not None and main else Display(quiet=not main or display is None)
        if main:
            self.store.open(config, command)
        self.accelerator.wait_for_everyone()
        self.events = Events(self.store.path / "events.jsonl")
        maker = ReferenceMaker if command == "sft" else Refresher
        assert self.setup.prompts is not None
        self.refresher = maker(
            config,
            self.store,
            self.setup.prompts,
            self.setup.tokenizer,
            self.setup.vocabulary,
            self.display,
            self.events,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
        )
        teacher: Callable[[], PreTrainedModel] | None = (lambda: self.refresher.teacher) if config.teacher else None
        self.evaluator = Evaluator(
            config,
            self.setup.tokenizer,
            self.setup.vocabulary,
            self.setup.held_out,
            self.setup.tasks,
            teacher,
            self.display,
        )
        for prompts, name in ((self.setup.prompts, "data.train"), (self.setup.held_out, "data.eval")):
            for line in prompts.report() if prompts else ():
                self.display.say(f"{name}: {line}")

    def train(self) -> DistillResult:
        """Generations and passes, from the newest checkpoint if there is one, to student/."""
        if self.store.finished:
            self.display.say(f"{self.store.path} is finished: the student is in {self.store.student}.")
            return self._result()
        schedule = self.config.schedule
        sft = self.command == "sft"
        student = models.load_model(self.config.student, trained=True)
        trainer = Trainer(
            self.config,
            self.store,
            self.accelerator,
            student,
            self.setup.tokenizer,
            self.events,
            kd_weight=0.0 if sft else self.config.loss.kd_weight,
            generations=1 if sft else schedule.generations,
        )
        self.accelerator.init_trackers("npd")
        if trainer.resume():
            self.display.say(f"Going on from step {trainer.position.step}.")
        if self.accelerator.is_main_process:
            self.store.rewind_metrics(trainer.position.step)
        at = trainer.position
        if at.step == 0:  # a resumed trainer's weights are no longer those it started with
            self._publish(trainer, 0)
        self._evaluate(trainer)
        with self._overall_progress(trainer) as advance:
            while not trainer.finished:
                generation = self.refresher(at.generation, REFERENCE if sft else at.generation)
                samples = Samples(self.store, generation)
                self._passes(trainer, samples, advance)
                if at.passes == schedule.passes:
                    at.generation, at.passes = at.generation + 1, 0
                if not trainer.finished:
                    self._publish(trainer, at.generation)
        self._evaluate(trainer, last=True)
        if self.accelerator.is_main_process:
            with self.events.span("save"):
                facts = {"step": at.step, "tokens": at.tokens}
                self.store.save_model(self.store.student, trainer.save_policy, facts)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self._result()

    @contextmanager
    def _overall_progress(self, trainer: Trainer) -> Iterator[Callable[[], None]]:
        """One bar for a run of many short generations, such as strict on-policy; each shows its own otherwise."""
        if trainer.generations * self.config.schedule.passes <= MANY_PASSES:
            yield lambda: None
            return
        with self.display.task(self.command, 100, "%") as show:
            done = 0.0

            def advance() -> None:
                nonlocal done
                share = 100 * trainer.progress(0.0)
                show(share - done, note=f"step {trainer.position.step}, generation {trainer.position.generation}")
                done = share

            yield advance

    def _passes(self, trainer: Trainer, samples: Samples, advance_run: Callable[[], None]) -> None:
        at, schedule = trainer.position, self.config.schedule
        while at.passes < schedule.passes and not trainer.finished:
            steps = trainer.steps_of_pass(samples)
            name = f"generation {at.generation}, pass {at.passes + 1}/{schedule.passes}: train"
            with (
                self.events.span("train", generation=at.generation, passes=at.passes),
                self.display.task(name, steps - at.batch, "steps") as advance,
            ):
                trainer.train_pass(samples, advance)
            advance_run()
            if not trainer.finished:
                self._evaluate(trainer)

    def _publish(self, trainer: Trainer, version: int) -> None:
        if self.accelerator.is_main_process and self.command == "distill":
            with self.events.span("publish", version=version):
                self.store.publish(version, trainer.save_policy, trainer.position.step, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, trainer: Trainer, last: bool = False) -> None:
        """Evaluate if it is due here and was not done before."""
        at = trainer.position
        passes = at.generation * self.config.schedule.passes + at.passes
        due = last or (at.batch == 0 and passes % self.config.evaluation.every_passes == 0)
        if self.evaluator and due and self.accelerator.is_main_process and not self._evaluated(at.step):
            with self.events.span("evaluate", step=at.step):
                figures = self.evaluator(trainer.base)
            trainer.log({"step": at.step, "eval": True, **figures})
            shown = [f"{key.removeprefix('eval/')} {value:.4g}" for key, value in figures.items() if shows(key)]
            self.display.say(f"step {at.step}: {', '.join(shown)}")
        self.accelerator.wait_for_everyone()

    def _evaluated(self, step: int) -> bool:
        return any(line["step"] == step and "eval" in line for line in self.store.read_metrics())

    def _result(self) -> DistillResult:
        facts = self.store.check_model(self.store.student)
        lines = [line for line in self.store.read_metrics() if "eval" in line]
        evals = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines]
        return DistillResult(
            run_dir=self.store.path,
            student=self.store.student,
            steps=facts["step"],
            tokens=facts["tokens"],
            before=evals[0] if evals else {},
            after=evals[-1] if evals else {},
            seconds=seconds_by_name(self.events.path),
        )


def shows(key: str) -> bool:
    """Is this figure one for a person to see, rather than an interval's end or a count?"""
    return not key.endswith(("_low", "_high", "_tokens"))


def distill(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Near-policy distillation from prompts to a finished student; goes on where an earlier call was stopped.

    Raises:
        UserError: what the user gave is wrong.
        RunError: the run failed (full disk, loss not finite, nothing selected).
    """
    return Run(as_config(config), "distill", display).train()


def sft(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Fine-tune on reference responses, given or the teacher's; the same loop and loss with kd_weight 0."""
    return Run(as_config(config), "sft", display).train()


def refresh(config: AnyConfig, policy: int | str | Path | None = None, *, display: Display | None = None) -> Generation:
    """Make the next missing generation of a distillation run from a policy snapshot, the newest by default.

    `policy` is a snapshot's version, or its directory or name such as v000001.

    Raises:
        UserError: all generations are there already, or there is no such snapshot.
    """
    run = Run(as_config(config), "distill", display)
    store = run.store
    if not store.policies():
        began = time.time()
        student = models.load_model(run.config.student, trained=True)
        store.publish(0, lambda path: models.save_model(student, run.setup.tokenizer, path), 0, run.config.checkpoint.keep)
        del student
        run.display.say(f"Published the student as it starts, v000000, in {time.time() - began:.1f} s.")
    names = {store.policy(version).name: version for version in store.policies()}
    name = list(names)[-1] if policy is None else f"v{policy:06d}" if isinstance(policy, int) else Path(policy).name
    if name not in names:
        raise UserError(f"{store.path} has no policy snapshot {name}; it has {', '.join(names)}.")
    for index in range(run.config.schedule.generations):
        count = run.refresher.part_count(index)
        if store.manifest(index) is None or store.missing_parts(index, count):
            return run.refresher(index, names[name])
    raise UserError(f"{store.path} has all {run.config.schedule.generations} generations; there is nothing to refresh.")


def evaluate(config: AnyConfig, model: str | None = None, *, display: Display | None = None) -> tuple[str, dict[str, float]]:
    """Evaluate a model: the one named, else the run's finished student, else its newest snapshot, else the start.

    Returns:
        What was evaluated, and the figures.
    """
    config = as_config(config)
    if model is None:
        store = Store(config.run_dir)
        versions = store.policies()
        paths = [store.student] if store.finished else [store.policy(versions[-1])] if versions else []
        model = str(paths[0]) if paths else None
    if model is not None:
        config = config.model_copy(update={"student": models.snapshot_config(config.student, Path(model))})
    setup = prepare(config, "eval")
    evaluator = Evaluator(
        config,
        setup.tokenizer,
        setup.vocabulary,
        setup.held_out,
        setup.tasks,
        partial(models.load_model, config.teacher) if config.teacher else None,
        display or Display(quiet=True),
    )
    if not evaluator:
        raise UserError("There is nothing to evaluate: set evaluation.tasks, or data.eval together with a teacher.")
    return config.student.model, evaluator(models.load_model(config.student))
