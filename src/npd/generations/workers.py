"""Generations made beside the trainer by processes of this machine, and their supervisor.

A worker is told nothing but where the run is; its queue is the directory. It ends by itself when there is nothing left to
make, and at once when the trainer is gone, because a pipe between them then closes. Through another pipe it says what went
wrong, so that a full disk does not keep that from anybody.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from npd.errors import NpdError, RunError
from npd.generations.producer import Beside, Workshop
from npd.observe.display import Display
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.records import WorkerEnd
from npd.registry import ENGINES
from npd.store import REFERENCE, explained_disk, opened

POLL = 0.1  # seconds between looks at the directory
LAST_WORDS = 40  # lines shown of a worker that died
# What tells a trainer its place among others, and would mislead a process that is none of them.
OF_TRAINERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass
class Worker:
    """A process that follows the run."""

    process: subprocess.Popen[bytes]
    said: int
    """The end of a pipe through which it says how it failed."""
    log: Path
    start: int
    """Where in the log this process begins."""

    def last_words(self) -> str:
        """The last lines of its log, for a person."""
        with self.log.open("rb") as file:
            file.seek(max(self.start, self.log.stat().st_size - (1 << 16)))
            return "\n".join(file.read().decode("utf-8", "replace").strip().splitlines()[-LAST_WORDS:])

    def failure(self, role: str) -> NpdError | None:
        """What it says it failed with, once it has ended; None if it said nothing."""
        said, self.said = self.said, -1
        if said < 0:
            return None
        try:
            end = WorkerEnd.hear(said)
        finally:
            os.close(said)
        return None if end is None else end.error(role)

    def end(self) -> None:
        """Close the pipes, which ends it, and wait for that; kill it if it takes long."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.said >= 0:
            os.close(self.said)


# SIGINT ends a worker as SIGTERM does: in the middle of an import it would be a traceback. It waits until that is said.
BEGIN = (
    "import signal as s; s.signal(s.SIGINT, s.SIG_DFL); s.pthread_sigmask(s.SIG_UNBLOCK, [s.SIGINT]); "
    "from npd.generations.workers import main; main()"
)


class Workers(Beside):
    """One process for each engine; a worker that dies is started again, a few times."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop)
        self.workers: list[Worker] = []
        self._deaths: Counter[int] = Counter()
        self._made: dict[int, set[tuple[int, int]]] = {}

    @classmethod
    def suits(cls, placed: Placement) -> bool:
        return bool(placed.workers)

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        return len(self.shop.placement.workers) == 1

    def open(self) -> None:
        """Start them: they load their models while the trainer loads its own."""
        super().open()
        for rank in range(len(self.shop.placement.workers)):
            self.workers.append(self._start(rank))

    def want(self, generation: int, part: int) -> None:
        """Start the worker that makes this part again if it had nothing left to make: the part was there before."""
        rank = part % len(self.workers)
        if self.workers[rank].process.poll() == 0:
            self.workers[rank].end()
            self.workers[rank] = self._start(rank)

    def check(self) -> None:
        """See that every worker lives; start one that died again.

        Raises:
            UserError, RunError: a worker failed for a reason that it can name, or died too often.
        """
        super().check()
        shop = self.shop
        for rank, worker in enumerate(self.workers):
            code = worker.process.poll()
            if code is None or code == 0:
                continue
            failure = worker.failure(f"refresh-{rank}")
            if failure is not None:  # it would fail again
                raise self._failed(rank, failure)
            words = worker.last_words()
            how = f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "") if code < 0 else "failed"
            made = self._parts_made(rank)
            self._deaths[rank] = 1 if made - self._made.get(rank, set()) else self._deaths[rank] + 1
            self._made[rank] = made
            most = shop.config.checkpoint.restarts
            story = f"The refresh {how} (process {worker.process.pid}, log {worker.log})" + (f":\n{words}" if words else ".")
            if self._deaths[rank] > most:
                story += f"\nIt died {self._deaths[rank]} times without finishing a part (checkpoint.restarts {most})."
                again = "What was finished is kept: mend what the log names and run the same command again."
                raise self._failed(rank, RunError(story, again))
            shop.display.say(f"{story}\nIt is started again from the first missing part ({self._deaths[rank]} of {most}).")
            worker.end()
            with shop.events.span(SpanName.RESTART, rank=rank, code=code):
                self.workers[rank] = self._start(rank)

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.stdin is not None:
                with suppress(OSError):
                    worker.process.stdin.close()  # all are told before any is waited for
        for worker in self.workers:
            worker.end()
        self.workers = []
        self.shop.store.sweep()  # what they, or those of a trainer that was killed, were writing

    def _start(self, rank: int) -> Worker:
        shop = self.shop
        where, world = shop.placement.workers[rank], len(shop.placement.workers)
        visible = where.gpus if ENGINES[shop.config.rollout.engine].takes_first_gpus else []
        names = {device: f"cuda:{i}" for i, device in enumerate(visible)}
        rollout, teacher = (names.get(device, device) for device in (where.rollout, where.teacher))
        placed = replace(shop.placement, rollout=rollout, teacher=teacher, workers=[])
        log = shop.store.path / "logs" / f"refresh-{rank}.log"
        log.parent.mkdir(exist_ok=True)
        threads = max(placed.rollout_threads or 1, placed.teacher_threads or 1, placed.first_threads or 1)
        said, says = os.pipe()
        arguments = shop.store.path, json.dumps(asdict(placed)), rank, world, time.time(), says
        inherited = {k: v for k, v in os.environ.items() if k not in OF_TRAINERS and not k.startswith("ACCELERATE_")}
        with explained_disk(log), opened(log, "ab") as file, _without_interrupts():
            process = subprocess.Popen(
                [sys.executable, "-c", BEGIN, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=inherited | {"OMP_NUM_THREADS": str(threads)} | visible_gpus(visible),
                pass_fds=(says,),
                start_new_session=True,  # Ctrl-C is for the trainer, which ends its workers
            )
            os.close(says)
            return Worker(process, said, log, file.tell())

    def _failed(self, rank: int, error: NpdError) -> NpdError:
        """Put on record that it was this worker that failed, not the trainer which says so."""
        role, error.role = f"refresh-{rank}", None
        Events(self.shop.events.path, role).failed(error, process=self.workers[rank].process.pid)
        error.role = role
        return error

    def _parts_made(self, rank: int) -> set[tuple[int, int]]:
        """The parts that are there of those that this worker has made lately."""
        store, world = self.shop.store, len(self.workers)
        current = store.current
        generations = (REFERENCE, current - 1, current, current + 1)
        return {(g, part) for g in {*generations} for part in store.parts(g) if part % world == rank}


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """SIGINT waits meanwhile, and in processes that are begun here until they say otherwise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def visible_gpus(devices: list[str]) -> dict[str, str]:
    """The environment of a process that sees these devices of this process's, in this order; {} for none."""
    if not devices:
        return {}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = mine.split(",") if mine else [str(i) for i in range(1 + max(int(d.removeprefix("cuda:")) for d in devices))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[int(device.removeprefix("cuda:"))] for device in devices)}


def _end_with_the_trainer(pipe: int) -> None:
    """End this process as soon as the other end of the pipe closes."""
    while os.read(pipe, 1):  # not sys.stdin.read: the interpreter can't shut down while a thread holds its lock
        pass
    os._exit(1)


def main() -> None:
    """The process of a worker: RUN_DIR PLACEMENT RANK WORLD BEGAN PIPE."""
    from rich.console import Console

    from npd.generations.follower import follow

    run_dir, placed, rank, world, began, says = sys.argv[1:]
    threading.Thread(target=_end_with_the_trainer, args=(sys.stdin.fileno(),), daemon=True).start()
    progress = Path(run_dir) / "logs" / f"refresh-{rank}.progress.json"
    display = Display(Console(file=sys.stdout, width=120), progress=progress)
    tree = json.loads(placed)
    status = 0
    try:
        follow(Path(run_dir), Placement(**tree), int(rank), int(world), display, POLL, began=float(began))
    except NpdError as error:
        with suppress(OSError):
            WorkerEnd.of(error).tell(int(says))
        with suppress(OSError):  # the log may lie on the disk that is full
            print(f"npd: {error}", file=sys.stderr, flush=True)
        status = error.exit_status
    with suppress(OSError):
        sys.stdout.flush()
    if status:
        os._exit(status)
