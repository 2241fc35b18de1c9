"""One part of a generation, from prompts to a file: rollout, scoring, selection, store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import torch

from npd.config import Config, Sampling
from npd.errors import RunError
from npd.generations.books import Books
from npd.generations.earlier import earlier_answers
from npd.generations.generation import Generations
from npd.generations.guards import warn
from npd.generations.models import FIRST, Models, engine_difference, routed_writer
from npd.observe.console import warn_of_engine
from npd.observe.display import Advance, Display, untold
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.prompts import TEACHER_PROMPT
from npd.rollout import Engine, Request
from npd.schedule import derive_seed
from npd.scoring import ScoreStudent, ScoreTeacher, Teacher, teacher_kind
from npd.scoring.routed import Routed
from npd.selection import Select, wants_free
from npd.store import REFERENCE, Store
from npd.store.answers import wrong_part
from npd.store.schema import NO_POLICY, count_tokens
from npd.verifiers import Verify

CHECKED_TOKENS = 64  # of each response by which an engine is compared with transformers

Answers = Iterator[tuple[int, pa.Table]]


class Pipeline:
    """Makes parts of generations; models are loaded once, and only if something is to be made."""

    def __init__(
        self,
        config: Config,
        store: Store,
        generations: Generations,
        models: Models,
        books: Books,
        display: Display,
        events: Events,
        placement: Placement,
    ) -> None:
        self.config, self.store, self.generations, self.models = config, store, generations, models
        self.books, self.display, self.events, self.placement = books, display, events, placement
        self.verify = Verify()
        self._checked: set[int] = set()  # generations whose engine was compared with transformers

    def make(self, generation: int, parts: Iterator[int], version: int | None = None) -> None:
        """Make parts, with the snapshot that began the generation or else with `version` (None: that of its number).

        An engine that batches continuously asks for the next parts while it answers one.

        Raises:
            UserError: the snapshot is damaged, or is no longer kept.
        """
        if self.generations.is_reference(generation):
            for part in parts:
                with self.events.span(SpanName.PART, generation=generation, part=part):
                    self._store(generation, part, self._reference_part(generation, part))
            return
        begun = self.books.begun_by(generation)
        if begun is None:
            begun = generation if version is None else version
        with self._scoring(generation, begun) as (finish, check):
            for part, table in self._answered(generation, parts, begun, check):
                finish(part, table)

    def _store(self, generation: int, part: int, table: pa.Table) -> None:
        if TEACHER_PROMPT in table.column_names:  # it follows from the prompt, and its ids are no student's
            table = table.drop_columns(TEACHER_PROMPT)
        with self.events.span(SpanName.STORE, generation=generation, part=part):
            if (wrong := wrong_part(table, self.store.vocabulary_size)) is not None:  # or it would be made again for ever
                raise RunError(
                    f"Part {part} of generation {generation} is not kept, as no part can be like that: {wrong}.",
                    "See to the engine, the teacher or the rule that gave it (a plug-in?), then run the same command again.",
                )
            self.store.write_part(generation, part, table)

    # -- the student writes

    def _answered(self, generation: int, parts: Iterator[int], version: int, check: Callable[[], None]) -> Answers:
        """The student's answers, part by part; `check` is called now and then meanwhile."""
        following = next(parts, None)
        if following is None:
            return
        with self.events.span(SpanName.LOAD):
            engine = self.models.engine(version)
        if not engine.exact and generation not in self._checked:
            self._check_engine(generation, engine, version, self.generations.table(generation, following))
        waiting: dict[int, int] = {}  # parts that are asked for and not answered, and how many responses they want

        def asked() -> Iterator[Request]:
            nonlocal following
            while following is not None:
                part, following = following, None
                table = self.generations.table(generation, part)
                waiting[part] = len(table) * self.generations.per_prompt(generation)
                yield Request(part, table, derive_seed(self.config.seed, "rollout", version, generation, part))
                if following is None:
                    following = next(parts, None)

        advance: Advance = untold
        oldest, shown = following, 0  # the part that is shown, and how many of its responses

        def progress(part: int, finished: int) -> None:
            nonlocal shown
            check()
            if part == oldest:
                advance(finished - shown)
                shown = finished

        stream = engine.stream(asked(), self.config.sampling, progress)
        try:
            while True:
                if not waiting and following is None:
                    following = next(parts, None)
                    if following is None:
                        return
                oldest, shown = min(waiting) if waiting else following, 0
                assert oldest is not None, "a part is asked for, or comes next"
                with self._generating(generation, oldest) as advance:
                    number, table = next(stream, (oldest, pa.table({})))
                if len(table) != waiting.pop(number, None):
                    raise RunError(
                        f"rollout.engine {self.config.rollout.engine} gave {len(table)} responses to part {number} of "
                        f"generation {generation}, which is not what it was asked for: each request is answered once, with "
                        "rollout.samples_per_prompt rows for each of its own."
                    )
                yield number, table
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    def _generating(self, generation: int, part: int) -> AbstractContextManager[Advance]:
        rows = self.generations.parts(generation)[part]
        return self._step(
            SpanName.GENERATE, generation, part, (rows.stop - rows.start) * self.generations.per_prompt(generation)
        )

    def _check_engine(self, generation: int, engine: Engine, version: int, table: pa.Table) -> None:
        """Before it answers: are the engine's log-probabilities those of the snapshot in transformers?"""
        self._checked.add(generation)
        count = self.config.rollout.check_samples
        if not count:
            return
        sampling = replace(self.config.sampling, max_new_tokens=min(CHECKED_TOKENS, self.config.response_tokens))
        with self.events.span(SpanName.CHECK, generation=generation):
            answers = engine.answer(table.slice(0, count), sampling, self.config.seed)
            found = engine_difference(answers, self.models.prefill(self.models.student(version)))
        self.events.mark(SpanName.ENGINE, generation=generation, **found.to_json())
        warn_of_engine(found, self.config.rollout.check_bound, self.display)

    # -- others read, and judge

    def _finish_part(self, generation: int, part: int, table: pa.Table, version: int) -> None:
        """Score, select and store what was answered."""
        table = identify(table, generation, part, version)
        selection, tokens = self.books.selection(), count_tokens(table["response_ids"])
        free = wants_free(selection, self.config.scoring.free)
        with self.events.span(SpanName.PART, generation=generation, part=part):
            with self.events.span(SpanName.LOAD):
                student = self.models.student(version)
                for source in table["source"].unique().to_pylist():
                    self._teacher(self.config.teacher_of(source), generation, version)
            with self._step(SpanName.SCORE, generation, part, (1 + 2 * free) * tokens) as advance:
                scored = self._score_teacher(generation, version, free=free)(table, advance)
                table = ScoreStudent(self.models.prefill(student), free=free)(scored, advance)
            self._store(generation, part, Select(selection)(self._verified(table, generation)))

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
        elsewhere = self.placement.teacher != self.placement.rollout or all(
            teacher_kind(t).runs_elsewhere(t) for t in teachers
        )
        return self.models.engine_kind.continuous and elsewhere

    def _teacher(self, key: str | None, generation: int, version: int) -> Teacher:
        """A teacher, which is to answer as it did in the parts that are there already."""
        teacher = self.models.teacher(key, version)
        if not teacher.health.begun:
            earlier = earlier_answers(self.config, self.store, self.generations, key, generation)
            if earlier is not None:
                teacher.health.recall(*earlier, self.config.scoring.top_k)
        return teacher

    def _score_teacher(self, generation: int, version: int, *, free: bool) -> Routed:
        top_k = self.config.scoring.top_k
        return Routed(
            self.config.teacher_of, lambda key: ScoreTeacher(self._teacher(key, generation, version), top_k, free=free)
        )

    def _verified(self, table: pa.Table, generation: int) -> pa.Table:
        """With a column reward, where the run's prompts have something to verify by."""
        if not self.generations.verifies:
            return table
        before = self.verify.failed
        table = self.verify(table, self.models.decode)
        if failed := self.verify.failed - before:
            warn(
                "verifier",
                f"{failed} of {len(table)} responses could not be judged by their verifier, and have no reward "
                f"({self.verify.why}).",
                self.events,
                self.display,
                generation=generation,
            )
        return table

    # -- references

    def _reference_part(self, generation: int, part: int) -> pa.Table:
        table = self.generations.table(generation, part)
        if self.config.data.references == "teacher":
            with self._step(SpanName.GENERATE, generation, part, len(table)) as advance:
                seed = derive_seed(self.config.seed, "teacher", generation, part)
                options = self.config.rollout
                sampling = Sampling(self.config.response_tokens, options.temperature, options.top_p)
                table = routed_writer(self.models, sampling)(table, seed, advance)
        else:
            table = given_references(table, self.config.response_tokens)
        if generation == REFERENCE:  # mixed in, and so trained with the same loss as the student's own responses
            free = self.config.scoring.free == "always"  # no rule judges references
            with self._step(SpanName.SCORE, generation, part, (1 + free) * count_tokens(table["response_ids"])) as advance:
                table = self._score_teacher(generation, FIRST, free=free)(table, advance)
        table = self._verified(identify(table, generation, part, NO_POLICY), generation)
        return table.append_column("verdict", pa.array(["reference"] * len(table), pa.string()))

    @contextmanager
    def _step(self, name: SpanName, generation: int, part: int, total: int) -> Iterator[Advance]:
        """One kind of work on a part: its span, its bar, its threads."""
        threads = self.placement.rollout_threads if name == SpanName.GENERATE else self.placement.teacher_threads
        if generation <= 0:  # the trainer has nothing else to train on
            threads = self.placement.first_threads
        before = torch.get_num_threads()
        whose = "references" if generation == REFERENCE else f"generation {generation}"
        title = f"{whose}, part {part + 1}/{len(self.generations.parts(generation))}: {name}"
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


def given_references(table: pa.Table, longest: int) -> pa.Table:
    """Add response_ids and finish_reason: the completions that the data gives, or their first `longest` tokens."""
    completions = table["completion_ids"]
    lengths = pc.list_value_length(completions)
    if pc.max(lengths).as_py() > longest:
        cut = [ids[:longest] for ids in completions.to_pylist()]
        completions = pa.chunked_array([pa.array(cut, completions.type)])
    reasons = pc.if_else(pc.greater(lengths, longest), "length", "stop")
    return table.append_column("response_ids", completions).append_column("finish_reason", reasons)


def identify(table: pa.Table, generation: int, part: int, policy_version: int) -> pa.Table:
    """Add sample_id (unique in the run) and policy_version."""
    name = "references" if generation == REFERENCE else f"g{generation:03d}"
    ids = [f"{name}-p{part:05d}-{row:05d}" for row in range(len(table))]
    return table.append_column("sample_id", pa.array(ids, pa.string())).append_column(
        "policy_version", pa.array([policy_version] * len(table), pa.int32())
    )
