"""Refreshes beside the trainer: processes that follow the run, and their supervisor.

A job is told nothing but where the run is; its queue is the directory. It ends by itself when there is nothing left to
make, and at once when the trainer is gone, because a pipe between them then closes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from npd.config import Config, config_tree, differing_keys, load_config
from npd.errors import NpdError, RunError, UserError
from npd.observe.display import Display
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.store import REFERENCE, Store

POLL = 0.1  # seconds between looks at the directory
LAST_WORDS = 40  # lines shown of a job that died
ELSEWHERE = re.compile(r"(student|teacher|teachers\..+)\.(model|tokenizer):")  # another machine may have its own way
USER_ERROR, RUN_ERROR = 2, 3  # exit statuses of a job that can say what went wrong; it would go wrong again


@dataclass
class Job:
    process: subprocess.Popen[bytes]
    log: Path
    start: int
    """Where in the log this process begins."""

    def last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(self.start, self.log.stat().st_size - (1 << 16)))
            return "\n".join(file.read().decode("utf-8", "replace").strip().splitlines()[-LAST_WORDS:])


class Jobs:
    """Supervises the refresh processes of a run.

    Used as a context manager: nothing is left running when it ends.
    """

    def __init__(self, store: Store, config: Config, placement: Placement, events: Events, display: Display) -> None:
        self.store, self.config, self.placement = store, config, placement
        self.events, self.display = events, display
        self.jobs: list[Job] = []
        self.deaths: Counter[int] = Counter()
        self._made: dict[int, set[tuple[int, int]]] = {}

    def __enter__(self) -> Jobs:
        for rank in range(len(self.placement.jobs)):
            self.jobs.append(self._start(rank))
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            if job.process.stdin is not None:
                with suppress(OSError):
                    job.process.stdin.close()  # which ends it
        for job in self.jobs:
            try:
                job.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        self.store.sweep()  # what they, or those of a trainer that was killed, were writing

    def _start(self, rank: int) -> Job:
        where, world = self.placement.jobs[rank], len(self.placement.jobs)
        # vLLM takes the first GPUs that it sees.
        visible = where.gpus if self.config.rollout.engine == "vllm" else []
        names = {device: f"cuda:{i}" for i, device in enumerate(visible)}
        rollout, teacher = (names.get(device, device) for device in (where.rollout, where.teacher))
        placed = replace(self.placement, rollout=rollout, teacher=teacher, jobs=[])
        log = self.store.path / "logs" / f"refresh-{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(placed.rollout_threads or 1, placed.teacher_threads or 1, placed.first_threads or 1)
        arguments = self.store.path, json.dumps(asdict(placed)), rank, world, time.time()
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "npd.jobs", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)} | visible_gpus(visible),
                start_new_session=True,  # Ctrl-C is for the trainer, which ends its jobs
            )
            return Job(process, log, file.tell())

    def check(self) -> None:
        """See that every job lives; start one that died again.

        Raises:
            UserError, RunError: a job failed for a reason that it can name, or died too often.
        """
        for rank, job in enumerate(self.jobs):
            code = job.process.poll()
            if code is None or code == 0:
                continue
            words = job.last_words()
            if code in (USER_ERROR, RUN_ERROR):
                message = words[words.rfind("npd: ") + len("npd: ") :]
                raise self._failed(rank, UserError(message) if code == USER_ERROR else RunError(message))
            how = f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "") if code < 0 else "failed"
            made = self._parts_made(rank)
            self.deaths[rank] = 1 if made - self._made.get(rank, set()) else self.deaths[rank] + 1
            self._made[rank] = made
            most = self.config.checkpoint.restarts
            story = f"The refresh {how} (process {job.process.pid}, log {job.log})" + (f":\n{words}" if words else ".")
            if self.deaths[rank] > most:
                story += f"\nIt died {self.deaths[rank]} times without finishing a part (checkpoint.restarts {most})."
                again = " What was finished is kept: mend what the log names and run the same command again."
                raise self._failed(rank, RunError(story + again))
            self.display.say(f"{story}\nIt is started again from the first missing part ({self.deaths[rank]} of {most}).")
            with self.events.span(SpanName.RESTART, rank=rank, code=code):
                self.jobs[rank] = self._start(rank)

    def _failed(self, rank: int, error: NpdError) -> NpdError:
        """Put on record that it was this job that failed, not the trainer which says so."""
        role = f"refresh-{rank}"
        Events(self.events.path, role).failed(error, process=self.jobs[rank].process.pid)
        error.role = role
        return error

    def wake(self, part: int) -> None:
        """Start the job that makes this part again if it had nothing left to make: the part was there before."""
        if self.jobs:
            rank = part % len(self.jobs)
            if self.jobs[rank].process.poll() == 0:
                self.jobs[rank] = self._start(rank)

    def _parts_made(self, rank: int) -> set[tuple[int, int]]:
        """The parts that are there of those that this job has made lately."""
        current = self.store.current
        generations = (REFERENCE, current - 1, current, current + 1)
        return {(g, part) for g in {*generations} for part in self.store.parts(g) if part % len(self.jobs) == rank}


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


def follow(
    run_dir: Path,
    placement: Placement | None,
    rank: int,
    world: int,
    display: Display,
    poll: float,
    *,
    config: Config | None = None,
    began: float | None = None,
) -> None:
    """Make the generations of a run from its directory alone, as their snapshots appear: of every `world` parts one.

    Args:
        placement: None: as the configuration says for this machine.
        config: the run's, but with this machine's placement, paths of models and evaluation; None: the run's.

    Raises:
        UserError: there is no run to follow, `config` differs in more, or something in the run is damaged.
    """
    from npd.run import follower

    file = run_dir / "config.yaml"
    if not file.exists() or not (run_dir / "prompts.arrow").exists():
        raise UserError(f"{run_dir} holds no run of `npd distill`; start one there first.")
    theirs = load_config(file, {"run_dir": str(run_dir)})
    if (theirs.provenance or {}).get("command") != "distill":
        raise UserError(f"{run_dir} holds no run of `npd distill`, and only those have generations to make.")
    config = config or theirs
    changes = [c for c in differing_keys(config_tree(theirs), config_tree(config)) if not ELSEWHERE.match(c)]
    if changes:
        raise UserError(f"A run is followed as it is, but here {'; '.join(changes)}. Leave that out.")
    refresher = follower(config, placement, rank, world, display)
    refresher.events.write(SpanName.LOAD, began or time.time(), time.time())
    try:
        refresher.follow(poll)
    except Exception as error:
        if began is None:  # nobody else would put it on record
            refresher.events.failed(error)
        raise


def main() -> None:
    """The process of a job: RUN_DIR PLACEMENT RANK WORLD BEGAN."""
    from rich.console import Console

    run_dir, placed, rank, world, began = sys.argv[1:]
    threading.Thread(target=_end_with_the_trainer, args=(sys.stdin.fileno(),), daemon=True).start()
    progress = Path(run_dir) / "logs" / f"refresh-{rank}.progress.json"
    display = Display(Console(file=sys.stdout, width=120), progress=progress)
    status = 0
    try:
        follow(Path(run_dir), Placement(**json.loads(placed)), int(rank), int(world), display, POLL, began=float(began))
    except (UserError, RunError) as error:
        print(f"npd: {error}", file=sys.stderr, flush=True)
        status = USER_ERROR if isinstance(error, UserError) else RUN_ERROR
    sys.stdout.flush()
    if status:
        os._exit(status)


if __name__ == "__main__":
    main()
