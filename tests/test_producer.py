"""Who makes generations: in turns, beside the trainer, and the supervisor of workers; with processes that are none."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench import Bench, damage

from npd.config import PlacementConfig, ScheduleConfig
from npd.errors import NpdError, RunError, UserError
from npd.generations import workers
from npd.generations.follower import External
from npd.generations.producer import Beside, Producer, Turns, Workshop, producer_kind
from npd.generations.workers import BEGIN, LAST_WORDS, Worker, Workers, visible_gpus
from npd.observe.events import SpanName, read_events
from npd.placement import Placement, WorkerDevices, assign_devices
from npd.records import WorkerEnd
from npd.registry import PRODUCERS
from npd.store import REFERENCE

# -- which one


def placed(lead: float = 1.0, gpus: int = 0, **options: Any) -> Placement:
    return assign_devices(PlacementConfig(**options), ScheduleConfig(lead=lead), gpus=gpus, cpus=4)


@pytest.mark.parametrize(
    ("placement", "kind"),
    [
        (placed(0.0), Turns),
        (placed(1.0), Workers),
        (placed(1.0, gpus=1), Turns),  # a GPU that is shared
        (placed(1.0, gpus=3), Workers),
        (placed(0.0, rollout="external"), External),
        (placed(1.0, rollout="external"), External),
    ],
)
def test_the_producer_that_a_placement_means(placement, kind):
    assert producer_kind(placement) is kind


def test_a_producer_that_is_named_and_not_there():
    with pytest.raises(UserError, match=r"placement\.rollout is 'nobody'"):
        producer_kind(replace(placed(), producer="nobody"))


def test_just_one_producer_suits():
    for placement in (placed(0.0), placed(1.0), placed(1.0, gpus=4)):
        assert sum(kind.suits(placement) for kind in PRODUCERS.values()) == 1


# -- what is made by hand


class ByHand:
    """A pipeline that makes parts without models, and says what it is told to do."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.told, self.models = bench, [], self  # type: ignore[var-annotated]

    def make(self, generation: int, parts: Iterator[int], version: int | None = None) -> None:
        for part in parts:
            self.told.append((generation, part, version))
            self.bench.write(generation, part, generation if version is None else version)

    def release(self) -> None:
        self.told.append("release")


class Shown:
    """Around what is made: a room that says when it is entered and left."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.told.append("enter")
        yield
        self.told.append("leave")


@pytest.fixture
def bench(tmp_path) -> Bench:
    """Ten prompts in three parts."""
    return Bench(tmp_path / "run", schedule={"generations": 3, "lead": 1.0}, checkpoint={"restarts": 2})


def in_turns(bench: Bench, **options: Any) -> tuple[Workshop, list[Any]]:
    pipeline = ByHand(bench)
    return bench.shop(pipeline, room=Shown(pipeline.told), **options), pipeline.told


def test_turns_make_a_generation_before_they_return(bench):
    shop, told = in_turns(bench)
    turns = Turns(shop)
    turns.begin(1)
    assert told == ["enter", (1, 0, None), (1, 1, None), (1, 2, None), "release", "leave"]
    assert bench.store.manifest(1) is not None
    assert shop.shown == {1}
    assert turns.landed(1, []) == 0
    assert turns.landed(1, [0, 2]) == 1
    told.clear()
    damage(bench.store.part(1, 2))
    turns.begin(1)
    assert told == ["enter", (1, 2, None), "release", "leave"]
    bench.store.part(1, 0).unlink()
    told.clear()
    turns.want(1, 0)
    assert told == ["enter", (1, 0, None), "release", "leave"]
    turns.check()
    turns.complete(1, lambda: pytest.fail("there is nothing to wait for"))
    turns.close()


def test_turns_make_references_first(tmp_path):
    bench = Bench(
        tmp_path / "run", 6, schedule={"references": 0.5, "generations": 1, "lead": 0.0}, data={"references": "teacher"}
    )
    shop, told = in_turns(bench)
    Turns(shop).begin(0)
    made = [entry[0] for entry in told if isinstance(entry, tuple)]
    assert made == [REFERENCE] * len(bench.generations.parts(REFERENCE)) + [0, 0]
    assert bench.store.manifest(REFERENCE) is not None


def test_several_processes_share_the_parts(bench):
    """Each makes its own, the first one the manifest; all wait before, between and after."""
    waits = []
    second, told = in_turns(bench, rank=1, world=2, wait=lambda: waits.append("second"))
    second.make(0)
    assert told == [(0, 1, None), "release"]
    assert bench.store.manifest(0) is None
    first, told = in_turns(bench, rank=0, world=2, wait=lambda: waits.append("first"))
    first.make(0)
    assert told == [(0, 0, None), (0, 2, None), "release"]
    assert bench.store.manifest(0) is not None
    assert waits == ["second"] * 3 + ["first"] * 3


def test_a_selection_that_leaves_nothing_ends_a_run(tmp_path):
    bench = Bench(tmp_path / "run", selection={"rule": "delta_ifd", "lower": 50.0, "upper": 60.0})
    shop, _ = in_turns(bench)
    with pytest.raises(RunError, match="dropped all 10 responses"):
        shop.make(0)


# -- beside the trainer


class Asked(Beside):
    """Makes what is wanted at once."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.shop())
        self.bench, self.wanted = bench, []  # type: ignore[var-annotated]

    def want(self, generation: int, part: int) -> None:
        self.wanted.append((generation, part))
        self.bench.write(generation, part)


def test_parts_are_taken_as_they_land(bench):
    beside = Asked(bench)
    assert beside.landed(0, []) is None
    bench.write(0, 2)
    assert beside.landed(0, []) == 2
    bench.write(0, 1)
    assert beside.landed(0, []) == 1
    assert beside.landed(0, [1]) == 2
    assert beside.landed(0, [1, 2]) is None
    assert beside.wanted == []


def test_a_part_that_was_lost_is_waited_for(bench):
    """Once all have landed, or where they land in order, the next one is known; whoever takes it sees that it is gone."""
    beside = Asked(bench)
    for part in range(3):
        bench.write(0, part)
    bench.books.finish(0)
    bench.store.part(0, 0).unlink()
    assert beside.landed(0, []) == 0
    assert beside.landed(0, [0]) == 1

    class InOrder(Asked):
        in_order = True

    ordered = InOrder(bench)
    assert ordered.landed(1, []) == 0
    bench.write(1, 1)
    assert ordered.landed(1, []) == 0


def test_complete_waits_for_the_manifest_and_mends_what_was_lost(bench):
    beside = Asked(bench)
    for part in range(3):
        bench.write(0, part)
    bench.store.part(0, 0).unlink()
    bench.store.part(0, 1).write_bytes(b"PAR1")
    paused = []
    beside.complete(0, lambda: paused.append(bench.books.missing(0)))
    assert beside.wanted == [(0, 0), (0, 1)]
    assert paused == [[], []]
    manifest = bench.store.manifest(0)
    assert manifest is not None
    assert manifest.rows == 10
    beside.complete(0, lambda: pytest.fail("it is complete"))


def test_complete_leaves_it_to_others_if_they_finish_meanwhile(bench):
    class Slow(Asked):
        def want(self, generation: int, part: int) -> None:
            self.wanted.append((generation, part))

    beside = Slow(bench)
    bench.write(0, 0)

    def others() -> None:
        bench.write(0, 1)
        bench.write(0, 2)
        bench.books.finish(0)

    beside.complete(0, others)
    assert beside.wanted == [(0, 1)]


def test_beside_begins_with_what_can_be_made(bench):
    beside = Asked(bench)
    with pytest.raises(UserError, match=r"Generation 0 of .* lacks 3 parts, and the snapshot that writes them is not there"):
        beside.begin(0)
    bench.store.publish(0, lambda path: path.mkdir(parents=True), 0)
    beside.begin(0)
    bench.write(1, 0, version=0)  # begun by another snapshot, which is there
    beside.begin(1)
    bench.write(2, 0, version=2)
    with pytest.raises(UserError, match=r"Generation 2 .* lacks 2 parts"):
        beside.begin(2)
    for part in (1, 2):
        bench.write(2, part, version=2)
    beside.begin(2)  # nothing is missing
    bench.books.finish(2)
    damage(bench.store.part(2, 1))
    with pytest.raises(UserError, match=r"Generation 2 .* lacks 1 parts"):
        beside.begin(2)
    assert not bench.store.part(2, 1).exists()
    Asked(bench).open()
    assert bench.store.current == 0
    other = Asked(bench)
    other.shop.rank = 1
    other.begin(0)  # only the main process looks


def test_what_nobody_can_write_any_more_is_not_waited_for(bench):
    beside = Asked(bench)
    beside.check()
    bench.store.publish(0, lambda path: path.mkdir(parents=True), 0)
    beside.begin(0)
    bench.write(0, 0)
    beside.check()
    shutil.rmtree(bench.store.policy(0))
    with pytest.raises(UserError, match=r"Generation 0 of .* lacks 2 parts, and the snapshot that writes them is not there"):
        beside.check()
    for part in (1, 2):
        bench.write(0, part)
    beside.check()


# -- workers: decisions, with processes that are none


class Process:
    """A process that ends when and as the test says."""

    started: ClassVar[list[Process]] = []

    def __init__(self, command: list[str], **options: Any) -> None:
        self.command, self.options = command, options
        self.stdin, self.pid = io.BytesIO(), 4000 + len(self.started)
        self.code: int | None = None
        self.says = os.dup(options["pass_fds"][0])
        self.log = Path(options["stdout"].name)
        self.killed = False
        self.started.append(self)

    def ends(self, code: int, words: str = "", said: WorkerEnd | None = None) -> None:
        self.log.write_text(self.log.read_text() + words)
        if said is not None:
            said.tell(self.says)
        os.close(self.says)
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            assert self.stdin.closed, "it was told to end"
            self.ends(1)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def started(monkeypatch) -> list[Process]:
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(workers.subprocess, "Popen", Process)
    return Process.started


DEVICES = [WorkerDevices("cpu", "cpu"), WorkerDevices("cpu", "cpu")]


@pytest.fixture
def supervisor(bench, started) -> Iterator[Workers]:
    """Two workers, of which each makes every second part."""
    workers = Workers(bench.shop(placement=replace(placed(), workers=DEVICES)))
    workers.open()
    yield workers
    workers.close()
    assert all(process.stdin.closed for process in started)


def failures(bench: Bench) -> list[dict[str, Any]]:
    return [
        dict(span.facts, role=span.role, process=span.process) for span in read_events(bench.events.path, SpanName.FAILED)
    ]


def test_workers_that_live_or_have_nothing_left_are_left_alone(supervisor, started, bench):
    assert len(started) == 2
    supervisor.check()
    started[0].ends(0)
    supervisor.check()
    assert len(started) == 2
    assert bench.said.getvalue() == ""
    supervisor.want(0, 1)  # the other one still works
    assert len(started) == 2
    supervisor.want(0, 2)  # was there before, and is lost
    assert len(started) == 3
    assert started[2].command[5:7] == ["0", "2"]


@pytest.mark.parametrize(("kind", "said"), [(UserError, "user"), (RunError, "run")])
def test_a_failure_that_a_worker_can_name_ends_the_run(supervisor, started, bench, kind, said):
    """As it would fail again. It is told through a pipe, whatever is in the log, and blames the worker."""
    started[1].ends(kind.exit_status, "some words\n", WorkerEnd(said, "The snapshot is damaged.", "Restore it."))
    with pytest.raises(kind) as caught:
        supervisor.check()
    assert str(caught.value) == "The snapshot is damaged. Restore it."
    assert caught.value.role == "refresh-1"
    assert len(started) == 2
    [failed] = failures(bench)
    assert (failed["role"], failed["process"], failed.get("blames")) == ("refresh-1", 4001, None)
    assert (failed["error"], failed["message"], failed["explained"]) == (kind.__name__, str(caught.value), True)


@pytest.mark.parametrize(
    ("code", "how"),
    [(-9, "was killed by signal 9 (out of memory?)"), (-11, "was killed by signal 11"), (1, "failed"), (3, "failed")],
)
def test_a_worker_that_died_is_started_again(supervisor, started, bench, code, how):
    started[0].ends(code, "".join(f"line {i}\n" for i in range(100)))
    supervisor.check()
    assert len(started) == 3
    assert started[2].command[3:8] == [*started[0].command[3:7], started[2].command[7]]
    said = bench.said.getvalue()
    assert f"The refresh {how} (process 4000, log {bench.store.path}/logs/refresh-0.log):\nline {100 - LAST_WORDS}\n" in said
    assert f"line {99 - LAST_WORDS}\n" not in said
    assert said.endswith("line 99\nIt is started again from the first missing part (1 of 2).\n")
    [again] = read_events(bench.events.path, SpanName.RESTART)
    assert again.facts == {"rank": 0, "code": code}
    assert failures(bench) == []


def test_the_words_of_a_worker_are_its_own(supervisor, started, bench):
    started[0].ends(1, "old words\n")
    supervisor.check()
    started[2].ends(1, "new words\n")
    bench.said.truncate(0)
    supervisor.check()
    assert "new words" in bench.said.getvalue()
    assert "old words" not in bench.said.getvalue()


def test_a_worker_that_dies_too_often_ends_the_run(supervisor, started, bench):
    for death in range(2):
        started[-1 if death else 0].ends(1, f"death {death}\n")
        supervisor.check()
    started[-1].ends(-9, "the last\n")
    with pytest.raises(RunError) as caught:
        supervisor.check()
    assert "was killed by signal 9 (out of memory?)" in caught.value.what
    assert "the last\nIt died 3 times without finishing a part (checkpoint.restarts 2)." in caught.value.what
    assert caught.value.remedy == "What was finished is kept: mend what the log names and run the same command again."
    assert caught.value.role == "refresh-0"
    assert [failed["role"] for failed in failures(bench)] == ["refresh-0"]
    assert len(started) == 4


def test_a_part_finished_in_between_is_a_fresh_start(supervisor, started, bench):
    """Of the worker's own: parts that the other one made do not count."""
    for death in range(4):
        started[-1 if death else 0].ends(1)
        bench.write(death // 2, 2 * (death % 2))
        supervisor.check()
    assert bench.said.getvalue().count("(1 of 2)") == 4
    started[-1].ends(1)
    bench.write(0, 1)
    supervisor.check()
    started[-1].ends(1)
    with pytest.raises(RunError, match="died 3 times"):
        supervisor.check()


def test_deaths_are_each_workers_own(supervisor, started):
    for death in range(2):
        for rank in (0, 1):
            supervisor.workers[rank].process.ends(1)
        supervisor.check()
        assert len(started) == 4 + 2 * death


def test_half_a_word_is_none(supervisor, started, bench):
    """A worker killed while it tells what it failed with has died."""
    os.write(started[0].says, b'{"kind": "us')
    started[0].ends(-9)
    supervisor.check()
    assert len(started) == 3


def test_workers_inherit_nothing_that_is_the_trainers(monkeypatch, bench, started):
    """A process that found a RANK would take itself for a trainer, and wait for the others."""
    mine = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"]
    for name in [*mine, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "NPD_TEACHER_API_KEY"]:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    threads = replace(placed(), workers=DEVICES[:1], rollout_threads=2, teacher_threads=3, first_threads=1)
    supervisor = Workers(bench.shop(placement=threads))
    supervisor.open()
    environment = started[0].options["env"]
    assert not [name for name in environment if name in mine or name.startswith(("ACCELERATE_", "MASTER_"))]
    assert environment["NPD_TEACHER_API_KEY"] == "7"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["PATH"] == os.environ["PATH"]
    assert started[0].options["start_new_session"]
    assert started[0].command[1:4] == ["-c", BEGIN, str(bench.store.path)]
    supervisor.close()


@pytest.mark.parametrize(("count", "in_order"), [(1, True), (2, False)])
def test_parts_of_one_worker_land_in_order(bench, count, in_order):
    assert Workers(bench.shop(placement=replace(placed(), workers=DEVICES[:count]))).in_order == in_order


def test_workers_see_their_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible_gpus(["cuda:2", "cuda:0"]) == {"CUDA_VISIBLE_DEVICES": "6,4"}
    assert visible_gpus([]) == {}


def test_a_worker_that_does_not_end_is_killed(tmp_path):
    class Deaf(Process):
        started: ClassVar[list[Process]] = []

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and not self.killed:
                raise workers.subprocess.TimeoutExpired("worker", timeout)
            return -9

    said, says = os.pipe()
    with (tmp_path / "log").open("wb") as file:
        process = Deaf([], pass_fds=(says,), stdout=file)
    worker = Worker(process, said, tmp_path / "log", 0)  # type: ignore[arg-type]
    worker.end()
    assert process.killed
    assert process.stdin.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(said)
    for descriptor in (says, process.says):
        os.close(descriptor)


def test_what_went_wrong_is_heard_once():
    said, says = os.pipe()
    error = UserError("what", "remedy")
    WorkerEnd.of(error).tell(says)
    os.close(says)
    worker = Worker(None, said, Path("log"), 0)  # type: ignore[arg-type]
    heard = worker.failure("refresh-3")
    assert isinstance(heard, NpdError)
    assert (type(heard), heard.what, heard.remedy, heard.role) == (UserError, "what", "remedy", "refresh-3")
    assert worker.failure("refresh-3") is None
    assert Producer.waits_for == ""
