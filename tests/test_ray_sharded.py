"""Four processes that train a sharded student and a Ray cluster of two nodes that writes for them, in one run: killed, and
gone on with until it has ended.

It takes minutes: `make cluster` runs it, `make test` does not.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HANG
from test_ray import Nodes, left, needs_ray
from test_workers import ONE_THREAD, assert_same, state_of, three_parts

import npd
from npd.generations.ray_cluster import imported
from npd.observe.events import SpanName, read_events
from npd.store import Store
from npd.train.sharding import SHARDS

pytestmark = [pytest.mark.cluster, needs_ray]
WORLD = 4
# The last process kills itself in the step that is its first argument, if any.
PROCESS = """import os, signal, sys, npd.cli, npd.train.trainer
die_at, real = int(sys.argv.pop(1)), npd.train.trainer.Trainer.step
def step(self, *args):
    if args[3] == die_at and self.accelerator.process_index == self.accelerator.num_processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
npd.train.trainer.Trainer.step = step
npd.cli.entry()
"""


class Launched:
    """`npd distill` in four processes, as a launcher starts them."""

    def __init__(self, file: Path, die_at: int = 0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.logs = [file.parent / f"{rank}.log" for rank in range(WORLD)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-c", PROCESS, str(die_at), "distill", str(file)],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something that comes while all of them run."""
        deadline = time.monotonic() + HANG
        while not what():
            assert all(process.poll() is None for process in self.processes), self.said
            assert time.monotonic() < deadline, f"they hang: {self.said}"
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self) -> list[int]:
        return [process.wait(HANG) for process in self.processes]

    @property
    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in self.logs)


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Nodes]:
    """A head and another one, each with one actor's resources."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(npd.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    imported()
    found = Nodes()
    try:
        found.add()
        yield found
    finally:
        found.cluster.shutdown()


def test_processes_that_share_a_student_and_nodes_that_write_for_it(tmp_path, nodes: Nodes, student_dir, teacher_dir) -> None:
    """All four are killed while parts are made, then one in a step, which ends the others; at last a node is, and another
    joins. The run is that of the same processes in turns, undisturbed."""
    tree = three_parts(tmp_path / "data.jsonl", student_dir, teacher_dir, lead=0.0)
    tree["training"] |= {"batch_tokens": 96, "shard": "full"}
    tree["checkpoint"]["every_steps"] = 1

    def configured(name: str, **placement: Any) -> tuple[Path, Path]:
        file, run_dir = tmp_path / f"{name}.yaml", tmp_path / name
        file.write_text(yaml.safe_dump(tree | {"run_dir": str(run_dir), "placement": ONE_THREAD | placement}))
        return file, run_dir

    file, turns = configured("turns")
    undisturbed = Launched(file)
    assert undisturbed.wait() == [0] * WORLD, undisturbed.said
    steps = Store(turns).checkpoints()
    assert (Store(turns).checkpoint(steps[-1]) / SHARDS).is_dir()

    file, run_dir = configured("ray", rollout="ray", ray=nodes.options)
    store = Store(run_dir)
    first = Launched(file)
    first.until((run_dir / "generations/g000/part-00000.parquet").exists)
    first.kill()
    assert first.wait() == [-signal.SIGKILL] * WORLD
    assert not store.checkpoints()

    die_at = steps[-1] // 2
    second = Launched(file, die_at)
    assert second.processes[-1].wait(HANG) == -signal.SIGKILL, second.said
    codes = second.wait()  # nobody waits for the dead for ever
    assert all(codes), codes
    assert store.checkpoints()[-1] == die_at - 1
    assert not store.finished

    third = Launched(file)
    third.until((run_dir / "generations/g002/part-00000.parquet").exists)
    nodes.kill()
    assert not store.finished
    nodes.add()
    assert third.wait() == [0] * WORLD, third.said

    assert store.finished
    assert_same(state_of(run_dir), state_of(turns))
    made = [
        (e.facts["generation"], e.facts["part"]) for e in read_events(run_dir / "events.jsonl") if e.name == SpanName.STORE
    ]
    assert set(made) == {(g, part) for g in range(3) for part in range(3)}
    assert left() == {}
