"""What the loop asks for, done with models: parts taken as they land, steps, snapshots, checkpoints, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from npd.config import Config
from npd.errors import UserError
from npd.observe.console import show_generation, warn_of_age, warn_of_engine
from npd.observe.display import Advance, Display, untold
from npd.observe.events import Events, SpanName
from npd.observe.trackers import Trackers
from npd.placement import Placement
from npd.records import GenerationEnd, Line, SelectionLine, StepLine
from npd.store import REFERENCE, Store
from npd.train.evaluating import Evaluations, Measures
from npd.train.loop import KL_BUDGET, MAX_STEPS, MAX_TOKENS, Loop, Position, Trained
from npd.train.publisher import Publisher, snapshot_dtype
from npd.train.samples import Samples, clear_cache
from npd.train.trainer import Trainer

PAUSE = 0.025  # seconds between looks at what is waited for
MANY_PASSES = 100  # in all: such a run shows one bar, not tables and bars for each

T = TypeVar("T")


class Contents(Protocol):
    """What generations hold: see npd.generations.generation.Generations."""

    @property
    def by_student(self) -> bool: ...

    @property
    def mixed(self) -> bool: ...

    def is_reference(self, generation: int) -> bool: ...

    def parts(self, generation: int) -> list[slice]: ...

    def per_prompt(self, generation: int) -> int: ...

    def responses(self, generation: int) -> int: ...


class Supply(Protocol):
    """Who makes generations: see npd.generations.producer.Producer."""

    @property
    def in_turns(self) -> bool: ...

    @property
    def waits_for(self) -> str: ...

    def begin(self, generation: int) -> None: ...

    def landed(self, generation: int, taken: list[int]) -> int | None: ...

    def want(self, generation: int, part: int) -> None: ...

    def check(self) -> None: ...

    def complete(self, generation: int, pause: Callable[[], None]) -> None: ...


class RunWork:
    """Does what the loop decides, in each process that trains.

    `at` is where the loop stands; it is read here and never changed.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        accelerator: Accelerator,
        trainer: Trainer,
        placement: Placement,
        contents: Contents,
        supply: Supply,
        measures: Measures,
        at: Position,
        events: Events,
        display: Display,
        shown: set[int],
    ) -> None:
        self.config, self.store, self.accelerator, self.trainer = config, store, accelerator, trainer
        self.placement, self.contents, self.supply = placement, contents, supply
        self.at, self.events, self.display = at, events, display
        self.main, self.world = accelerator.is_main_process, accelerator.num_processes
        self.wait = accelerator.wait_for_everyone
        self.trackers = Trackers(accelerator, display.say)
        self.publisher = Publisher(store, trainer, events, snapshot_dtype(config, placement))
        self.loop = Loop(config, self, at, generations=config.schedule.generations, lead=placement.lead)
        self.evaluations = Evaluations(config, store, measures, at, events, display, self._log)
        self.samples = Samples(store)
        self.threads = torch.get_num_threads()
        self._shown = shown  # generations whose table was shown
        self._logged: set[int] | None = None  # generations whose selection is in the metrics
        self._published: int | None = None  # since the last step, and how long training stood still for it
        self._publish_seconds: float | None = None
        self._advance: Advance = untold
        self._advance_run: Callable[[], None] = untold
        self._advanced = 0.0
        self._checkpointed = at.step if at.step else None  # the step of the newest checkpoint

    def run(self) -> None:
        """From the position to the end of the run; the student is then what is to be saved."""
        if self.at.step == 0:  # a resumed trainer's weights are no longer those it started with
            self.publish(0)
        self._evaluate()
        with self._overall_progress():
            self.loop.run()
        self.publisher.join()
        torch.set_num_threads(self.threads)
        self._evaluate(last=True)

    def close(self) -> None:
        """Let what is being written end, and give the threads back."""
        self.publisher.close()
        torch.set_num_threads(self.threads)

    # -- what the loop asks for

    @property
    def lengths(self) -> np.ndarray:
        return self.samples.lengths

    @property
    def response_lengths(self) -> np.ndarray:
        return self.samples.response_lengths

    def begin(self, generation: int) -> tuple[int, int, np.ndarray]:
        if self.main:
            self.publisher.join()
            self.store.tidy(self.store.resumed_generation(oldest=True), self.config.checkpoint.keep)
            self.store.current = generation
            clear_cache(self.store)
        self.wait()
        self.supply.begin(generation)
        self.samples = Samples(self.store)
        references = []
        if self.contents.mixed:
            references = [self._fetched(REFERENCE, part) for part in range(len(self.contents.parts(REFERENCE)))]
        return (
            len(self.contents.parts(generation)),
            self.contents.responses(generation),
            np.concatenate([np.empty(0, np.int64), *references]),
        )

    def next_part(self, taken: list[int]) -> int:
        generation = self.at.generation

        def find() -> int:
            part = self.supply.landed(generation, taken)
            if part is None:
                with self._waiting(generation) as show:
                    while (part := self.supply.landed(generation, taken)) is None:
                        show()
                        self._pause()
            return part

        return self._decided_by_main(find)

    def take(self, part: int) -> tuple[np.ndarray, int]:
        generation = self.at.generation
        rows = self.contents.parts(generation)[part]
        return self._fetched(generation, part), (rows.stop - rows.start) * self.contents.per_prompt(generation)

    @contextmanager
    def training(self) -> Iterator[None]:
        at, passes = self.at, self.config.schedule.passes
        name = f"generation {at.generation}, pass {at.passes + 1}/{passes}: train"
        with (
            self.events.span(SpanName.TRAIN, generation=at.generation, passes=at.passes),
            self.display.task(name, 100, "%", short="train") as self._advance,
        ):
            self._advanced = 0.0
            yield
        self._advance_run()

    def step(self, rows: list[list[int]], tokens: int, progress: float, steps: float) -> Trained:
        if self.placement.train_threads is not None and self.world == 1:
            beside = min(self.threads, self.placement.train_threads)
            torch.set_num_threads(self.threads if self.loop.alone else beside)
        if self.main:
            self.supply.check()
        at = self.at
        found = self.trainer.step(self.samples, rows, tokens, at.step, progress)
        self._log(
            StepLine(
                at.step,
                at.generation,
                at.passes,
                at.tokens,
                found.loss,
                found.ce,
                found.kd,
                found.kl / found.kl_tokens if found.kl_tokens else None,
                found.lr,
                found.grad_norm,
                found.fill,
                found.tokens_per_second,
                published=self._published,
                publish_seconds=self._publish_seconds,
                near_policy_kl_is_proxy=bool(found.kl_tokens) and self.near_policy_is_proxy,
                reference_tokens=tokens - found.kl_tokens if found.kl_tokens < tokens else None,
            )
        )
        self._published = self._publish_seconds = None
        self._advance(100 * steps - self._advanced, note=f"loss {found.loss:.4f}")
        self._advanced = 100 * steps
        return Trained(found.kl, found.kl_tokens)

    def publish(self, version: int) -> None:
        if self.contents.by_student and (self.main or self.trainer.sharded):
            began = time.perf_counter()
            self.publisher.publish(version, self.at.step)
            self._published, self._publish_seconds = version, time.perf_counter() - began
        if self.supply.in_turns:
            self.publisher.join()
        self.wait()

    def checkpoint(self) -> None:
        self.publisher.join()  # a resumed run never finds a snapshot missing that was due before
        self.trainer.save_checkpoint(self.at.step, asdict(self.at))
        self._checkpointed = self.at.step

    def _checkpoint_before(self, *, last: bool) -> None:
        """A kill in an evaluation that takes long repeats the evaluation alone."""
        if self.evaluations.slow(last=last) and self._checkpointed != self.at.step:
            self.checkpoint()

    def pass_done(self) -> None:
        if not len(self.loop.kept):
            self._complete()  # which says what selection did
        self._log_selection()
        self._show_finished()
        self._checkpoint_before(last=False)
        self._evaluate()

    def generation_done(self, reason: str, passes: float) -> None:
        at = self.at
        taken = len(at.parts) == self.loop.part_count
        if taken:
            self._complete()
        self._show_finished()
        if reason in (MAX_STEPS, MAX_TOKENS) or at.generation + 1 == self.loop.generations:
            self._checkpoint_before(last=True)  # here: behind the last generation a run stands nowhere
        self._log(
            GenerationEnd(
                at.step,
                generation=at.generation,
                reason=reason,
                passes=passes,
                near_policy_kl_is_proxy=at.near_policy_kl is not None and self.near_policy_is_proxy,
                near_policy_kl_smoothed=at.near_policy_kl,
            )
        )
        if self.main and self.placement.workers and not taken and reason == KL_BUDGET:
            warn_of_age(at.generation, passes, self.display)

    # -- how it is done

    @property
    def near_policy_is_proxy(self) -> bool:
        """Samples not drawn from the plain policy make the near-policy KL a proxy."""
        return self.config.rollout.temperature != 1.0 or self.config.rollout.top_p != 1.0

    def _log(self, line: Line) -> None:
        """One line of metrics.jsonl, and the same figures to every tracker."""
        if self.main:
            self.store.append_metrics(line)
        self.trackers.log(line)

    def _log_selection(self) -> None:
        """A generation's selection as metrics, at the end of the first pass over it."""
        at = self.at
        if self.contents.is_reference(at.generation) or not self.main or at.passes != 1:
            return
        self._complete()
        manifest = self.store.manifest(at.generation)
        if self._logged is None:  # a resumed run has logged some
            lines = self.store.read_metrics()
            self._logged = {line.generation for line in lines if isinstance(line, SelectionLine)}
        if manifest is not None and at.generation not in self._logged:
            self._logged.add(at.generation)
            self._log(SelectionLine.of(at.step, manifest))

    def _complete(self) -> None:
        """See that a generation whose parts have all landed has its manifest; usually it was written meanwhile."""
        if self.main:
            self.supply.complete(self.at.generation, self._pause)

    def _decided_by_main(self, decide: Callable[[], T]) -> T:
        """The main process's answer, on every process."""
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
                            self.supply.want(generation, part)
                            if not path.exists():
                                self._pause()
                try:
                    return self.samples.fetch(generation, part)
                except FileNotFoundError:
                    continue
                except UserError as error:
                    if self.supply.in_turns and self.world > 1:
                        raise
                    self.display.say(f"{error.what} It is made again.")
                    path.unlink(missing_ok=True)

        self._decided_by_main(fetch)
        return self.samples.add(generation, part)

    def _pause(self) -> None:
        self.store.check_there()
        self.supply.check()
        self.publisher.check()
        time.sleep(PAUSE)

    @contextmanager
    def _waiting(self, generation: int) -> Iterator[Callable[[], None]]:
        """Around waiting; call the result now and then to show how many parts have landed."""
        whose = "the references" if generation == REFERENCE else f"generation {generation}"
        if self.supply.waits_for:
            whose += f" ({self.supply.waits_for})"
        count, shown = len(self.contents.parts(generation)), 0
        with (
            self.events.span(SpanName.WAIT, generation=generation),
            self.display.task(f"wait for {whose}", count, "parts") as advance,
        ):

            def show() -> None:
                nonlocal shown
                there = len(self.store.parts(generation))
                advance(there - shown)
                shown = there

            yield show

    def _evaluate(self, last: bool = False) -> None:
        """Evaluate if it is due here and was not done before."""
        if self.evaluations.due(last=last) and self._decided_by_main(lambda: self.evaluations.pending(last=last)):
            self.publisher.join()  # generation changes the model's generation_config, which a snapshot has too
            with self.trainer.gathered() as student:
                if student is not None:
                    self.evaluations.run(student, last=last)
        self.wait()

    # -- what is shown

    @contextmanager
    def _overall_progress(self) -> Iterator[None]:
        """One bar for a run of many short generations, such as strict on-policy; each shows its own otherwise."""
        if self.loop.generations * self.config.schedule.passes <= MANY_PASSES:
            yield
            return
        with self.display.task("train", 100, "%") as show:
            done = 0.0

            def advance() -> None:
                nonlocal done
                share = 100 * self.loop.progress()
                show(share - done, note=f"step {self.at.step}, generation {self.at.generation}")
                done = share

            self._advance_run = advance
            yield

    def _show_finished(self) -> None:
        """The table of a generation that was made beside the training, once it is whole."""
        generation = self.at.generation
        manifest = None if generation in self._shown or not self.main else self.store.manifest(generation)
        if manifest is not None:
            self._shown.add(generation)
            show_generation(manifest, self.display)
            if manifest.engine is not None:
                warn_of_engine(manifest.engine, self.config.rollout.check_bound, self.display)
