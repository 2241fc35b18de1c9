"""What `npd distill`, `npd sft`, `npd refresh` and `npd eval` do: build, drive, close."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from npd import models
from npd.config import Config
from npd.errors import RunError, UserError
from npd.evaluation import BenchmarkSetting, Evaluator
from npd.generations.books import Books
from npd.generations.evaluated import Evaluated
from npd.generations.generation import Generation
from npd.generations.itself import settled
from npd.generations.models import Models, texts_of
from npd.generations.pipeline import Pipeline
from npd.generations.producer import Producer, Workshop, producer_kind
from npd.generations.reselect import reselect as reselect_generation
from npd.measures import ModelWeights, StudentMeasures, room_for_a_refresh
from npd.mirror import Mirror, arrive
from npd.observe.display import Display
from npd.observe.events import Events, SpanName, read_events, seconds_by_role
from npd.observe.trackers import start_trackers
from npd.placement import EngineHere, Placement, engine_beside_training
from npd.plan import begins_without_room
from npd.preflight import DISTILL, EVAL, SFT, AnyConfig, Setup, as_config, prepare
from npd.records import EvaluationLine, GenerationEnd, Span
from npd.report.keeper import observed
from npd.report.live import RunView
from npd.result import DistillResult
from npd.rollout import Weights
from npd.store import REFERENCE, Store, explained_run
from npd.train.loop import Position
from npd.train.samples import clear_cache
from npd.train.trainer import Trainer, make_accelerator
from npd.train.work import RunWork

MAKE_STUDENT_AGAIN = "Delete that directory and run the same command again: it is made anew from the newest checkpoint."


class Run:
    """One process's part in a run, from its checks to its result; holds the run's lock while entered."""

    def __init__(self, config: Config, command: str, display: Display | None = None, *, take_turns: bool = False) -> None:
        arrive(config, command, display if display is not None else Display(quiet=True))
        self.setup: Setup = prepare(config, command, take_turns=take_turns)
        self.trains = not take_turns
        self.config, self.store = self.setup.config, Store(config.run_dir)
        self.accelerator = make_accelerator(self.config, self.store)
        self.main, self.world = self.accelerator.is_main_process, self.accelerator.num_processes
        self.display = display if display is not None and self.main else Display(quiet=not self.main or display is None)
        role = "trainer" if self.main else f"trainer-{self.accelerator.process_index}"
        self.events = Events(self.store.path / "events.jsonl", role)
        self.placement: Placement = self.setup.placement
        self.here = EngineHere("")
        """The engine that writes in this process."""
        self.resources = ExitStack()
        self.frozen = self.store.finished and not os.access(self.store.path, os.W_OK)
        """Is the run finished where nothing can be written, as on a disk that is mounted to be read?"""

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            if self.main and not self.frozen:
                stack.enter_context(self.store.locked())
                try:
                    self.store.open(self.setup.given, self.setup.command)
                except RunError:  # a full disk
                    self.frozen = self.store.finished
                    if not self.frozen:
                        raise
            self.accelerator.wait_for_everyone()
            assert self.setup.prompts is not None, "what trains has prompts"
            kept = self.store.keep_prompts(self.setup.prompts) if self.main and not self.frozen else None
            if self.main and not self.frozen and self.config.checkpoint.mirror is not None:
                mirror = Mirror(self.config, self.display, self.events)
                mirror.begin()
                stack.push(lambda _, error, __: mirror.close(error))
            self.accelerator.wait_for_everyone()
            self.setup.prompts = kept or (self.setup.prompts if self.frozen else self.store.prompts())
            short = [begins_without_room(self.setup)] if self.main and self.trains and not self.store.finished else []
            for note in [*self.setup.notes, *filter(None, short), *self.store.mended]:
                self.display.say(note)
            for data, name in ((self.setup.prompts, "data.train"), (self.setup.held_out, "data.eval")):
                for line in data.report() if data else ():
                    self.display.say(f"{name}: {line}")
            self.shop = self._workshop()
            stack.callback(self.shop.pipeline.models.close)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.resources.__exit__(*error)

    def _workshop(self) -> Workshop:
        """What generations are made with in this process."""
        config, setup = self.config, self.setup
        placed = self.placement.in_training(self.world)
        generations = setup.generations
        self.here = engine_beside_training(config, placed, self.world, trains=self.trains)
        tokens = setup.tokens
        self.store.vocabulary_size = tokens.vocabulary.size
        kept = Models(
            config,
            self.store,
            tokens.vocabulary,
            tokens.tokenizer.pad_token_id,
            setup.longest_prompt,
            self.display,
            placed,
            engine=self.here.name,
            longest_of_teacher=setup.longest_of_teacher,
            decode=texts_of(tokens),
        )
        books = Books(config, self.store, generations, self.display, self.events)
        pipeline = Pipeline(config, self.store, generations, kept, books, self.display, self.events, placed)
        return Workshop(
            config,
            self.store,
            generations,
            books,
            pipeline,
            self.placement,
            self.events,
            self.display,
            rank=self.accelerator.process_index,
            world=self.world,
            wait=self.accelerator.wait_for_everyone,
        )

    @contextmanager
    def observed(self, command: str) -> Iterator[None]:
        """Around the work: its start and end go on record, and so does what it failed with; the report is kept up to date."""
        on_record: AbstractContextManager[None] = nullcontext()
        if self.main and not self.store.finished:
            on_record = observed(self.events, self.display, report=self.config.tracking.report, command=command)
        with on_record, explained_run(self.store.path):
            yield

    def train(self) -> DistillResult:
        """Generations and passes, from the newest checkpoint if there is one, to student/."""
        if self.store.finished:
            self._tidy_finished()  # it may have been killed right before that
            self.display.say(f"{self.store.path} is finished: the student is in {self.store.student}.")
            return self._result()
        producer: Producer = producer_kind(self.placement)(self.shop)
        self.resources.callback(producer.close)
        if self.main:
            producer.open()
        with self.events.span(SpanName.LOAD):
            student = models.load_model(self.config.student, trained=True)
            models.stop_at(student, self.setup.tokens.vocabulary.stop_ids)
            if note := models.reading_note(student, self.config.student):
                self.display.say(note)
            trainer = Trainer(self.config, self.store, self.accelerator, student, self.setup.tokens.tokenizer, self.events)
        self.shop.room = partial(room_for_a_refresh, trainer, self.shop)
        start_trackers(self.accelerator, self.config, self.store.path / "trackers")
        at = trainer.resume(partial(Position.from_facts, generations=self.shop.config.schedule.generations)) or Position()
        if at.step:
            self.display.say(f"Going on from step {at.step}.")
        if self.main:
            self.store.rewind_metrics(at.step)
            clear_cache(self.store)
        work = RunWork(
            self.config,
            self.store,
            self.accelerator,
            trainer,
            self.placement,
            self.shop.generations,
            producer,
            StudentMeasures(self.setup, self.shop, trainer),
            at,
            self.events,
            self.display,
            self.shop.shown,
        )
        self.resources.callback(work.close)
        loop = work.loop
        view = RunView(self.store, self.config, at, loop.progress, lambda: loop.part_count, loop.generations)
        with self.display.live(view):
            work.run()
        with trainer.gathered() as finished:
            if finished is not None:
                with self.events.span(SpanName.SAVE):
                    facts = {"step": at.step, "tokens": at.tokens}
                    self._save_adapter(finished, facts)
                    self.store.save_model(self.store.student, partial(trainer.save_student, student=finished), facts)
                    self._tidy_finished()
        self.accelerator.wait_for_everyone()
        self.shop.pipeline.models.close()  # before accelerate ends what an engine shares with it
        self.accelerator.end_training()
        return self._result()

    def _save_adapter(self, finished: nn.Module, facts: dict[str, Any]) -> None:
        """What was trained beside the student, where that is an adapter and the weights below it lie somewhere."""
        student, first = self.config.student, self.store.policy(0)
        if not student.adapts:
            return
        if student.continues or student.adapter is None:
            base, revision = models.name_of(student), student.revision
        elif first.is_dir():  # fresh adapters, on weights that an older one was merged into
            base, revision = str(first.resolve()), None
        else:
            return

        def save(path: Path) -> None:
            models.save_adapter(finished, path, base, revision)

        self.store.save_model(self.store.adapter, save, facts)

    def _tidy_finished(self) -> None:
        """Drop what a finished run need not keep."""
        if self.main and not self.frozen:
            self.store.tidy(self.store.current, self.config.checkpoint.keep)
            clear_cache(self.store)

    def _result(self) -> DistillResult:
        facts = self.store.check_model(self.store.student, "student", MAKE_STUDENT_AGAIN)
        steps, tokens = facts.get("step"), facts.get("tokens")
        if type(steps) is not int or type(tokens) is not int:
            raise UserError(f"{self.store.student} is damaged (its npd.json has no steps).", MAKE_STUDENT_AGAIN)
        lines = self.store.read_metrics()
        evals = [line for line in lines if isinstance(line, EvaluationLine)]
        by_role = seconds_by_role(self.events.path)
        return DistillResult(
            run_dir=self.store.path,
            student=self.store.student,
            steps=steps,
            tokens=tokens,
            before=evals[0].figures if evals and evals[0].step in (0, *(line.step for line in evals[:-1])) else {},
            after=evals[-1].figures if evals else {},
            seconds=dict(sum((Counter(seconds) for seconds in by_role.values()), Counter())),
            by_role=by_role,
            publications=publications(read_events(self.events.path)),
            advice=advice(self.config, self.placement, list(read_events(self.events.path)), by_role),
            generations=[line.to_json() for line in lines if isinstance(line, GenerationEnd)],
            engine_note=self.here.note(self.config) if evals else "",
        )


def publications(events: Iterable[Span]) -> dict[str, float]:
    """How many snapshots were written, how long training stood still for them, and how long the writing took."""
    figures = {"count": 0.0, "blocked": 0.0, "written": 0.0}
    for event in events:
        kind = {SpanName.PUBLISH: "blocked", SpanName.WRITE: "written"}.get(event.name)  # type: ignore[call-overload]
        if kind is not None:
            figures[kind] += event.seconds
            figures["count"] += kind == "written"
    return figures


def advice(config: Config, placement: Placement, events: list[Span], by_role: dict[str, dict[str, float]]) -> str:
    """A longer lead, where the trainer waited for generations that one would have had ready; else nothing."""
    schedule = config.schedule

    def seconds(name: SpanName) -> list[float]:
        mine = (e for e in events if e.name == name and e.role == "trainer")
        return [e.seconds for e in mine if e.facts["generation"] > 0]

    waited, trained = seconds(SpanName.WAIT), seconds(SpanName.TRAIN)
    wall = by_role.get("trainer", {}).get("wall", 0.0)
    if placement.turns or schedule.kl_budget is not None or schedule.lead >= schedule.passes:
        return ""
    if not trained or sum(waited) < 0.05 * wall:
        return ""
    later = len({e.facts["generation"] for e in events if e.name == SpanName.TRAIN} - {0})
    a_pass = sum(trained) / max(1.0, later * schedule.passes)
    lead = min(schedule.passes, math.ceil(schedule.lead + sum(waited) / later / a_pass))
    what = "shortened that" if lead == schedule.passes else "had them ready"
    return (
        f"The trainer waited {sum(waited):.0f} s for later generations: schedule.lead {lead} would have {what}, at the "
        "price of older responses."
    )


def distill(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Near-policy distillation from prompts to a finished student; goes on where an earlier call was stopped.

    Raises:
        UserError: what the user gave is wrong.
        RunError: the run failed (full disk, loss not finite, nothing selected).
    """
    with Run(as_config(config), DISTILL, display) as run, run.observed("distill"):
        return run.train()


def sft(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Fine-tune on reference responses, given or the teacher's; the same loop and loss with kd_weight 0.

    Raises:
        UserError, RunError: as `distill`.
    """
    with Run(as_config(config), SFT, display) as run, run.observed("sft"):
        return run.train()


def refresh(config: AnyConfig, policy: int | str | Path | None = None, *, display: Display | None = None) -> Generation:
    """Make the next missing generation of a distillation run from a policy snapshot, the newest by default.

    `policy` is a snapshot's version, or its directory or name such as v000001.

    Raises:
        UserError: all generations are there already, or there is no such snapshot.
    """
    with Run(as_config(config), DISTILL, display, take_turns=True) as run, run.observed("refresh"):
        store, shop = run.store, run.shop
        if not store.policies():
            began = time.time()
            student = models.load_model(run.config.student, trained=True)
            models.stop_at(student, run.setup.tokens.vocabulary.stop_ids)
            begun = models.with_adapters(student, run.config.student) if run.config.student.continues else student
            store.publish(0, lambda path: models.save_model(begun, run.setup.tokens.tokenizer, path), 0)
            del student, begun
            run.display.say(f"Published the student as it starts, v000000, in {time.time() - began:.1f} s.")
        names = {store.policy(version).name: version for version in store.policies()}
        name = list(names)[-1] if policy is None else f"v{policy:06d}" if isinstance(policy, int) else Path(policy).name
        if name not in names:
            raise UserError(f"{store.path} has no policy snapshot {name}; it has {', '.join(names)}.")
        if shop.generations.mixed:
            shop.make(REFERENCE)
        for index in range(store.current, run.config.schedule.generations):
            shop.books.mend(index)
            if store.manifest(index) is None or shop.books.missing(index):
                shop.make(index, names[name])
                manifest = store.manifest(index)
                assert manifest is not None, "a finished generation has a manifest"
                return Generation(index, store.generation(index), manifest.policy_version, manifest.to_json())
    raise UserError(f"{store.path} has all {run.config.schedule.generations} generations; there is nothing to refresh.")


def reselect(config: AnyConfig, *, display: Display | None = None) -> Generation:
    """Judge the newest finished generation of a run anew by `config.selection`, from its columns alone.

    Raises:
        UserError: there is no such generation, it is being trained on, or more than the selection differs.
        RunError: the selection keeps nothing; nothing was changed then.
    """
    config, store = as_config(config), Store(as_config(config).run_dir)
    config = store.as_begun(config)
    finished = [g for g in range(config.schedule.generations) if store.manifest(g) is not None]
    if not finished:
        raise UserError(f"{store.path} has no finished generation; make one with `npd refresh` first.")
    with store.locked():
        return reselect_generation(config, store, finished[-1], display or Display(quiet=True))


def evaluate(config: AnyConfig, model: str | None = None, *, display: Display | None = None) -> tuple[str, dict[str, float]]:
    """Evaluate a model: the one named, else the run's finished student, else its newest snapshot, else the start.

    Returns:
        What was evaluated, and the figures.

    Raises:
        UserError: there is nothing to evaluate, or what the user gave is wrong.
    """
    config = as_config(config)
    store = Store(config.run_dir)
    config = settled(config, store)  # before another model takes the student's place
    if model is None:
        versions = store.policies()
        paths = [store.student] if store.finished else [store.policy(versions[-1])] if versions else []
        model = str(paths[0]) if paths else None
    if model is not None:
        config = config.model_copy(update={"student": models.snapshot_config(config.student, Path(model))})
    setup, display = prepare(config, EVAL), display or Display(quiet=True)
    for note in setup.notes:
        display.say(note)
    evaluator = Evaluator(BenchmarkSetting(config, setup.chat, setup.held_out), setup.tasks)
    if not evaluator:
        raise UserError(
            "There is nothing to evaluate: set evaluation.tasks, or data.eval together with a teacher, or evaluation.harness."
        )
    weights: Weights = ModelWeights(config.student)
    here = engine_beside_training(config, setup.placement, 1, trains=False)
    kept = Models(
        config,
        Store(config.run_dir),
        setup.tokens.vocabulary,
        setup.tokens.tokenizer.pad_token_id,
        setup.longest_prompt,
        display,
        setup.placement,
        engine=here.name,
        longest_of_teacher=setup.longest_of_teacher,
    )
    try:
        figures = evaluator(Evaluated(kept, weights, nullcontext))
    finally:
        kept.close()
    if note := here.note(config):  # beside the figures too
        display.say(note)
    return config.student.model, figures


__all__ = ["DistillResult", "Run", "distill", "evaluate", "refresh", "reselect", "sft"]
