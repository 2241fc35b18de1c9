"""Refreshes beside the trainer: the same bytes however they interleave and whoever is killed, and nobody left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import HANG, killed_from_outside, write_jsonl
from rich.console import Console
from transformers import AutoModelForCausalLM

import npd
import npd.cli
import npd.generations.workers
import npd.run
import npd.store
from npd.config import PlacementConfig, ScheduleConfig
from npd.generations.books import Books
from npd.generations.generation import Generations
from npd.generations.workers import BEGIN, Workers
from npd.observe.display import Display
from npd.observe.events import read_events
from npd.records import WorkerEnd
from npd.report.facts import gather
from npd.store import Store
from npd.train.trainer import Trainer
from npd.train.work import RunWork

Tree = dict[str, Any]

TIMING = ("tokens_per_second", "publish_seconds")

PROMPTS = [{"prompt": f"{n}+{n % 7}*3=", "source": "ab"[n % 2]} for n in range(10, 16)]


# -- processes


def alive(pid: int) -> bool:
    """Does this process run? One that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], Any], what: str, seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.005)


class Forked:
    """subprocess.Popen's stand-in: a job as a fork of the trainer, which has imported all that a job needs."""

    started: Path
    """A file with the process id of every job of a test."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], pass_fds: tuple[int, ...], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-c", BEGIN]
        theirs, mine = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                for here, there in ((theirs, 0), (stdout.fileno(), 1), (stdout.fileno(), 2)):
                    os.dup2(here, there)
                (says,) = pass_fds
                os.closerange(3, says)  # as Popen does: the pipe's other end, the run's lock, ...
                os.closerange(says + 1, 4096)
                sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", 1, closefd=False), open(2, "w", 1)  # noqa: SIM115
                sys.argv = command[2:]
                npd.generations.workers.main()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        with self.started.open("a") as file:
            file.write(f"{self.pid}\n")
        os.close(theirs)
        self.stdin = os.fdopen(mine, "wb")

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float = HANG) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("job", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def jobs_started() -> list[int]:
    return [int(line) for line in Forked.started.read_text().split()]


def no_jobs_left(seconds: float = 0.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, jobs_started())):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(autouse=True)
def forked_jobs(monkeypatch, tmp_path) -> Iterator[None]:
    """Jobs are forks; none outlives its test."""
    monkeypatch.setattr(
        npd.generations.workers,
        "subprocess",
        SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired),
    )
    Forked.started = tmp_path / "jobs"
    Forked.started.write_text("")
    yield
    left = [pid for pid in jobs_started() if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "jobs outlived their trainer"


class Child:
    """A trainer in a forked process. A kill there is a real one: no handler and no `finally` runs."""

    def __init__(self, action: Callable[[], Any], folder: Path) -> None:
        self.report = folder / "report"
        self.report.unlink(missing_ok=True)
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                action()
                status = 0
            except BaseException:
                self.report.write_text(traceback.format_exc())
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if done else None
        return self.status

    def wait(self, seconds: float = HANG) -> int:
        """Its exit status, or minus the signal that ended it."""
        try:
            until(lambda: self.poll() is not None, "end of the process", seconds)
        finally:
            self.kill()
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def words(self) -> str:
        return self.report.read_text() if self.report.exists() else ""


def distilled(tree: Tree, folder: Path, hook: Callable[[], Any] = lambda: None) -> str:
    """Run to the end in a child, after `hook` there; what the trainer said."""
    child, said = started(tree, folder, hook)
    assert child.wait() == 0, child.words() + said()
    return said()


def started(tree: Tree, folder: Path, hook: Callable[[], Any] = lambda: None) -> tuple[Child, Callable[[], str]]:
    said = folder / "said"
    said.unlink(missing_ok=True)

    def action() -> None:
        hook()
        with said.open("w", buffering=1) as file:
            npd.distill(tree, display=Display(Console(file=file, width=200)))

    return Child(action, folder), lambda: said.read_text() if said.exists() else ""


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function for good, in a child: `wrapper` is called with the real one first."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(real, *args, **kwargs)

    setattr(owner, name, wrapped)


def at_step(n: int, action: Callable[[], None]) -> None:
    """Do something before the nth optimiser step of the run."""

    def step(real: Any, trainer: Trainer, samples: Any, rows: Any, tokens: int, step: int, *args: Any) -> Any:
        if step == n:
            action()
        return real(trainer, samples, rows, tokens, step, *args)

    patch(Trainer, "step", step)


def damage(file: Path) -> None:
    """Flip a byte in the middle; of a part, in a column that everybody reads."""
    data = bytearray(file.read_bytes())
    at = len(data) // 2
    if file.suffix == ".parquet":
        chunks = pq.read_metadata(file).row_group(0)
        columns = [chunks.column(i) for i in range(chunks.num_columns)]
        ids = next(c for c in columns if c.path_in_schema.startswith("response_ids"))
        at = ids.data_page_offset + ids.total_compressed_size // 2
    data[at] ^= 0xFF
    file.write_bytes(data)


# -- runs


ONE_THREAD = {"train_threads": 1, "rollout_threads": 1, "teacher_threads": 1}


def three_parts(data: Path, student: Path, teacher: Path, *, lead: float) -> Tree:
    """The configuration of three generations of three parts, without a run directory; the prompts are written to `data`."""
    return {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "data": {"train": str(write_jsonl(data, PROMPTS)), "max_prompt_tokens": 16},
        "schedule": {"generations": 3, "passes": 2, "lead": lead},
        "rollout": {"max_new_tokens": 8, "batch_size": 4, "part_size": 2},
        "scoring": {"top_k": 3, "batch_tokens": 64, "free": "always"},
        "selection": {"rule": "none"},
        "packing": {"length": 24},
        "training": {"batch_tokens": 48, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 3, "keep": 3, "restarts": 3},
        "tracking": {"trackers": [], "report": False},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory, teacher_dir, student_dir) -> Tree:
    """A run of a second: three generations of three parts, two passes each, the last one overlapped."""
    tree = three_parts(tmp_path_factory.mktemp("jobs") / "data.jsonl", student_dir, teacher_dir, lead=1.0)
    tree["data"]["eval"] = tree["data"]["train"]
    return tree | {"evaluation": {"kl_prompts": 2, "every_passes": 2}, "placement": dict(ONE_THREAD)}


@pytest.fixture
def make(base, tmp_path) -> Callable[..., Tree]:
    """The configuration of a run in a directory of this test; keyword arguments add sections' keys."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Tree:
        changed = {section: base.get(section, {}) | keys for section, keys in sections.items()}
        return base | {"run_dir": str(tmp_path / name)} | changed

    return make


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def part_files(run_dir: Path, generation: int) -> list[Path]:
    return sorted((run_dir / "generations" / f"g{generation:03d}").glob("part-*.parquet"))


def parts_of(run_dir: Path, generation: int) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in part_files(run_dir, generation)])


def state_of(run_dir: str | Path) -> dict[str, Any]:
    """All of a finished run that must not depend on who worked when, or was interrupted."""
    run_dir = Path(run_dir)
    patterns = ["generations/g*/*", "generations/CURRENT", "policy/v*/model.safetensors", "policy/LATEST"]
    patterns += ["checkpoints/step-*/model.safetensors", "checkpoints/LATEST", "student/model.safetensors", "cache/*"]
    files = [file for pattern in patterns for file in run_dir.glob(pattern)]
    lines = [{key: value for key, value in line.items() if key not in TIMING} for line in metrics_of(run_dir)]
    state: dict[str, Any] = {str(file.relative_to(run_dir)): file.read_bytes() for file in files}
    return state | {"metrics": lines, "temporary": sorted(str(f.relative_to(run_dir)) for f in run_dir.rglob(".*.tmp"))}


def assert_same(got: dict[str, Any], wanted: dict[str, Any], where: str = "") -> None:
    different = sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
    if different:  # pytest.fail: a rewritten assert would print the weights
        details = [
            f"{one} != {other}"
            for one, other in zip(got["metrics"], wanted["metrics"], strict=False)
            if one != other
        ]  # fmt: skip
        more = f"; {details[0]}" if details else f"; {got['temporary']}"
        pytest.fail(f"{where or 'the run'}: {different} differ from the undisturbed run{more}", pytrace=False)


@pytest.fixture(scope="module")
def states(base, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """State of the undisturbed run with these options, made once."""
    known: dict[str, dict[str, Any]] = {}

    def of(**sections: dict[str, Any]) -> dict[str, Any]:
        name = json.dumps(sections, sort_keys=True)
        if name not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            run_dir = folder / "run"
            changed = {section: base.get(section, {}) | keys for section, keys in sections.items()}
            distilled(base | {"run_dir": str(run_dir)} | changed, folder)
            known[name] = state_of(run_dir)
            assert known[name]["temporary"] == []
        return known[name]

    return of


def roles(run_dir: str | Path, name: str) -> set[str]:
    return {event.role for event in read_events(Path(run_dir) / "events.jsonl") if event.name == name}


def snapshot_steps(run_dir: str | Path) -> list[int]:
    """Optimiser steps after which each snapshot was taken."""
    files = sorted(Path(run_dir).glob("policy/v*/npd.json"))
    return [json.loads(file.read_text())["step"] for file in files]


def restarts(run_dir: str | Path) -> int:
    return sum(event.name == "restart" for event in read_events(Path(run_dir) / "events.jsonl"))


# -- 1: overlap is deterministic


@pytest.mark.parametrize("lead", [0.5, 1.0, 2.0])
def test_the_same_seed_gives_the_same_bytes(make, states, tmp_path, lead):
    tree = make(schedule={"lead": lead})
    distilled(tree, tmp_path)
    assert_same(state_of(tree["run_dir"]), states(schedule={"lead": lead}))
    # It was overlapped: the job made all of it, and the next generation was begun before this one had ended.
    assert roles(tree["run_dir"], "part") == {"refresh-0"}
    lines = metrics_of(Path(tree["run_dir"]))
    end = next(line["step"] for line in lines if "generation_ended" in line)
    half = max(line["step"] for line in lines if (line.get("generation"), line.get("pass")) == (0, 0))
    taken = snapshot_steps(tree["run_dir"])[1]
    if lead == 2.0:
        assert taken == 0  # at once: v000001 is the student as it started
    elif lead == 1.0:
        assert taken == half  # a whole pass before the end
    else:
        assert half < taken < end


def test_leads_differ(states):
    students = {states(schedule={"lead": lead})["student/model.safetensors"] for lead in (0.0, 0.5, 1.0, 2.0)}
    assert len(students) == 4


def test_no_lead_is_the_sequence_by_hand(make, states, tmp_path):
    """npd.refresh, then training to the next snapshot, and so on: the same as one run that takes turns."""
    tree = make(schedule={"lead": 0.0})

    def stop_once(version: int) -> None:
        def put(real: Any, aside: Path, path: Path) -> None:
            real(aside, path)
            if path.name == f"v{version:06d}":
                kill_self()

        patch(npd.store.files, "put", put)

    for generation in range(3):
        assert npd.refresh(tree).policy_version == generation
        if generation < 2:
            child, _ = started(tree, tmp_path, partial(stop_once, generation + 1))
            assert child.wait() == -signal.SIGKILL, child.words()
    distilled(tree, tmp_path)
    assert_same(state_of(tree["run_dir"]), states(schedule={"lead": 0.0}))
    assert jobs_started() == []


# -- 2: policy_version is truthful


def test_every_response_was_written_by_the_snapshot_it_names(make, tmp_path):
    tree = make(checkpoint={"keep": 10}, rollout={"samples_per_prompt": 2})
    distilled(tree, tmp_path)
    run_dir = Path(tree["run_dir"])
    snapshots = [AutoModelForCausalLM.from_pretrained(run_dir / f"policy/v{v:06d}", dtype=torch.float32) for v in range(3)]

    @torch.no_grad()
    def furthest(row: dict[str, Any], version: int) -> float:
        prompt, response = row["prompt_ids"], row["response_ids"]
        logits = snapshots[version](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        got = logits.float().log_softmax(-1)[range(len(response)), response]
        return float((got - torch.tensor(row["behavior_logprobs"])).abs().max())

    for generation in range(3):
        rows = parts_of(run_dir, generation).to_pylist()
        assert len(rows) == 12
        assert {row["policy_version"] for row in rows} == {generation}
        assert max(furthest(row, generation) for row in rows) <= 1e-4
        for other in {0, 1, 2} - {generation}:
            assert min(furthest(row, other) for row in rows) > 1e-3
    # The step that a snapshot says it is from lies before the end of the generation it comes from.
    steps = snapshot_steps(run_dir)
    ends = [line["step"] for line in metrics_of(run_dir) if "generation_ended" in line]
    assert steps[0] == 0
    assert 0 < steps[1] < ends[0] < steps[2] < ends[1]


# -- 3: kill -9 at any moment


@pytest.mark.parametrize("wanted", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(make, states, tmp_path, wanted):
    """Trainer, job or both, at moments drawn at random, many times in each of several runs.

    The longer a run takes, the rarer its kills: on the slowest machine it comes to its end.
    """
    rng = random.Random(0)
    trainers = jobs = turns = again = moments = 0
    while moments < wanted or turns < 2 or min(trainers, jobs) < wanted // 5 or again < wanted // 10:
        assert turns < 100, f"{trainers} trainers, {jobs} jobs were hit, {again} jobs replaced"
        keep = {"checkpoint": {"every_steps": 2, "keep": (3, 1)[turns % 2], "restarts": 1000}}
        tree = make(f"run-{turns}", **keep)
        child, said = started(tree, tmp_path)
        longest = 0.8
        while True:
            pause = time.monotonic() + rng.uniform(0.0, longest)
            longest *= 1 + 1 / wanted
            while child.poll() is None and time.monotonic() < pause:
                time.sleep(0.001)
            if child.poll() is not None:
                break
            victims = rng.choice(("trainer", "job", "job", "both"))
            hit = False
            if victims != "trainer" and (pids := [pid for pid in jobs_started() if alive(pid)]):
                os.kill(pids[-1], signal.SIGKILL)
                jobs, hit = jobs + 1, True
            if victims != "job" and child.poll() is None:
                child.kill()
                if child.status == -signal.SIGKILL:
                    trainers, hit = trainers + 1, True
                    if rng.random() < 0.3:  # otherwise the next trainer may still meet the job of this one
                        assert no_jobs_left(HANG), "a job outlived its trainer"
                    child, said = started(tree, tmp_path)
            moments += hit
        assert child.status == 0, child.words() + said()
        run_dir = Path(tree["run_dir"])
        for generation in range(3) if turns % 2 == 0 else (2,):
            table = parts_of(run_dir, generation)
            assert sorted(table["sample_id"].to_pylist()) == sorted(
                f"g{generation:03d}-p{part:05d}-{row:05d}" for part in range(3) for row in range(2)
            )
            assert len(set(table["prompt_id"].to_pylist())) == 6
        assert no_jobs_left(HANG), "a job outlived its trainer"
        assert_same(state_of(run_dir), states(**keep), f"run {turns}, {moments} moments so far")
        turns, again = turns + 1, again + restarts(run_dir)  # of jobs that their trainer outlived
    print(f"{trainers + jobs} kills hit ({trainers} trainers, {jobs} jobs) at {moments} moments in {turns} runs")


# -- 4: jobs that fail by themselves


def fail_parts(counter: Path, fails: Callable[[list[str], str], bool]) -> None:
    """Making a part raises wherever `fails(parts tried so far, this part)`; calls are counted over all processes."""

    def table(real: Any, generations: Generations, generation: int, part: int) -> pa.Table:
        tried = counter.read_text().split() if counter.exists() else []
        with counter.open("a") as file:
            file.write(f"{generation}/{part}\n")
        if fails(tried, f"{generation}/{part}"):
            raise ValueError("boom")
        return real(generations, generation, part)

    patch(Generations, "table", table)


def test_a_job_that_raises_is_started_again(make, states, tmp_path):
    tree = make()
    said = distilled(tree, tmp_path, lambda: fail_parts(tmp_path / "tried", lambda tried, _: len(tried) < 2))
    assert said.count("ValueError: boom") == 2
    assert said.count("Traceback (most recent call last)") == 2
    assert "in make_parts" in said  # its own traceback, not the trainer's
    assert "It is started again from the first missing part (1 of 3)" in said
    assert "It is started again from the first missing part (2 of 3)" in said
    assert restarts(tree["run_dir"]) == 2
    assert_same(state_of(tree["run_dir"]), states())


def assert_blamed(run_dir: str) -> None:
    """The report names the job that failed, not the trainer that told of it."""
    failed = gather(run_dir).status.failed
    assert failed is not None
    assert failed.role == "refresh-0"
    assert failed.process not in processes(Path(run_dir), "trainer")


def test_a_job_that_raises_for_ever_ends_the_run(make, tmp_path):
    tree = make(checkpoint={"restarts": 2})
    child, said = started(tree, tmp_path, lambda: fail_parts(tmp_path / "tried", lambda *_: True))
    assert child.wait() == 1
    words = child.words()
    assert "npd.errors.RunError: The refresh failed (process" in words
    assert str(Path(tree["run_dir"]) / "logs/refresh-0.log") in words
    assert "ValueError: boom" in words.partition("RunError: The refresh failed")[2]
    assert "It died 3 times without finishing a part (checkpoint.restarts 2)" in words
    assert said().count("started again") == 2
    assert (tmp_path / "tried").read_text().split() == ["0/0"] * 3
    assert_blamed(tree["run_dir"])
    assert no_jobs_left()
    assert not (Path(tree["run_dir"]) / "student").exists()


def test_a_log_that_cannot_be_written_hides_no_failure(tmp_path):
    """It lies on the disk that is full."""
    placed = npd.placement.assign_devices(PlacementConfig(), ScheduleConfig(), gpus=0, cpus=2)
    told, tells = os.pipe()
    with open("/dev/full", "wb") as log:
        arguments = [str(tmp_path), json.dumps(asdict(placed)), "0", "1", "0", str(tells)]
        job = Forked([sys.executable, "-c", BEGIN, *arguments], stdout=log, pass_fds=(tells,))
    os.close(tells)
    assert job.wait() == 2
    end = WorkerEnd.hear(told)
    os.close(told)
    assert end is not None
    assert end.what == f"{tmp_path} holds no run of `npd distill`; start one there first."


def test_deaths_are_counted_afresh_after_a_part(make, states, tmp_path):
    tree = make(checkpoint={"restarts": 1})
    said = distilled(tree, tmp_path, lambda: fail_parts(tmp_path / "tried", lambda tried, part: part not in tried))
    assert said.count("(1 of 1)") == 9  # once for each part of three generations
    assert_same(state_of(tree["run_dir"]), states())


def test_a_damaged_snapshot_stops_the_run_at_once(make, tmp_path):
    def put(real: Any, aside: Path, path: Path) -> None:
        if path.name == "v000001":
            damage(aside / "model.safetensors")
        real(aside, path)

    tree = make()

    def hook() -> None:
        patch(npd.store.files, "put", put)

    child, said = started(tree, tmp_path, hook)
    assert child.wait() == 1
    snapshot = Path(tree["run_dir"]) / "policy/v000001"
    assert f"npd.errors.UserError: The snapshot {snapshot} is damaged: model.safetensors is not what" in child.words()
    assert "Traceback" not in child.words().rpartition("npd.errors.UserError")[2]
    assert_blamed(tree["run_dir"])
    assert "started again" not in said()
    assert restarts(tree["run_dir"]) == 0
    assert len(jobs_started()) == 1
    assert no_jobs_left()


@pytest.mark.parametrize("generations", [1, 3])
@pytest.mark.parametrize("slow", [False, True], ids=["", "late-manifest"])
def test_a_selection_that_keeps_nothing_stops_the_run_at_once(make, tmp_path, generations, slow):
    def late(real: Any, *args: Any) -> Any:
        time.sleep(0.5)  # the trainer has read every part by then
        return real(*args)

    def hook() -> None:
        if slow:
            patch(Books, "finish", late)

    tree = make(schedule={"generations": generations}, selection={"rule": "delta_ifd", "lower": 50.0, "upper": 60.0})
    child, said = started(tree, tmp_path, hook)
    assert child.wait() == 1, said()
    assert "npd.errors.RunError: Selection dropped all 6 responses of this generation" in child.words()
    assert "below selection.lower 50.0 (degenerate)" in child.words()
    assert "started again" not in said()
    assert len(jobs_started()) == 1
    assert no_jobs_left()
    assert not (Path(tree["run_dir"]) / "student").exists()


def test_no_generation_is_left_without_its_manifest(make, states, tmp_path):
    """The trainer may be through with a generation before the job has counted it."""

    def late(real: Any, *args: Any) -> Any:
        time.sleep(0.5)
        return real(*args)

    tree = make()
    distilled(tree, tmp_path, lambda: patch(Books, "finish", late))
    assert_same(state_of(tree["run_dir"]), states())


# -- 5: damaged parts


def when_asked_for(generation: int, part: int, action: Callable[[RunWork], None]) -> None:
    """Do something once, between a part's landing and its being read."""
    done: list[bool] = []

    def next_part(real: Any, run: RunWork, taken: list[int]) -> int:
        found = real(run, taken)
        if (run.at.generation, found) == (generation, part) and not done:
            done.append(True)
            until(run.store.part(generation, part).exists, "part")
            action(run)
        return found

    patch(RunWork, "next_part", next_part)


def await_job(run: RunWork) -> None:
    assert isinstance(run.supply, Workers)
    workers = run.supply.workers
    until(lambda: workers[0].process.poll() == 0, "end of the job")


@pytest.mark.parametrize(("generation", "part"), [(0, 0), (1, 1), (2, 2)])
def test_a_part_damaged_before_it_is_taken_is_made_again(make, states, tmp_path, generation, part):
    """By the trainer's word: the job, which would notice too, reads it only after that."""

    def later(real: Any, books: Books, finished: int) -> Any:
        if finished == generation:
            until(lambda: "It is made again." in (tmp_path / "said").read_text(), "word of the damage")
        return real(books, finished)

    def hook() -> None:
        patch(Books, "finish", later)
        when_asked_for(generation, part, lambda run: damage(run.store.part(generation, part)))

    tree = make()
    said = distilled(tree, tmp_path, hook)
    assert f"g{generation:03d}/part-{part:05d}.parquet is damaged" in said
    assert_same(state_of(tree["run_dir"]), states())


@pytest.mark.parametrize(("how", "part"), [(damage, 0), (Path.unlink, 1), (damage, 2), (Path.unlink, 2)])
def test_a_part_lost_after_the_job_has_ended_is_made_again(make, states, tmp_path, how, part):
    def action(run: RunWork) -> None:
        await_job(run)
        how(run.store.part(2, part))

    tree = make()
    distilled(tree, tmp_path, lambda: when_asked_for(2, 0, action))
    assert len(jobs_started()) == 2
    assert_same(state_of(tree["run_dir"]), states())


@pytest.mark.parametrize(("step", "part"), [("first", 0), ("first", 1), ("last", 1)])
def test_a_damaged_part_of_a_finished_generation_is_made_again_at_resume(make, states, tmp_path, step, part):
    often = {"checkpoint": {"every_steps": 1, "keep": 3}}
    tree = make(**often)
    lines = [line for line in states(**often)["metrics"] if line.get("generation") == 2 and "loss" in line]
    number = lines[1]["step"] if step == "first" else lines[-1]["step"]

    def hook() -> None:
        when_asked_for(2, 0, await_job)
        at_step(number, kill_self)

    child, said = started(tree, tmp_path, hook)
    assert child.wait() == -signal.SIGKILL, child.words() + said()
    store = Store(tree["run_dir"])
    assert store.manifest(2) is not None
    facts = store.checkpoint_facts(store.checkpoints()[-1])
    assert facts["generation"] == 2
    assert len(facts["parts"]) == (1 if step == "first" else 3)
    damage(store.part(2, part))
    said_then = distilled(tree, tmp_path)
    assert f"part-{part:05d}.parquet was damaged; it is made again" in said_then
    assert_same(state_of(tree["run_dir"]), states(**often))


# -- 6: nobody is left, and nobody intrudes


@pytest.mark.parametrize(("error", "step"), [(RuntimeError, 1), (KeyboardInterrupt, 5)])
def test_a_trainer_that_raises_leaves_no_process(make, states, tmp_path, error, step):
    def fail() -> None:
        raise error("enough")

    tree = make()
    child, _ = started(tree, tmp_path, lambda: at_step(step, fail))
    assert child.wait() == 1
    assert "enough" in child.words()
    assert no_jobs_left()  # gone before their trainer
    assert not list(Path(tree["run_dir"]).rglob(".*.tmp"))
    distilled(tree, tmp_path)
    assert_same(state_of(tree["run_dir"]), states())


def test_one_trainer_at_a_time(make, states, tmp_path):
    tree = make()
    there = tmp_path / "there"

    def pause() -> None:
        there.touch()
        time.sleep(2 * HANG)

    child, _ = started(tree, tmp_path, lambda: at_step(4, pause))
    until(there.exists, "fourth step")
    before = metrics_of(Path(tree["run_dir"]))
    for intrude in (npd.distill, npd.refresh, npd.run.reselect):
        with pytest.raises(npd.UserError, match=rf"is in use by process {child.pid} on"):
            intrude(tree)
    assert child.poll() is None
    assert metrics_of(Path(tree["run_dir"])) == before
    child.kill()
    distilled(tree, tmp_path)  # at once, though the job may not have noticed yet
    assert_same(state_of(tree["run_dir"]), states())


# -- 7: several followers, and another selection


def command(*arguments: str) -> Callable[[], None]:
    return lambda: npd.cli.main(list(arguments), standalone_mode=False)


def begun(tree: Tree, folder: Path) -> Path:
    """A run whose first snapshot is published and whose trainer is gone."""

    def publish(real: Any, run: RunWork, version: int) -> None:
        real(run, version)
        run.publisher.join()
        kill_self()

    child, _ = started(tree, folder, lambda: patch(RunWork, "publish", publish))
    assert child.wait() == -signal.SIGKILL, child.words()
    return Path(tree["run_dir"])


def test_two_followers_share_a_generation(make, states, tmp_path):
    more = {"schedule": {"generations": 1}, "rollout": {"part_size": 1}}
    run_dir = begun(make(placement={"rollout": "external"}, **more), tmp_path)
    assert jobs_started() == []
    followers = []
    for share in ("1/2", "2/2"):
        (tmp_path / share[0]).mkdir()
        followers.append(Child(command("refresh", str(run_dir), "--follow", "--share", share), tmp_path / share[0]))
    for follower in followers:
        assert follower.wait() == 0, follower.words()
    events = [e for e in read_events(run_dir / "events.jsonl") if e.name == "part"]
    assert sorted(e.facts["part"] for e in events if e.role == "refresh-0") == [0, 2, 4]
    assert sorted(e.facts["part"] for e in events if e.role == "refresh-1") == [1, 3, 5]
    alone = states(**more)
    files = {str(file.relative_to(run_dir)): file.read_bytes() for file in run_dir.glob("generations/g000/*")}
    assert len(files) == 7
    assert_same({"metrics": [], **files}, {"metrics": [], **{name: alone.get(name, b"") for name in files}})


def test_two_jobs_beside_the_trainer(make, tmp_path):
    """Two refreshes started by the trainer make the same parts as one; each sample is trained on once a pass."""
    more = {"schedule": {"generations": 2}, "rollout": {"part_size": 1}}
    tree = make(**(more | {"placement": {"rollout": ["cpu", "cpu"]}}))
    distilled(tree, tmp_path)
    run_dir = Path(tree["run_dir"])
    assert len(jobs_started()) == 2
    assert {event.role for event in read_events(run_dir / "events.jsonl")} == {"trainer", "refresh-0", "refresh-1"}
    trained = 0
    for generation in range(2):
        tokens = sum(map(len, parts_of(run_dir, generation)["response_ids"].to_pylist()))
        ends = [
            max(line["tokens"] for line in metrics_of(run_dir) if (line.get("generation"), line.get("pass")) == at)
            for at in ((generation, 0), (generation, 1))
        ]
        assert ends[1] - ends[0] == tokens
        trained += 2 * tokens
        assert ends[1] == trained


BAND = {"rule": "delta_ifd", "lower": -0.05, "upper": 0.4}


def every_file(run_dir: Path) -> dict[str, bytes]:
    files = (file for file in run_dir.rglob("*") if file.is_file() and file.name not in (".lock", "events.jsonl"))
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def test_reselect_equals_a_run_with_that_selection(make, states, tmp_path):
    tree, other = make(), make(selection=BAND)
    npd.refresh(tree)
    run_dir = Path(tree["run_dir"])
    old = parts_of(run_dir, 0)["verdict"].to_pylist()
    assert npd.run.reselect(other).index == 0
    new = parts_of(run_dir, 0)["verdict"].to_pylist()
    assert set(old) == {"proximal"}
    assert len(set(new)) > 1
    straight = make("straight", selection=BAND)
    npd.refresh(straight)
    there = Path(straight["run_dir"])
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "manifest.json"):
        assert (run_dir / "generations/g000" / name).read_bytes() == (there / "generations/g000" / name).read_bytes()
    with pytest.raises(npd.UserError, match="made by another configuration: selection"):
        npd.distill(tree)
    distilled(other, tmp_path)
    assert_same(state_of(run_dir), states(selection=BAND))


def test_reselect_by_the_command(make, tmp_path):
    tree = make()
    npd.refresh(tree)
    options = [f"--selection.{key}={value}" for key, value in BAND.items()]
    assert Child(command("refresh", tree["run_dir"], "--reselect", *options), tmp_path).wait() == 0
    kept = yaml.safe_load((Path(tree["run_dir"]) / "config.yaml").read_text())["selection"]
    assert {key: kept[key] for key in BAND} == BAND


def test_reselect_changes_nothing_when_it_is_refused(make, tmp_path):
    tree = make()
    with pytest.raises(npd.UserError, match="has no finished generation"):
        npd.run.reselect(tree)
    npd.refresh(tree)
    run_dir = Path(tree["run_dir"])
    before = every_file(run_dir)
    with pytest.raises(npd.UserError, match=r"changes selection\.\* alone, but .* differs in scoring.top_k: 3 -> 4"):
        npd.run.reselect(make(selection=BAND, scoring={"top_k": 4}))
    assert every_file(run_dir) == before
    with pytest.raises(npd.RunError, match="Selection dropped all 6 responses"):
        npd.run.reselect(make(selection={"rule": "delta_ifd", "lower": 50.0, "upper": 60.0}))
    assert every_file(run_dir) == before

    child, _ = started(tree, tmp_path, lambda: at_step(2, kill_self))  # one step is trained
    assert child.wait() == -signal.SIGKILL, child.words()
    assert no_jobs_left(HANG)
    before = every_file(run_dir)
    with pytest.raises(npd.UserError, match="is trained on since step 1"):
        npd.run.reselect(make(selection=BAND))
    assert every_file(run_dir) == before


@pytest.mark.parametrize("nth", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4)), 5])
def test_reselect_killed_at_any_publication(make, states, tmp_path, nth):
    """Half of a new selection never mixes with the old one: whichever configuration goes on, all verdicts are its own."""
    tree, other = make(), make(selection=BAND)
    npd.refresh(tree)
    count = [0]

    def put(real: Any, aside: Path, path: Path) -> None:
        count[0] += 1
        if count[0] == nth:
            kill_self()
        real(aside, path)

    def action() -> None:
        patch(npd.store.files, "put", put)
        npd.run.reselect(other)

    assert Child(action, tmp_path).wait() == -signal.SIGKILL
    kept = yaml.safe_load((Path(tree["run_dir"]) / "config.yaml").read_text())["selection"]["rule"]
    again = make("again", selection=BAND)
    shutil.copytree(tree["run_dir"], again["run_dir"])
    distilled(tree if kept == "none" else other, tmp_path)
    assert_same(state_of(tree["run_dir"]), states() if kept == "none" else states(selection=BAND))
    npd.run.reselect(again)
    distilled(again, tmp_path)
    assert_same(state_of(again["run_dir"]), states(selection=BAND))


# -- 8: what is pruned is never needed


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0.5, 2.0])
def test_every_kept_checkpoint_leads_to_the_same_end(make, states, tmp_path, lead):
    more = {"schedule": {"generations": 5, "lead": lead}, "checkpoint": {"every_steps": 2, "keep": 2}}
    wanted = states(**more)
    assert "generations/g001/manifest.json" in wanted
    assert not any(name.startswith("generations/g001/part") for name in wanted), "nothing was pruned"
    steps = max(line["step"] for line in wanted["metrics"])
    tree = make("killed", **more)
    resumed = pruned = 0
    for step in (steps // 3, steps * 2 // 3, steps - 2):
        child, said = started(tree, tmp_path, partial(at_step, step, kill_self))
        assert child.wait() == -signal.SIGKILL, child.words() + said()
        assert no_jobs_left(HANG)
        killed = Store(tree["run_dir"])
        pruned += 1 not in killed.policies() and 2 in killed.policies()
        for fewer in range(len(killed.checkpoints())):
            copy = make(f"from-{step}-{fewer}", **more)
            shutil.copytree(killed.path, copy["run_dir"])
            for newest in killed.checkpoints()[len(killed.checkpoints()) - fewer :]:
                shutil.rmtree(Store(copy["run_dir"]).checkpoint(newest))
            distilled(copy, tmp_path)
            assert_same(state_of(copy["run_dir"]), wanted, f"killed before step {step}, resumed from {fewer} before the last")
            resumed += 1
    assert resumed >= 5
    assert pruned, "no snapshot was pruned before a kill"


# -- real processes


@pytest.fixture
def real_jobs(monkeypatch) -> None:
    monkeypatch.setattr(npd.generations.workers, "subprocess", subprocess)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("with one core training and generation take turns")


def real(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "npd.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def processes(run_dir: Path, role: str) -> set[int]:
    return {event.process for event in read_events(run_dir / "events.jsonl") if event.role == role}


def test_a_real_job(make, states, tmp_path, real_jobs):
    """The process that `npd distill` starts: ends with 0 when all is made, and the run is that of forked jobs."""
    tree = make()
    codes = tmp_path / "codes"

    def hook() -> None:
        def close(real: Any, workers: Workers) -> None:
            codes.write_text(" ".join(str(worker.process.wait(timeout=HANG)) for worker in workers.workers))
            real(workers)

        patch(Workers, "close", close)

    said = distilled(tree, tmp_path, hook)
    assert codes.read_text() == "0", (Path(tree["run_dir"]) / "logs/refresh-0.log").read_text()
    assert "started again" not in said
    assert_same(state_of(tree["run_dir"]), states())
    (job,) = processes(Path(tree["run_dir"]), "refresh-0")
    assert not alive(job)


@pytest.mark.slow
def test_a_real_kill_of_the_trainer(make, states, tmp_path, real_jobs):
    tree = make()
    run_dir = Path(tree["run_dir"])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    part = run_dir / "generations/g000/part-00000.parquet"
    trainer, _ = killed_from_outside("distill", str(config), once=part, before_step=1)
    (job,) = processes(run_dir, "refresh-0")
    assert job != trainer
    until(lambda: not alive(job), "end of the job that lost its trainer")
    assert not (run_dir / "student").exists()
    distilled(tree, tmp_path)
    assert_same(state_of(run_dir), states())
    assert not any(map(alive, processes(run_dir, "refresh-0")))


@pytest.mark.slow
def test_a_real_follower(make, states, tmp_path):
    """placement.rollout external: the trainer starts no process, and waits for what `npd refresh --follow` makes."""
    tree = make(placement={"rollout": "external"})
    run_dir = Path(tree["run_dir"])
    child, said = started(tree, tmp_path)
    until(lambda: (run_dir / "prompts.arrow").exists() or child.poll() is not None, "prompts")
    follower = real("refresh", "--follow", str(run_dir))
    try:
        assert child.wait() == 0, child.words() + said()
        output = follower.communicate(timeout=HANG)[0].decode()
    finally:
        follower.kill()
    assert follower.returncode == 0, output
    assert f"All that {run_dir} asks for is made." in output
    assert jobs_started() == []
    assert processes(run_dir, "refresh-0") == {follower.pid}
    assert_same(state_of(run_dir), states())
