"""Prompts to a finished generation: rollout, scoring, selection, store."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from npd.config import Config
from npd.errors import UserError
from npd.loaded import Loaded, engine_difference
from npd.models import Vocabulary
from npd.observe.console import show_generation, warn_of_engine
from npd.observe.display import Advance, Display
from npd.observe.events import Events, SpanName, read_events
from npd.placement import Placement
from npd.prompts import Prompts
from npd.records import EngineCheck, Manifest, SelectionSummary
from npd.rollout import TransformersRollout
from npd.schedule import derive_seed, generation_size, parts_of_generation, prompts_of_generation
from npd.scoring import Routed, ScoreStudent, ScoreTeacher
from npd.selection import Select, Summary, check_some_kept
from npd.store import REFERENCE, Store

if TYPE_CHECKING:
    from npd.rollout.vllm import VllmRollout

Answers = Iterator[tuple[int, pa.Table]]

CHECKED_TOKENS = 64  # of each response by which an engine is compared with transformers

SUMMARY = ["verdict", "source", "delta_ifd", "finish_reason", "response_ids", "student_nll_free"]


@dataclass(frozen=True)
class Generation:
    """A finished generation on disk."""

    index: int
    path: Path
    policy_version: int
    manifest: Manifest


class Refresher:
    """Makes generations. Its models are loaded once, and only if something is missing.

    Args:
        sft: generations are reference responses, without scores.
        rank, world: of every `world` parts this process makes one.
        wait: returns once every one of those processes has come here.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        display: Display,
        events: Events,
        placement: Placement,
        *,
        sft: bool = False,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.store, self.prompts, self.vocabulary = config, store, prompts, vocabulary
        self.display, self.events, self.placement = display, events, placement
        self.sft, self.rank, self.world, self.wait = sft, rank, world, wait
        self.models = Loaded(config, store, vocabulary, tokenizer.pad_token_id, prompts.longest, display, placement)
        self._checked: set[int] = set()  # generations whose engine was compared with transformers

    # -- what a generation is

    def is_reference(self, generation: int) -> bool:
        return self.sft or generation == REFERENCE

    def parts(self, generation: int) -> list[slice]:
        """The parts of a generation, as slices of its prompts."""
        size = len(self._references) if generation == REFERENCE else self._size
        return parts_of_generation(size, self.config.rollout.part_size)

    def responses(self, generation: int) -> int:
        """Responses of a generation, dropped ones included."""
        each = 1 if self.is_reference(generation) else self.config.rollout.samples_per_prompt
        return (len(self._references) if generation == REFERENCE else self._size) * each

    @property
    def _size(self) -> int:
        return len(self.prompts) if self.sft else generation_size(len(self.prompts), self.config.schedule)

    @cached_property
    def _references(self) -> np.ndarray:
        """Prompts whose reference responses are mixed in: as many as the whole run can use, once each."""
        schedule = self.config.schedule
        usable = usable_references(self.config, self.prompts)
        per_pass = schedule.references / (1 - schedule.references) * self.responses(0)
        wanted = math.ceil(1.1 * per_pass * schedule.passes * schedule.generations)  # they may be the shorter ones
        order = np.random.default_rng(derive_seed(self.config.seed, "reference prompts")).permutation(usable)
        return order[:wanted]

    def _table(self, generation: int, part: int) -> pa.Table:
        here = self.parts(generation)[part]
        if generation == REFERENCE:
            return self.prompts.take(self._references[here])
        schedule = self.config.schedule.model_copy(update={"prompts": "all"}) if self.sft else self.config.schedule
        indices = prompts_of_generation(len(self.prompts), generation, schedule, self.config.seed, here)
        return self.prompts.take(indices)

    # -- making it

    def __call__(self, generation: int, policy_version: int) -> Generation:
        """Make whatever parts of a generation are missing or damaged, then its manifest.

        A generation that another snapshot began is finished with that snapshot.

        Raises:
            RunError: selection left nothing.
            UserError: the snapshot is damaged, or is no longer kept.
        """
        if self.rank == 0:
            self.mend(generation)
        self.wait()  # every process sees the same parts before any of them begins to make what is missing
        self.make_parts(generation, iter(self.missing(generation)), policy_version)
        self.models.release()
        self.wait()
        if self.rank == 0 and self.store.manifest(generation) is None:
            self.finish(generation)
        self.wait()
        manifest = self.store.manifest(generation)
        assert manifest is not None, "a finished generation has a manifest"
        check_some_kept(manifest.selection, self.config.selection)
        return Generation(generation, self.store.generation(generation), manifest.policy_version, manifest)

    def mend(self, generation: int) -> None:
        """Delete damaged parts, so that they are made again: by the manifest if there is one, else by reading them."""
        if self.store.manifest(generation) is None:
            for part in self.store.parts(generation):
                self.drop_if_damaged(generation, part)
        for name in self.store.drop_damaged_parts(generation):
            self.display.say(f"{self.store.generation(generation) / name} was damaged; it is made again.")

    def missing(self, generation: int) -> list[int]:
        """Parts that this process has yet to make."""
        parts = self.store.missing_parts(generation, len(self.parts(generation)))
        return [part for part in parts if part % self.world == self.rank]

    def begun_by(self, generation: int, policy_version: int) -> int:
        """The snapshot that wrote what there is of a generation; `policy_version` if there is nothing."""
        for part in sorted(self.store.parts(generation)):
            try:
                return int(self.store.read_part(generation, part, ["policy_version"])["policy_version"][0].as_py())
            except (UserError, FileNotFoundError):  # damaged; it is made again
                continue
        manifest = self.store.manifest(generation)
        return policy_version if manifest is None else manifest.policy_version

    def make_parts(self, generation: int, parts: Iterator[int], policy_version: int) -> None:
        """Make parts, with the snapshot that began the generation or else with `policy_version`.

        An engine that batches continuously asks for the next parts while it answers one.
        """
        if self.is_reference(generation):
            for part in parts:
                with self.events.span(SpanName.PART, generation=generation, part=part):
                    self._store(generation, part, self._reference_part(generation, part))
            return
        version = self.begun_by(generation, policy_version)
        with self._scoring(generation, version) as (finish, check):
            for part, table in self._answered(generation, parts, version, check):
                finish(part, table)

    def _store(self, generation: int, part: int, table: pa.Table) -> None:
        with self.events.span(SpanName.STORE, generation=generation, part=part):
            self.store.write_part(generation, part, table)

    def _answered(self, generation: int, parts: Iterator[int], version: int, check: Callable[[], None]) -> Answers:
        """The student's answers, part by part; `check` is called now and then meanwhile."""
        first = next(parts, None)
        if first is None:
            return
        with self.events.span(SpanName.LOAD):
            engine = self.models.engine(version)
        waiting: list[int] = []  # parts that are asked for and not answered

        def seed(part: int) -> int:
            return derive_seed(self.config.seed, "rollout", version, generation, part)

        def asked() -> Answers:
            for part in itertools.chain([first], parts):
                waiting.append(part)
                yield part, self._table(generation, part)

        if isinstance(engine, TransformersRollout):
            for part, table in asked():
                with self._generating(generation, part) as advance:
                    table = engine(table, seed(part), advance)
                yield part, table
            return
        if generation not in self._checked:
            self._check_engine(generation, engine, version, self._table(generation, first))
        with closing(engine.stream((part, table, seed(part)) for part, table in asked())) as stream:
            while True:
                oldest = min(waiting, default=first)
                with self._generating(generation, oldest) as advance:
                    shown = 0

                    def progress(finished: list[tuple[int, int]]) -> None:
                        nonlocal shown
                        check()
                        now = dict(finished).get(oldest, shown)  # noqa: B023
                        advance(now - shown)
                        shown = now

                    engine.progress = progress
                    answered = next(stream, None)
                if answered is None:
                    return
                waiting.remove(answered[0])
                yield answered
                if not waiting:
                    return

    def _generating(self, generation: int, part: int) -> AbstractContextManager[Advance]:
        rows = self.parts(generation)[part]
        count = (rows.stop - rows.start) * self.config.rollout.samples_per_prompt
        return self._step(SpanName.GENERATE, generation, part, count)

    def _finish_part(self, generation: int, part: int, table: pa.Table, version: int) -> None:
        """Score, select and store what was answered."""
        table = identify(table, generation, part, version)
        with self.events.span(SpanName.PART, generation=generation, part=part):
            with self.events.span(SpanName.LOAD):
                student = self.models.student(version)
                for source in table["source"].unique().to_pylist():
                    self.models.teacher(self.config.teacher_of(source))
            with self._step(SpanName.SCORE, generation, part, 3 * count_tokens(table["response_ids"])) as advance:
                table = ScoreStudent(self.models.prefill(student))(self._score_teacher()(table, advance), advance)
            self._store(generation, part, Select(self.config.selection)(table))

    @contextmanager
    def _scoring(self, generation: int, version: int) -> Iterator[tuple[Callable[[int, pa.Table], None], Callable[[], None]]]:
        """What finishes an answered part - at once, or beside the engine -, and what raises if that went wrong."""
        if not self._scores_beside:
            yield partial(self._finish_part, generation, version=version), lambda: None
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        waiting: deque[Future[None]] = deque()

        def check() -> None:
            while waiting and waiting[0].done():
                waiting.popleft().result()

        def submit(part: int, table: pa.Table) -> None:
            waiting.append(pool.submit(self._finish_part, generation, part, table, version))
            check()
            while len(waiting) > 2:  # answers wait in memory: no more of them than are read soon
                with self.events.span(SpanName.SCORE, generation=generation):
                    waiting.popleft().result()

        try:
            yield submit, check
            with self.events.span(SpanName.SCORE, generation=generation):
                for future in waiting:
                    future.result()
        except BaseException:
            self.models.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def _scores_beside(self) -> bool:
        """May scoring run while the engine generates? Where the teachers' work is done elsewhere."""
        teachers = self.config.all_teachers.values()
        elsewhere = self.placement.teacher != self.placement.rollout or all(t.server is not None for t in teachers)
        return self.config.rollout.engine == "vllm" and elsewhere

    def _score_teacher(self) -> Routed:
        top_k = self.config.scoring.top_k
        return Routed(self.config.teacher_of, lambda key: ScoreTeacher(self.models.reader(key), top_k))

    def _check_engine(self, generation: int, engine: VllmRollout, version: int, table: pa.Table) -> None:
        """Before it answers: are the engine's log-probabilities those of the snapshot in transformers?"""
        self._checked.add(generation)
        count = self.config.rollout.check_samples
        if not count:
            return
        with self.events.span(SpanName.CHECK, generation=generation):
            answers = engine(table.slice(0, count), self.config.seed, min(CHECKED_TOKENS, self.config.rollout.max_new_tokens))
            found = engine_difference(answers, self.models.prefill(self.models.student(version)))
        now = time.time()
        self.events.write(SpanName.ENGINE, now, now, generation=generation, **found.to_json())
        warn_of_engine(found, self.config.rollout.check_bound, self.display)

    def _reference_part(self, generation: int, part: int) -> pa.Table:
        table = self._table(generation, part)
        if self.config.data.references == "teacher":
            with self._step(SpanName.GENERATE, generation, part, len(table)) as advance:
                seed = derive_seed(self.config.seed, "teacher", generation, part)
                table = Routed(self.config.teacher_of, self.models.writer)(table, seed, advance)
        else:
            table = table.append_column("response_ids", table["completion_ids"]).append_column(
                "finish_reason", pa.array(["stop"] * len(table), pa.string())
            )
        if generation == REFERENCE:
            with self._step(SpanName.SCORE, generation, part, 2 * count_tokens(table["response_ids"])) as advance:
                table = self._score_teacher()(table, advance)
        table = identify(table, generation, part, REFERENCE)
        return table.append_column("verdict", pa.array(["reference"] * len(table), pa.string()))

    @contextmanager
    def _step(self, name: SpanName, generation: int, part: int, total: int) -> Iterator[Callable[..., None]]:
        """One kind of work on a part: its span, its bar, its threads."""
        threads = self.placement.rollout_threads if name == SpanName.GENERATE else self.placement.teacher_threads
        if generation <= 0:  # the trainer has nothing else to train on
            threads = self.placement.first_threads
        before = torch.get_num_threads()
        whose = "references" if generation == REFERENCE else f"generation {generation}"
        title = f"{whose}, part {part + 1}/{len(self.parts(generation))}: {name}"
        unit = "responses" if name == SpanName.GENERATE else "tokens"
        torch.set_num_threads(threads or before)
        try:
            with (
                self.events.span(name, generation=generation, part=part),
                self.display.task(title, total, unit, short=name) as advance,
            ):
                yield advance
        finally:
            torch.set_num_threads(before)

    def finish(self, generation: int) -> None:
        """Write the manifest of a generation whose parts are all there, and show what is in it."""
        count = len(self.parts(generation))
        with self.events.span(SpanName.FINISH, generation=generation):
            summary, tokens, stops = Summary(self.config.selection), 0, 0
            for part in range(count):
                table = self.store.read_part(generation, part, SUMMARY)
                summary.add(table)
                tokens += count_tokens(table["response_ids"])
                stops += int(pc.sum(pc.equal(table["finish_reason"], "length")).as_py())
            selection, parts = summary.result(), self.store.part_entries(generation, count)
            manifest = Manifest(
                generation=generation,
                rows=sum(part.rows for part in parts),
                parts=parts,
                policy_version=self.begun_by(generation, REFERENCE),
                selection=selection,
                prompts={"read": self.prompts.rows, "used": len(self.prompts), "left_out": self.prompts.report()},
                response_tokens=tokens,
                length_stops=stops,
                teachers=self._rows_by_teacher(selection) if self.config.teachers else {},
                engine=self._engine_facts(generation) if self.config.rollout.engine != "transformers" else None,
            )
            self.store.finish_generation(manifest)
        show_generation(manifest, self.display)

    def _engine_facts(self, generation: int) -> EngineCheck | None:
        """The worst of what the checks of this generation's engines found."""
        events = read_events(self.events.path, SpanName.ENGINE)
        found = [EngineCheck.from_json(e.facts) for e in events if e.facts.get("generation") == generation]
        return max(found, key=lambda check: check.mean_abs_difference, default=None)

    def _rows_by_teacher(self, selection: SelectionSummary) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for source, counts in selection.sources.items():
            key = self.config.teacher_of(source)
            rows["teacher" if key is None else f"teachers.{key}"] += counts.rows
        return dict(sorted(rows.items()))

    # -- following a run

    def follow(self, poll: float) -> None:
        """As `_follow`; lets go of everything when it ends."""
        try:
            self._follow(poll)
        finally:
            self.models.close()

    def _follow(self, poll: float) -> None:
        """Make each generation as soon as its snapshot is published, until every one is made or the run is finished.

        The part that is wanted first is made first: after each, all that may be missing is looked at anew.
        """
        waits_since: float | None = None
        while not self.store.finished:
            wanted = range(self.store.current, self.config.schedule.generations)
            there = sorted(version for version in self.store.policies() if version in wanted)
            candidates = ([REFERENCE] if self.config.schedule.references else []) + there
            if any(self._to_do(g) for g in candidates):
                if waits_since is not None:
                    self.events.write(SpanName.WAIT, waits_since, time.time())
                    waits_since = None
                any(self._advance(g) for g in candidates)
                continue
            if all(self.store.manifest(g) is not None for g in wanted):
                return
            waits_since = waits_since or time.time()
            time.sleep(poll)

    def _to_do(self, generation: int) -> bool:
        if self.missing(generation):
            return True
        whole = not self.store.missing_parts(generation, len(self.parts(generation)))
        return whole and self.rank == 0 and self.store.manifest(generation) is None

    def _wanted(self, generation: int) -> Iterator[int]:
        """Missing parts, each asked for once, for as long as no other generation comes before this one.

        The selection is read anew for each: `npd refresh --reselect` may have changed it. Without continuous batching there
        is a single part: what is wanted first is then looked at anew.
        """
        asked: set[int] = set()
        while missing := [part for part in self.missing(generation) if part not in asked]:
            if asked and (self.config.rollout.engine == "transformers" or self.store.current > generation):
                return
            asked.add(missing[0])
            self.config = self.config.model_copy(update={"selection": self.store.selection()})
            yield missing[0]

    def _advance(self, generation: int) -> bool:
        """Make the next parts of a generation, or its manifest; False if there is nothing to do for it now."""
        missing = self.missing(generation)
        if missing:
            self.make_parts(generation, self._wanted(generation), generation)
            return True
        if self.rank or self.store.manifest(generation) is not None:
            return False
        if self.store.missing_parts(generation, len(self.parts(generation))):  # others make them
            return False
        try:
            self.finish(generation)
        except (UserError, FileNotFoundError):  # a damaged part, or one that the trainer has just found damaged and deleted
            self.mend(generation)
            return True
        manifest = self.store.manifest(generation)
        assert manifest is not None, "it was finished right now"
        check_some_kept(manifest.selection, self.config.selection)
        return True

    def drop_if_damaged(self, generation: int, part: int) -> None:
        """Delete a part that can't be read."""
        try:
            self.store.read_part(generation, part)
        except FileNotFoundError:
            return
        except UserError:
            self.display.say(f"{self.store.part(generation, part)} was damaged; it is made again.")
            self.store.part(generation, part).unlink(missing_ok=True)


def usable_references(config: Config, prompts: Prompts) -> np.ndarray:
    """Indices of the prompts that can have a reference response: with data.references given, those with a completion."""
    if config.data.references == "teacher":
        return np.arange(len(prompts))
    lengths = pc.fill_null(pc.list_value_length(prompts.table["completion_ids"]), 0).to_numpy()
    return np.flatnonzero((lengths > 0) & (lengths <= config.rollout.max_new_tokens))


def count_tokens(column: pa.ChunkedArray) -> int:
    """Tokens in a list column."""
    return int(pc.sum(pc.list_value_length(column)).as_py())


def identify(table: pa.Table, generation: int, part: int, policy_version: int) -> pa.Table:
    """Add sample_id (unique in the run) and policy_version."""
    name = "references" if generation == REFERENCE else f"g{generation:03d}"
    ids = [f"{name}-p{part:05d}-{row:05d}" for row in range(len(table))]
    return table.append_column("sample_id", pa.array(ids, pa.string())).append_column(
        "policy_version", pa.array([policy_version] * len(table), pa.int32())
    )
