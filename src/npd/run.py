"""The whole loop, read top to bottom: what `npd distill`, `npd sft`, `npd refresh` and `npd eval` do."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from npd import models
from npd.config import Config
from npd.errors import UserError
from npd.evaluation import Evaluator
from npd.jobs import POLL, Jobs
from npd.loaded import Loaded, warn_of_engine
from npd.loop import Loop, Trained
from npd.observe.display import Advance, Display
from npd.observe.events import Events, read_events, seconds_by_role
from npd.observe.live import RunView
from npd.observe.reporter import observed
from npd.observe.trackers import selection_figures, start_trackers
from npd.placement import Placement
from npd.refresher import Generation, Refresher, show_generation
from npd.reselect import reselect as reselection
from npd.rollout.vllm import check_options
from npd.samples import Samples, clear_cache
from npd.selection import check_some_kept
from npd.setup import AnyConfig, as_config, check_engine_place, load_tokenizers, placement_of, prepare
from npd.store import REFERENCE, Store
from npd.trainer import Trainer, make_accelerator

# Runs with more passes in all show one bar, not tables and bars for each.
MANY_PASSES = 100

T = TypeVar("T")


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
    """Seconds per kind of work over all processes: generate, score, train, wait, publish, checkpoint, evaluate, save."""
    by_role: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for the trainer and each refresh; `wall` is that process's wall-clock."""
    publications: dict[str, float] = field(default_factory=dict)
    """`count` snapshots, `blocked` seconds that training stood still for them, `written` seconds beside it."""
    advice: str = ""
    """What would make a run like this faster, if that is known."""
    generations: list[dict[str, Any]] = field(default_factory=list)
    """How each generation ended: why (passes, kl_budget, max_steps, max_tokens), after how many passes, at which KL."""


class Run:
    """One process's part in a run: what the loop decides, done with models. Holds the run's lock while entered."""

    def __init__(self, config: Config, command: str, display: Display | None = None, *, turns: bool = False) -> None:
        self.config, self.command, self.sft = config, command, command == "sft"
        self.setup = prepare(config, command, turns=turns)
        self.store = Store(config.run_dir)
        self.accelerator: Accelerator = make_accelerator(config, self.store)
        self.main, self.world = self.accelerator.is_main_process, self.accelerator.num_processes
        self.wait = self.accelerator.wait_for_everyone
        self.display = display if display is not None and self.main else Display(quiet=not self.main or display is None)
        self.placement = placement_of(config, turns=turns or self.sft, processes=self.world, writes=not self.sft)
        self.threads = torch.get_num_threads()
        self.resources = ExitStack()
        self.writer: threading.Thread | None = None

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            if self.main:
                stack.enter_context(self.store.locked())
                self.store.open(self.config, self.command)
            self.wait()
            assert self.setup.prompts is not None
            kept = self.store.keep_prompts(self.setup.prompts) if self.main else None
            self.wait()
            prompts = self.setup.prompts = kept or self.store.prompts()
            role = "trainer" if self.main else f"trainer-{self.accelerator.process_index}"
            self.events = Events(self.store.path / "events.jsonl", role)
            here = "" if self.world > 1 else self.placement.train[0]  # a teacher that evaluates stands beside the trainer
            turns = self.placement.turns and self.world == 1
            self.refresher = Refresher(
                self.config,
                self.store,
                prompts,
                self.setup.tokenizer,
                self.setup.vocabulary,
                self.display,
                self.events,
                self.placement if turns else replace(self.placement, rollout=here, teacher=here),
                sft=self.sft,
                rank=self.accelerator.process_index,
                world=self.world,
                wait=self.wait,
            )
            for note in self.setup.notes:
                self.display.say(note)
            for data, name in ((prompts, "data.train"), (self.setup.held_out, "data.eval")):
                for line in data.report() if data else ():
                    self.display.say(f"{name}: {line}")
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.writer is not None:  # something else went wrong meanwhile
            self.writer.join()
        self.refresher.models.close()
        self.resources.close()
        torch.set_num_threads(self.threads)

    def observed(self, command: str) -> AbstractContextManager[None]:
        """Around the work: its start and end go on record, and so does what it failed with; the report is kept up to date."""
        if not self.main or self.store.finished:
            return nullcontext()
        return observed(self.events, self.display, report=self.config.tracking.report, command=command)

    def train(self) -> DistillResult:
        """Generations and passes, from the newest checkpoint if there is one, to student/."""
        if self.store.finished:
            self._tidy_finished()  # it may have been killed right before that
            self.display.say(f"{self.store.path} is finished: the student is in {self.store.student}.")
            return self._result()
        self.jobs = Jobs(self.store, self.config, self.placement, self.events, self.display)
        if self.main and not self.placement.turns:
            self.store.current = self._resumed_generation()
            self.resources.enter_context(self.jobs)  # they load their models while this process loads its own
        with self.events.span("load"):
            student = models.load_model(self.config.student, trained=True)
            models.stop_at(student, self.setup.vocabulary.stop_ids)
            self.trainer = Trainer(
                self.config,
                self.store,
                self.accelerator,
                student,
                self.setup.tokenizer,
                self.events,
                kd_weight=0.0 if self.sft else self.config.loss.kd_weight,
                say=self.display.say,
            )
        setup = self.setup
        self.evaluator = Evaluator(
            self.config,
            setup.tokenizer,
            setup.vocabulary,
            setup.held_out,
            setup.tasks,
            self.refresher.models.reader,
            self.display,
        )
        start_trackers(self.accelerator, self.config, self.store.path / "trackers")
        if self.trainer.resume():
            self.display.say(f"Going on from step {self.trainer.position.step}.")
        at = self.trainer.position
        if self.main:
            self.store.rewind_metrics(at.step)
            clear_cache(self.store)
        self.loop = Loop(
            self.config,
            self,
            at,
            generations=1 if self.sft else self.config.schedule.generations,
            lead=self.placement.lead,
        )
        self._selected: set[int] | None = None
        self._write_failed: BaseException | None = None
        self.facts: dict[str, Any] = {}
        self.shown: set[int] = set()
        self.advance: Advance = lambda steps=1, note="": None
        if at.step == 0:  # a resumed trainer's weights are no longer those it started with
            self.publish(0)
        view = RunView(self.store, self.config, at, self.loop.progress, lambda: self.loop.part_count, self.loop.generations)
        self.resources.enter_context(self.display.live(view))
        self._evaluate()
        with self._overall_progress():
            self.loop.run()
        self._join_writer()
        torch.set_num_threads(self.threads)
        self._evaluate(last=True)
        if self.main:
            with self.events.span("save"):
                facts = {"step": at.step, "tokens": at.tokens}
                self.store.save_model(self.store.student, self.trainer.save_policy, facts)
                self._tidy_finished()
        self.wait()
        self.refresher.models.close()  # before accelerate ends what vLLM shares with it
        self.accelerator.end_training()
        return self._result()

    # -- what the loop asks for

    @property
    def lengths(self) -> np.ndarray:
        return self.samples.lengths

    @property
    def response_lengths(self) -> np.ndarray:
        return self.samples.response_lengths

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        if self.main:
            self._join_writer()
            self._tidy()
            self.store.current = generation
            clear_cache(self.store)
        self.wait()
        mixed = self.config.schedule.references > 0 and not self.sft
        if self.placement.turns:
            with self._room_for_a_refresh():
                if mixed:
                    self.refresher(REFERENCE, REFERENCE)
                self.refresher(generation, REFERENCE if self.sft else generation)
            self.shown.add(generation)
        elif self.main:
            if self.store.manifest(generation) is not None:  # others are looked at as they are taken
                with self.events.span("verify", generation=generation):
                    self.refresher.mend(generation)
            missing = self.store.missing_parts(generation, len(self.refresher.parts(generation)))
            if missing and self.refresher.begun_by(generation, generation) not in self.store.policies():
                raise UserError(
                    f"Generation {generation} of {self.store.path} lacks {len(missing)} parts, and the snapshot that writes "
                    "them is not there any more. Restore policy/, or delete the run directory and start over."
                )
        self.samples = Samples(self.store)
        references = [self._fetched(REFERENCE, p) for p in range(len(self.refresher.parts(REFERENCE)))] if mixed else []
        return (
            len(self.refresher.parts(generation)),
            self.refresher.responses(generation),
            np.concatenate([np.empty(0, np.int64), *references]),
        )

    def next_part(self, taken: list[int]) -> int:
        generation = self.trainer.position.generation

        def landed() -> int | None:
            there = self.store.parts(generation) - set(taken)
            if len(self.placement.jobs) == 1 or self.store.manifest(generation) is not None:
                # They have landed in order, or all have: one that is missing was lost, and `take` waits for it.
                return min(set(range(self.loop.part_count)) - set(taken))
            return min(there, default=None)

        def find() -> int:
            part = landed()
            if part is None:
                with self._waiting(generation) as show:
                    while (part := landed()) is None:
                        show()
                        self._pause()
            return part

        return self._decided_by_main(find)

    def take(self, part: int) -> tuple[np.ndarray, int]:
        generation = self.trainer.position.generation
        rows = self.refresher.parts(generation)[part]
        each = self.refresher.responses(generation) // self.refresher.parts(generation)[-1].stop
        return self._fetched(generation, part), (rows.stop - rows.start) * each

    @contextmanager
    def training(self) -> Iterator[None]:
        at, passes = self.trainer.position, self.config.schedule.passes
        name = f"generation {at.generation}, pass {at.passes + 1}/{passes}: train"
        with (
            self.events.span("train", generation=at.generation, passes=at.passes),
            self.display.task(name, 100, "%") as self.advance,
        ):
            self._advanced = 0.0
            yield
        self._advance_run()

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        if self.placement.train_threads is not None and self.world == 1:
            beside = min(self.threads, self.placement.train_threads)
            torch.set_num_threads(self.threads if self.loop.alone else beside)
        if self.main:
            self.jobs.check()
        facts, self.facts = self.facts, {}
        trained, loss = self.trainer.step(self.samples, rows, tokens, progress, facts)
        self.advance(100 * steps - self._advanced, note=f"loss {loss:.4f}")
        self._advanced = 100 * steps
        return trained

    def publish(self, version: int) -> None:
        if self.command == "distill" and self.main:
            self._join_writer()
            began = time.perf_counter()
            with self.events.span("publish", version=version):
                if version in self.store.policies():
                    self.store.point_to_newest_policy()  # if a crash came between
                else:
                    self._write(version, self.trainer.copy_policy(), self.trainer.position.step)
            self.facts = {"published": version, "publish_seconds": time.perf_counter() - began}
        if self.placement.turns:
            self._join_writer()
        self.wait()

    def checkpoint(self) -> None:
        self._join_writer()  # a resumed run never finds a snapshot missing that was due before
        self.trainer.save_checkpoint()

    def pass_done(self) -> None:
        if not len(self.loop.kept):
            self._complete()  # which says what selection did
        self._log_selection()
        self._show_finished()
        self._evaluate()

    def generation_done(self, reason: str, passes: float) -> None:
        at = self.trainer.position
        if len(at.parts) == self.loop.part_count:
            self._complete()
        self._show_finished()
        line: dict[str, Any] = {"generation": at.generation, "generation_ended": reason, "passes": passes}
        if at.near_policy_kl is not None and self.trainer.near_policy_is_proxy:
            line["near_policy_kl_is_proxy"] = True
        self.trainer.log({"step": at.step, **line, "near_policy_kl_smoothed": at.near_policy_kl})
        if self.main and self.placement.jobs and len(at.parts) < self.loop.part_count and reason == "kl_budget":
            self.display.say(
                f"Generation {at.generation} passed schedule.kl_budget in its first pass, after {passes:.2f} passes: its "
                "responses were too old before all were read. A smaller schedule.lead, or a larger budget, wastes less."
            )

    # -- how it is done

    def _log_selection(self) -> None:
        """A generation's selection as metrics, at the end of the first pass over it."""
        at = self.trainer.position
        if self.sft or not self.main or at.passes != 1:
            return
        self._complete()
        manifest = self.store.manifest(at.generation)
        if self._selected is None:  # a resumed run has logged some
            lines = self.store.read_metrics()
            self._selected = {line["selection/generation"] for line in lines if "selection/generation" in line}
        if manifest is not None and at.generation not in self._selected:
            self._selected.add(at.generation)
            self.trainer.log({"step": at.step, "selection": True, **selection_figures(manifest)})

    def _complete(self) -> None:
        """See that a generation whose parts have all landed has its manifest; usually the refresh has written it."""
        generation = self.trainer.position.generation
        while self.main and not self.placement.turns and self.store.manifest(generation) is None:
            for part in self.store.missing_parts(generation, self.loop.part_count):  # lost since
                self.jobs.wake(part)
                self._pause()
                break
            else:
                try:
                    self.refresher.finish(generation)
                    self.shown.add(generation)
                except (UserError, FileNotFoundError):
                    self.refresher.mend(generation)
        manifest = self.store.manifest(generation) if self.main and not self.placement.turns else None
        if manifest is not None:
            check_some_kept(manifest["selection"], self.config.selection)

    def _decided_by_main(self, decide: Callable[[], T]) -> T:
        """The main process's answer, on every process."""
        if self.world == 1:
            return decide()
        answer = [decide() if self.main else None]
        broadcast_object_list(answer)
        return answer[0]  # type: ignore[return-value]

    def _fetched(self, generation: int, part: int) -> np.ndarray:
        """Indices of a part's kept samples, once it is there and whole."""

        def fetch() -> None:
            path = self.store.part(generation, part)
            while True:
                if not path.exists():
                    with self._waiting(generation) as show:
                        while not path.exists():
                            show()
                            self._make_or_pause(generation, part)
                try:
                    return self.samples.fetch(generation, part)
                except FileNotFoundError:
                    continue
                except UserError as error:
                    if self.placement.turns and self.world > 1:
                        raise
                    self.display.say(f"{str(error).split(' Delete it')[0]} It is made again.")
                    path.unlink(missing_ok=True)

        self._decided_by_main(fetch)
        return self.samples.take(generation, part)

    def _make_or_pause(self, generation: int, part: int) -> None:
        if self.placement.turns:
            with self._room_for_a_refresh():
                self.refresher(generation, REFERENCE if self.sft else generation)
        else:
            self.jobs.wake(part)
            self._pause()

    def _pause(self) -> None:
        self.jobs.check()
        if self.writer is not None and not self.writer.is_alive():
            self._join_writer()  # and hear whether it failed
        time.sleep(POLL / 4)

    @contextmanager
    def _waiting(self, generation: int) -> Iterator[Callable[[], None]]:
        """Around waiting; call the result now and then to show how many parts have landed."""
        whose = "the references" if generation == REFERENCE else f"generation {generation}"
        if not self.placement.turns and not self.placement.jobs:
            whose += " (npd refresh --follow)"
        count, shown = len(self.refresher.parts(generation)), 0
        with (
            self.events.span("wait", generation=generation),
            self.display.task(f"wait for {whose}", count, "parts") as advance,
        ):

            def show() -> None:
                nonlocal shown
                there = len(self.store.parts(generation))
                advance(there - shown)
                shown = there

            yield show

    def _write(self, version: int, state: models.State, step: int) -> None:
        """Write a snapshot beside the training."""

        def write() -> None:
            try:
                with self.events.span("write", version=version):
                    self.store.publish(version, partial(self.trainer.save_policy, state=state), step)
            except BaseException as error:
                self._write_failed = error

        self._write_failed = None
        self.writer = threading.Thread(target=write, name="publisher")
        self.writer.start()

    def _join_writer(self) -> None:
        """Wait until the snapshot that is being written is whole.

        Raises:
            RunError: it could not be written.
        """
        if self.writer is not None:
            with self.events.span("publish") if self.writer.is_alive() else nullcontext():
                self.writer.join()
            self.writer = None
            if self._write_failed is not None:
                raise self._write_failed

    def _tidy(self) -> None:
        """Drop what no checkpoint leads back to and `checkpoint.keep` does not ask for."""
        if not self.sft:
            self.store.tidy(self._resumed_generation(oldest=True), self.config.checkpoint.keep)

    def _tidy_finished(self) -> None:
        """Drop what a finished run need not keep."""
        if self.main:
            self.store.tidy(self.store.current, self.config.checkpoint.keep)
            clear_cache(self.store)

    def _resumed_generation(self, oldest: bool = False) -> int:
        """The generation that a resumed run would go on with, from its newest or its oldest checkpoint."""
        steps = self.store.checkpoints()
        return self.store.checkpoint_facts(steps[0 if oldest else -1])["generation"] if steps else 0

    @contextmanager
    def _room_for_a_refresh(self) -> Iterator[None]:
        """On a GPU that is shared, models are there in turns: the trainer's leave it, and the teacher afterwards."""
        if not self.placement.shared_gpu:
            yield
            return
        with self.trainer.parked():
            with self._teacher_at_hand():
                yield
            self.refresher.models.release()

    @contextmanager
    def _teacher_at_hand(self) -> Iterator[None]:
        if self.placement.shared_gpu:
            self.refresher.models.move_teachers(self.placement.teacher)
        yield
        if self.placement.shared_gpu:
            self.refresher.models.move_teachers("cpu")
            torch.cuda.empty_cache()

    def _evaluate(self, last: bool = False) -> None:
        """Evaluate if it is due here and was not done before."""
        at = self.trainer.position
        passes = at.generation * self.config.schedule.passes + at.passes
        due = last or (at.batch == 0 and passes % self.config.evaluation.every_passes == 0)
        if self.evaluator and due and self.main and not self._evaluated(at.step):
            self._join_writer()  # generation changes the model's generation_config, which a snapshot has too
            with self.events.span("evaluate", step=at.step), self._teacher_at_hand():
                self._evaluate_teacher()
                figures = self.evaluator(self.trainer.base)
            self.trainer.log({"step": at.step, "eval": True, **figures})
            shown = [f"{key.removeprefix('eval/')} {value:.4g}" for key, value in figures.items() if shows(key)]
            self.display.say(f"step {at.step}: {', '.join(shown)}")
        self.wait()

    def _evaluate_teacher(self) -> None:
        """The teacher's own figures on the tasks, once a run, where evaluation.teacher asks for them."""
        options = self.config.evaluation
        if not (options.teacher and options.tasks):
            return
        if not any("teacher" in line for line in self.store.read_metrics()):
            figures = self.evaluator.of_teacher()
            self.trainer.log({"step": self.trainer.position.step, "teacher": True, **figures})
            shown = [f"{key.removeprefix('teacher/')} {value:.4g}" for key, value in figures.items() if shows(key)]
            self.display.say(f"teacher: {', '.join(shown)}")

    def _evaluated(self, step: int) -> bool:
        return any(line["step"] == step and "eval" in line for line in self.store.read_metrics())

    # -- what is shown

    @contextmanager
    def _overall_progress(self) -> Iterator[None]:
        """One bar for a run of many short generations, such as strict on-policy; each shows its own otherwise."""
        self._advance_run: Callable[[], None] = lambda: None
        if self.loop.generations * self.config.schedule.passes <= MANY_PASSES:
            yield
            return
        with self.display.task(self.command, 100, "%") as show:
            done = 0.0

            def advance() -> None:
                nonlocal done
                share, at = 100 * self.loop.progress(), self.trainer.position
                show(share - done, note=f"step {at.step}, generation {at.generation}")
                done = share

            self._advance_run = advance
            yield

    def _show_finished(self) -> None:
        """The table of a generation that was made beside the training, once it is whole."""
        generation = self.trainer.position.generation
        manifest = None if generation in self.shown or not self.main else self.store.manifest(generation)
        if manifest is not None:
            self.shown.add(generation)
            show_generation(generation, manifest, self.display)
            if "engine" in manifest:
                warn_of_engine(manifest["engine"], self.config.rollout.check_bound, self.display)

    def _advice(self, by_role: dict[str, dict[str, float]]) -> str:
        """A longer lead, where the trainer waited for generations that one would have had ready."""
        schedule, events = self.config.schedule, list(read_events(self.events.path))

        def seconds(name: str) -> list[float]:
            mine = (e for e in events if e["name"] == name and e["role"] == "trainer")
            return [e["end"] - e["start"] for e in mine if e["generation"] > 0]

        waited, trained = seconds("wait"), seconds("train")
        wall = by_role.get("trainer", {}).get("wall", 0.0)
        if self.placement.turns or schedule.kl_budget is not None or schedule.lead >= schedule.passes:
            return ""
        if not trained or sum(waited) < 0.05 * wall:
            return ""
        later = len({e["generation"] for e in events if e["name"] == "train"} - {0})
        a_pass = sum(trained) / max(1.0, later * schedule.passes)
        lead = min(schedule.passes, math.ceil(schedule.lead + sum(waited) / later / a_pass))
        what = "shortened that" if lead == schedule.passes else "had them ready"
        return (
            f"The trainer waited {sum(waited):.0f} s for later generations: schedule.lead {lead} would have {what}, at the "
            "price of older responses."
        )

    def _result(self) -> DistillResult:
        facts = self.store.check_model(self.store.student)
        lines = self.store.read_metrics()
        evals = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval" in line]
        by_role = seconds_by_role(self.events.path)
        return DistillResult(
            run_dir=self.store.path,
            student=self.store.student,
            steps=facts["step"],
            tokens=facts["tokens"],
            before=evals[0] if evals else {},
            after=evals[-1] if evals else {},
            seconds=dict(sum((Counter(seconds) for seconds in by_role.values()), Counter())),
            by_role=by_role,
            publications=publications(read_events(self.events.path)),
            advice=self._advice(by_role),
            generations=[line for line in lines if "generation_ended" in line],
        )


def publications(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How many snapshots were written, how long training stood still for them, and how long the writing took."""
    figures = {"count": 0.0, "blocked": 0.0, "written": 0.0}
    for event in events:
        kind = {"publish": "blocked", "write": "written"}.get(event["name"])
        if kind is not None:
            figures[kind] += event["end"] - event["start"]
            figures["count"] += kind == "written"
    return figures


def shows(key: str) -> bool:
    """Is this figure one for a person to see, rather than an interval's end or a count?"""
    return not key.endswith(("_low", "_high", "_tokens"))


def distill(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Near-policy distillation from prompts to a finished student; goes on where an earlier call was stopped.

    Raises:
        UserError: what the user gave is wrong.
        RunError: the run failed (full disk, loss not finite, nothing selected).
    """
    with Run(as_config(config), "distill", display) as run, run.observed("distill"):
        return run.train()


def sft(config: AnyConfig, *, display: Display | None = None) -> DistillResult:
    """Fine-tune on reference responses, given or the teacher's; the same loop and loss with kd_weight 0."""
    with Run(as_config(config), "sft", display) as run, run.observed("sft"):
        return run.train()


def refresh(config: AnyConfig, policy: int | str | Path | None = None, *, display: Display | None = None) -> Generation:
    """Make the next missing generation of a distillation run from a policy snapshot, the newest by default.

    `policy` is a snapshot's version, or its directory or name such as v000001.

    Raises:
        UserError: all generations are there already, or there is no such snapshot.
    """
    with Run(as_config(config), "distill", display, turns=True) as run, run.observed("refresh"):
        store = run.store
        if not store.policies():
            began = time.time()
            student = models.load_model(run.config.student, trained=True)
            models.stop_at(student, run.setup.vocabulary.stop_ids)
            store.publish(0, lambda path: models.save_model(student, run.setup.tokenizer, path), 0)
            del student
            run.display.say(f"Published the student as it starts, v000000, in {time.time() - began:.1f} s.")
        names = {store.policy(version).name: version for version in store.policies()}
        name = list(names)[-1] if policy is None else f"v{policy:06d}" if isinstance(policy, int) else Path(policy).name
        if name not in names:
            raise UserError(f"{store.path} has no policy snapshot {name}; it has {', '.join(names)}.")
        if run.config.schedule.references:
            run.refresher(REFERENCE, REFERENCE)
        for index in range(store.current, run.config.schedule.generations):
            count = len(run.refresher.parts(index))
            run.refresher.mend(index)
            if store.manifest(index) is None or store.missing_parts(index, count):
                return run.refresher(index, names[name])
    raise UserError(f"{store.path} has all {run.config.schedule.generations} generations; there is nothing to refresh.")


def reselect(config: AnyConfig, *, display: Display | None = None) -> Generation:
    """Judge the newest finished generation of a run anew by `config.selection`, from its columns alone.

    Raises:
        UserError: there is no such generation, it is being trained on, or more than the selection differs.
        RunError: the selection keeps nothing; nothing was changed then.
    """
    config, store = as_config(config), Store(as_config(config).run_dir)
    finished = [g for g in range(config.schedule.generations) if store.manifest(g) is not None]
    if not finished:
        raise UserError(f"{store.path} has no finished generation; make one with `npd refresh` first.")
    with store.locked():
        return reselection(config, store, finished[-1], display or Display(quiet=True))


def follower(config: Config, placement: Placement | None, rank: int, world: int, display: Display) -> Refresher:
    """What makes the generations of a run from its directory alone, on devices of this machine."""
    store = Store(config.run_dir)
    tokenizer, vocabulary, _, _ = load_tokenizers(config)
    if placement is None:  # the trainer's device is another machine's
        anywhere = config.placement.model_copy(update={"train": "auto"})
        placement = placement_of(config.model_copy(update={"placement": anywhere}), turns=True)
        if config.rollout.engine == "vllm":
            check_options(config.rollout.vllm)
            check_engine_place(config, placement, 1, trains=False)
    models.place_on(placement.rollout)
    return Refresher(
        config,
        store,
        store.prompts(),
        tokenizer,
        vocabulary,
        display,
        Events(store.path / "events.jsonl", f"refresh-{rank}"),
        placement,
        rank=rank,
        world=world,
    )


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
    setup, display = prepare(config, "eval"), display or Display(quiet=True)
    for note in setup.notes:
        display.say(note)
    placed = placement_of(config, turns=True, writes=False)
    loaded = Loaded(config, Store(config.run_dir), setup.vocabulary, setup.tokenizer.pad_token_id, 0, display, placed)
    evaluator = Evaluator(
        config,
        setup.tokenizer,
        setup.vocabulary,
        setup.held_out,
        setup.tasks,
        loaded.reader,
        display,
    )
    if not evaluator:
        raise UserError("There is nothing to evaluate: set evaluation.tasks, or data.eval together with a teacher.")
    return config.student.model, evaluator(models.load_model(config.student))
