"""A part from prompts to a file: what is asked for when, what is stored, who works beside whom; scripted models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from bench import VOCABULARY, Bench, Tasks, prompts_of

from npd.config import Config, Sampling
from npd.errors import RunError
from npd.generations.generation import Generations, ReferenceGenerations, tuning
from npd.generations.pipeline import Pipeline, identify
from npd.observe.events import SpanName, read_events
from npd.registry import TEACHERS
from npd.rollout import Progress, Request
from npd.schedule import derive_seed
from npd.scoring import Reading, Teacher
from npd.scoring.health import Health
from npd.store import REFERENCE
from npd.store.schema import NO_POLICY, SCHEMA, add_answers

STOP, TOP_K, HANG = 2, 3, 60.0


class Elsewhere(Teacher):
    """A teacher whose work is done by another machine."""

    elsewhere = True

    def read(self, *args: Any, **options: Any) -> list[Reading]:
        raise NotImplementedError


TEACHERS.register("elsewhere", Elsewhere)


class Scripted:
    """Engine, models, student and teacher in one; writes down what is asked of it, in order.

    Args:
        ahead: requests that the engine takes before it answers the first one.
    """

    exact, continuous, holds_weights = True, False, False

    def __init__(self, ahead: int = 1) -> None:
        self.ahead, self.continuous = ahead, ahead > 1
        self.log: list[Any] = []
        self.health = Health()
        self.readings = 0
        self.seeds: dict[int, int] = {}
        self.threads: dict[str, set[Any]] = {"write": set(), "read": set(), "name": set()}
        self.engine_kind = self
        self.vocabulary = SimpleNamespace(start_id=1, size=VOCABULARY)
        self.before_reading: Callable[[], Any] = lambda: None
        self.before_answering: Callable[[int], None] = lambda part: None
        self.endless: int | None = None
        """A part that is answered until somebody objects."""
        self.config: Config | None = None

    # models

    def engine(self, version: int) -> Scripted:
        self.log.append(("engine", version))
        return self

    def student(self, version: int) -> int:
        return version

    def teacher(self, key: str | None, version: int | None = None) -> Scripted:
        return self

    def prefill(self, model: int) -> Scripted:
        return self

    def stop(self) -> None:
        self.log.append("stop")

    # an engine

    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        requests = iter(requests)
        waiting: list[Request] = []
        try:
            while True:
                while len(waiting) < self.ahead and (request := next(requests, None)) is not None:
                    self.log.append(("asked", request.number))
                    self.seeds[request.number] = request.seed
                    waiting.append(request)
                if not waiting:
                    return
                number, table, seed = waiting.pop(0)
                self.before_answering(number)
                self.threads["write"].add(torch.get_num_threads())
                answered = self._answer(table, sampling, seed)
                if progress is not None:
                    progress(number, len(answered))
                ends = time.monotonic() + HANG
                while number == self.endless and progress is not None and time.monotonic() < ends:
                    progress(number, len(answered))
                    time.sleep(0.001)
                self.log.append(("answered", number))
                yield number, answered
        finally:
            self.log.append("closed")

    def _answer(self, table: pa.Table, sampling: Sampling, seed: int) -> pa.Table:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, sampling.max_new_tokens, len(table) * sampling.samples_per_prompt)
        ids = [[*rng.integers(5, VOCABULARY, n - 1).tolist(), STOP] for n in lengths]
        return add_answers(table, ids, [STOP], [np.log(rng.uniform(0.1, 1, len(i))).tolist() for i in ids])

    def answer(self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Any = None) -> pa.Table:
        self.log.append(("checked", len(table), sampling))
        return self._answer(table, sampling, seed)

    def write(self, table: pa.Table, sampling: Sampling, seed: int, progress: Any) -> pa.Table:
        self.log.append(("written", len(table)))
        return self._answer(table, sampling, seed).drop_columns("behavior_logprobs")

    # a reader

    def __call__(
        self, contexts: Sequence[Any], responses: Sequence[Any], top_k: int = 0, progress: Any = None
    ) -> list[Reading]:
        self.readings += 1
        if top_k:  # the teacher reads behind prompts
            self.before_reading()
            self.threads["read"].add(torch.get_num_threads())
            self.threads["name"].add(threading.current_thread().name)
        readings = []
        for context, response in zip(contexts, responses, strict=True):
            rng = np.random.default_rng([*context, 99, *response])
            logprobs = np.log(rng.uniform(0.1, 1, (len(response), 1 + top_k))).astype(np.float32)
            ids = np.argsort(rng.random((len(response), VOCABULARY)))[:, :top_k].astype(np.int32)
            readings.append(Reading(logprobs[:, 0], ids, logprobs[:, 1:] - np.log(max(1, top_k))))
        return readings


class Made(Bench):
    """A run directory, and what makes its parts."""

    def __init__(
        self, folder: Path, models: Scripted, *, kind: type[Generations] = Generations, threads: Any = None, **sections: Any
    ) -> None:
        sections.setdefault("teacher", {"kind": "elsewhere"} if models.continuous else {})
        change: Callable[[Config], Config] = tuning if kind is ReferenceGenerations else lambda config: config
        super().__init__(folder, prompts_of(10, [4] * 10), kind, change, **{"scoring": {"top_k": TOP_K}} | sections)
        self.models, self.tasks = models, Tasks()
        models.config = self.config
        placement = replace(self.shop().placement, rollout="cpu", teacher="cpu", **(threads or {}))
        self.pipeline = Pipeline(
            self.config,
            self.store,
            self.generations,
            models,  # type: ignore[arg-type]
            self.books,
            self.tasks,
            self.events,
            placement,
        )
        real = self.store.write_part

        def write_part(generation: int, part: int, table: pa.Table, **options: Any) -> None:
            models.log.append(("stored", part))
            real(generation, part, table, **options)

        self.store.write_part = write_part

    def bytes_of(self, generation: int) -> list[bytes]:
        return [self.store.part(generation, part).read_bytes() for part in sorted(self.store.parts(generation))]


def test_an_engine_that_takes_one_part_at_a_time(tmp_path):
    """The next part is chosen, and asked for, once the one before is stored."""
    made = Made(tmp_path, models := Scripted())

    def parts() -> Iterator[int]:
        for part in (0, 1, 2):
            models.log.append(("chosen", part))
            yield part

    made.pipeline.make(0, parts())
    expected = [(what, part) for part in range(3) for what in ("chosen", "asked", "answered", "stored")]
    expected.insert(1, ("engine", 0))
    assert models.log == [*expected, "closed"]
    assert models.threads["name"] == {threading.current_thread().name}
    assert [task[1:] for task in made.tasks.tasks if "generate" in task[0]] == [[n, "responses", n] for n in (3, 3, 4)]


@pytest.mark.parametrize("ahead", [2, 3, 9])
def test_a_continuous_engine_asks_early_and_makes_the_same(tmp_path, ahead):
    one, many = Made(tmp_path / "one", Scripted()), Made(tmp_path / "many", models := Scripted(ahead))
    for made in (one, many):
        made.pipeline.make(1, iter([0, 1, 2]), version=1)
    assert many.bytes_of(1) == one.bytes_of(1)
    assert models.log[:1] == [("engine", 1)]
    first = models.log.index(("answered", 0))
    assert [entry for entry in models.log[:first] if entry[0] == "asked"] == [("asked", p) for p in range(min(3, ahead))]
    assert [entry for entry in models.log if entry[0] == "stored"] == [("stored", p) for p in range(3)]
    assert sum(task[3] for task in many.tasks.tasks if "generate" in task[0]) == 10


def test_a_part_is_a_function_of_its_number(tmp_path):
    whole, some = Made(tmp_path / "whole", Scripted()), Made(tmp_path / "some", models := Scripted())
    whole.pipeline.make(2, iter([0, 1, 2]))
    some.pipeline.make(2, iter([2]))
    some.pipeline.make(2, iter([0]))
    assert some.bytes_of(2) == [whole.bytes_of(2)[0], whole.bytes_of(2)[2]]
    seed = whole.config.seed
    assert models.seeds == {part: derive_seed(seed, "rollout", 2, 2, part) for part in (0, 2)}
    table = whole.store.read_part(2, 0)
    assert table.column_names == SCHEMA.names
    assert table["prompt_id"].to_pylist() == whole.generations.table(2, 0)["prompt_id"].to_pylist()
    assert len(table["topk_ids"][0]) == TOP_K * len(table["response_ids"][0])


def test_a_generation_is_finished_by_the_snapshot_that_began_it(tmp_path):
    made = Made(tmp_path, models := Scripted())
    made.pipeline.make(2, iter([1]), version=1)
    made.pipeline.make(2, iter([0, 2]), version=2)
    assert [entry for entry in models.log if entry[0] == "engine"] == [("engine", 1), ("engine", 1)]
    for part in range(3):
        assert set(made.store.read_part(2, part)["policy_version"].to_pylist()) == {1}


def test_nothing_is_loaded_where_nothing_is_made(tmp_path):
    for ahead in (1, 2):
        made = Made(tmp_path / str(ahead), models := Scripted(ahead))
        made.pipeline.make(0, iter([]))
        assert models.log == []


# -- scoring beside the engine


def test_a_teacher_elsewhere_reads_while_the_engine_writes(tmp_path):
    made = Made(tmp_path, models := Scripted(2))
    writes_on = threading.Event()
    models.before_reading = lambda: writes_on.wait(HANG) or pytest.fail("the engine waits for the teacher")
    models.before_answering = lambda part: writes_on.set() if part == 1 else None
    made.pipeline.make(0, iter([0, 1, 2]))
    assert models.threads["name"] == {"score_0"}
    assert made.books.missing(0) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score")]


def test_answers_do_not_pile_up(tmp_path):
    """A teacher that is slow is waited for as soon as three answers are not read."""
    made = Made(tmp_path, models := Scripted(2), rollout={"part_size": 1})
    read_on = threading.Event()
    models.before_reading = lambda: read_on.wait(HANG) or pytest.fail("nobody waits")
    real = made.events.span
    answered: list[Any] = []

    @contextmanager
    def span(name: SpanName, **facts: Any) -> Iterator[None]:
        if name == SpanName.SCORE and "part" not in facts and not answered:  # the engine's own thread waits
            answered.extend(entry for entry in models.log if entry[0] == "answered")
            read_on.set()
        with real(name, **facts):
            yield

    made.events.span = span
    made.pipeline.make(0, iter(range(10)))
    assert answered == [("answered", part) for part in range(3)]
    assert made.books.missing(0) == []


def test_a_failure_of_the_teacher_ends_the_engines_work(tmp_path):
    """It is noticed while the engine generates the next part; what waits is not read any more."""
    made = Made(tmp_path, models := Scripted(2))

    def fail() -> None:
        raise RunError("The server is away.")

    models.before_reading, models.endless = fail, 1
    with pytest.raises(RunError, match="The server is away"):
        made.pipeline.make(0, iter([0, 1, 2]))
    assert models.log.count("stop") == 1
    assert models.log.count("closed") == 1
    assert ("answered", 1) not in models.log
    assert made.books.missing(0) == [0, 1, 2]


def test_a_failure_of_the_engine_ends_the_teachers_work(tmp_path):
    made = Made(tmp_path, models := Scripted(2))

    def fail(part: int) -> None:
        if part == 1:
            raise RunError("The engine is gone.")

    models.before_answering = fail
    with pytest.raises(RunError, match="The engine is gone"):
        made.pipeline.make(0, iter([0, 1, 2]))
    assert models.log.count("stop") == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score")]


@pytest.mark.parametrize(("ahead", "teacher"), [(1, {"kind": "elsewhere"}), (2, {})])
def test_a_teacher_reads_in_turn_where_it_is_here_or_the_engine_waits_anyway(tmp_path, ahead, teacher):
    made = Made(tmp_path, models := Scripted(ahead), teacher=teacher)
    made.pipeline.make(0, iter([0, 1, 2]))
    assert models.threads["name"] == {threading.current_thread().name}


# -- threads, and the check of an engine


def test_each_kind_of_work_has_its_threads(tmp_path):
    before = torch.get_num_threads()
    threads = {"rollout_threads": 3, "teacher_threads": 2, "first_threads": 4}
    made = Made(tmp_path, models := Scripted(), threads=threads)
    made.pipeline.make(0, iter([0]))  # the trainer waits for it
    assert (models.threads["write"], models.threads["read"]) == ({4}, {4})
    made.models.threads["write"].clear()
    made.models.threads["read"].clear()
    made.pipeline.make(1, iter([0]))
    assert (models.threads["write"], models.threads["read"]) == ({3}, {2})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("samples", [0, 2])
def test_an_engine_is_compared_with_transformers_once_a_generation(tmp_path, samples):
    models = Scripted()
    models.exact = False
    made = Made(tmp_path, models, rollout={"check_samples": samples, "max_new_tokens": 90, "temperature": 0.5})
    for generation, part in ((0, 0), (0, 1), (1, 0)):
        made.pipeline.make(generation, iter([part]))
    checks = [entry for entry in models.log if entry[0] == "checked"]
    assert checks == [("checked", 2, Sampling(64, 0.5, 1.0, 1))] * (2 if samples else 0)
    found = list(read_events(made.events.path, SpanName.ENGINE))
    assert [event.facts["generation"] for event in found] == ([0, 1] if samples else [])
    assert all(event.facts["samples"] == 2 and event.facts["mean_abs_difference"] > 0 for event in found)


# -- references


def rows_of(made: Made, generation: int) -> list[dict[str, Any]]:
    return [
        row for part in sorted(made.store.parts(generation)) for row in made.store.read_part(generation, part).to_pylist()
    ]


@pytest.mark.parametrize(
    ("rule", "free", "passes"), [("none", "needed", 1), ("none", "always", 3), ("delta_ifd", "needed", 3)]
)
def test_what_the_rule_does_not_judge_by_is_not_read(tmp_path, rule, free, passes):
    """A part has the same columns either way; those that nobody asked for are null, and the others are the same."""
    models, whole = Scripted(), Scripted()
    made = Made(tmp_path / "made", models, selection={"rule": rule}, scoring={"top_k": TOP_K, "free": free})
    full = Made(tmp_path / "full", whole, selection={"rule": rule}, scoring={"top_k": TOP_K, "free": "always"})
    for each in (made, full):
        each.pipeline.make(0, iter([0]))
    table, wanted = made.store.read_part(0, 0), full.store.read_part(0, 0)
    assert table.column_names == SCHEMA.names
    assert models.readings == passes
    for name in SCHEMA.names:
        if passes == 1 and (name.endswith("_nll_free") or "ifd" in name):
            assert table[name].null_count == len(table) > 0
        else:
            assert table[name].equals(wanted[name]), name


@pytest.mark.parametrize("whose", ["given", "teacher"])
def test_references_to_fine_tune_on(tmp_path, whose):
    """Nobody reads them: they are trained on with cross-entropy alone."""
    made = Made(tmp_path, models := Scripted(), kind=ReferenceGenerations, data={"references": whose})
    made.pipeline.make(0, iter([0, 1, 2]))
    rows = rows_of(made, 0)
    assert {row["verdict"] for row in rows} == {"reference"}
    assert {row["policy_version"] for row in rows} == {NO_POLICY}
    assert {row["sample_id"][:5] for row in rows} == {"g000-"}
    assert all(
        row["behavior_logprobs"] is row["topk_ids"] is row["student_nll"] is row["teacher_nll"] is None for row in rows
    )
    if whose == "given":
        assert {tuple(row["response_ids"]) for row in rows} == {(3, 3, 3, 3)}
        assert {row["finish_reason"] for row in rows} == {"stop"}
    assert [entry for entry in models.log if entry[0] == "written"] == (
        [] if whose == "given" else [("written", n) for n in (3, 3, 4)]
    )
    assert models.threads["name"] == set()


def test_references_that_are_mixed_in_are_read(tmp_path):
    schedule = {"references": 0.3, "prompts": 3, "passes": 1, "generations": 1, "lead": 0.0}
    made = Made(tmp_path, Scripted(), schedule=schedule)
    made.pipeline.make(REFERENCE, iter([0]))
    rows = rows_of(made, REFERENCE)
    assert len(rows) == made.generations.size(REFERENCE) == 2
    assert [row["sample_id"] for row in rows] == ["references-p00000-00000", "references-p00000-00001"]
    for row in rows:
        assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == TOP_K * 4
        assert row["teacher_nll"] > 0
        assert row["student_nll"] is row["behavior_logprobs"] is None
        assert (row["verdict"], row["policy_version"]) == ("reference", NO_POLICY)


def test_identify_names_each_response_once():
    tables = [identify(pa.table({"x": [0] * 3}), g, p, version) for g, p, version in ((0, 0, 0), (0, 1, 0), (12, 0, 11))]
    names = [name for table in tables for name in table["sample_id"].to_pylist()]
    assert len(set(names)) == 9
    assert names[3] == "g000-p00001-00000"
    assert names[-1] == "g012-p00000-00002"
    assert tables[2]["policy_version"].to_pylist() == [11] * 3
    assert tables[2].schema.field("policy_version").type == pa.int32()
    assert identify(pa.table({"x": [0]}), REFERENCE, 7, NO_POLICY)["sample_id"].to_pylist() == ["references-p00007-00000"]
