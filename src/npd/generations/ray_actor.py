"""A process on a node of a Ray cluster that makes parts, one at a time.

It has a run directory of its own, filled with what the trainer's process sends: configuration, prompts and snapshots. What
it makes there goes back as a table. Snapshots lie on a node once, whatever the number of its actors.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from rich.console import Console

from npd.config import load_config
from npd.errors import NpdError
from npd.generations.follower import workshop_of
from npd.generations.ray_cluster import imported
from npd.generations.ray_parcels import Option, Parcel, Sizes, files_of, sizes_of, sweep, unpack
from npd.generations.workers import OF_TRAINERS
from npd.observe.display import Display
from npd.records import WorkerEnd
from npd.store import Store, recorded
from npd.store.provenance import versions

FOLDER = "npd-ray-"


@dataclass(frozen=True)
class Hello:
    """What an actor says of itself when it has begun."""

    node: str
    """Ray's id of its node."""
    host: str
    process: int
    gpus: list[str]
    """As CUDA_VISIBLE_DEVICES names them."""
    versions: dict[str, str]
    lacks: list[Option]
    """Options that name files which do not lie on this node."""


@dataclass(frozen=True)
class Threads:
    """CPU threads of an actor."""

    rollout: int
    teacher: int
    first: int


@dataclass
class Outcome:
    """What came of a task."""

    table: pa.Table | None = None
    failed: WorkerEnd | None = None
    """Why it can't be done, where npd can say so: it would fail again."""
    events: str = ""
    """Lines for events.jsonl."""
    said: str = ""
    """What it would have shown to a person."""


@dataclass
class Task:
    """A part that is wanted."""

    generation: int
    part: int
    version: int
    """The snapshot that writes it."""
    snapshots: dict[int, Parcel] = field(default_factory=dict)
    """All that it takes."""
    kept: list[int] = field(default_factory=list)
    """Snapshots that may still be wanted."""
    earlier: tuple[int, int, pa.Table] | None = None
    """A part with what the teachers said before, for those that have not been asked here yet: generation, part, table."""


class Refresher:
    """The class of the actors. `ray` calls it in threads, so that its progress can be asked for meanwhile.

    Args:
        token: of the trainer's process, that its actors on a node share a folder.
        environment: variables that servers' keys are read from.
        gpus: how many it has.
    """

    def __init__(self, number: int, token: str, environment: dict[str, str], gpus: float) -> None:
        self.number = number
        for name in [n for n in os.environ if n in OF_TRAINERS or n.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ.update(environment)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        base = Path(tempfile.gettempdir())
        mine = f"{FOLDER}{os.getuid()}-"
        sweep(folder for folder in base.glob(f"{mine}*") if folder.name != f"{mine}{token}")
        self.shared = base / f"{mine}{token}"
        self.shared.mkdir(mode=0o700, exist_ok=True)
        self._lock: IO[str] = (self.shared / ".lock").open("a")
        _hold(self._lock)
        self.store = Store(self.shared / f"refresh-{number}-{os.getpid()}")
        self.working = self.store.path / "progress.json"
        self.said = io.StringIO()
        self.ray: Any = imported()

    def __repr__(self) -> str:
        return f"refresh-{self.number}"

    def hello(self, wanted: dict[Option, tuple[Path, Sizes]]) -> Hello:
        """Say who it is; `wanted` are paths by the options that name them, and the sizes of their files."""
        lacks = [option for option, (path, sizes) in wanted.items() if _sizes_here(path, sizes) != sizes]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = [name for name in visible.split(",") if name]
        node = self.ray.get_runtime_context().get_node_id()
        return Hello(node, socket.gethostname(), os.getpid(), gpus, versions(), lacks)

    def furnish(
        self, run: Parcel, lacked: dict[Option, Parcel], paths: dict[Option, Path], plugins: list[str], threads: Threads
    ) -> Outcome:
        """Get ready to make parts of a run.

        Args:
            run: config.yaml and prompts.arrow, and plug-ins that are files.
            lacked: what this node lacks, by the options that name it.
            paths: where else what options name lies.
            plugins: modules, or paths in the run's parcel.
        """
        with self._telling() as outcome:
            folder = unpack(run, self.shared, self.ray.get)
            here = paths | {option: unpack(parcel, self.shared, self.ray.get) for option, parcel in lacked.items()}
            self.store.path.mkdir(exist_ok=True)
            shutil.copy(folder / "config.yaml", self.store.path)
            _link(folder / "prompts.arrow", self.store.path / "prompts.arrow")
            tree = recorded(folder).tree
            for (*sections, name), path in here.items():
                section = tree
                for key in sections:
                    section = section[key]
                section[name] = str(path)
            found = [str(folder / name) if name.endswith(".py") else name for name in plugins]
            config = load_config(tree, {"run_dir": str(self.store.path), "plugins": found})
            display = Display(Console(file=self.said, width=120), progress=self.working)
            self.shop = workshop_of(self.store.as_begun(config), None, self.number, 1, display)
            self.shop.pipeline.placement = replace(
                self.shop.placement,
                rollout_threads=threads.rollout,
                teacher_threads=threads.teacher,
                first_threads=threads.first,
            )
        return outcome

    def make(self, task: Task) -> Outcome:
        """Make a part."""
        threading.current_thread().name = "MainThread"  # spans of what is done beside have another one's name
        with self._telling() as outcome:
            store = self.shop.store
            for version, parcel in task.snapshots.items():
                store.policy(version).parent.mkdir(exist_ok=True)
                _link(unpack(parcel, self.shared, self.ray.get), store.policy(version))
            store.current = max(0, task.generation)
            if task.earlier is not None:
                store.write_part(*task.earlier)
            try:
                self.shop.make_parts(task.generation, [task.part], task.version)
                outcome.table = store.read_part(task.generation, task.part)
            finally:
                for generation in {task.generation, *([task.earlier[0]] if task.earlier else [])}:
                    shutil.rmtree(store.generation(generation), ignore_errors=True)
            self._forget(task.kept)
        return outcome

    def progress(self) -> str | None:
        """What it does now, as a `Progress` record; None between tasks."""
        try:
            return self.working.read_text(encoding="utf-8")
        except OSError:
            return None

    def leave(self) -> None:
        """Delete what lies on this node: the run ends."""
        shutil.rmtree(self.shared, ignore_errors=True)

    def _forget(self, kept: list[int]) -> None:
        """Delete snapshots that nobody will ask for again."""
        for version in self.shop.store.policies():
            if version not in kept:
                link = self.shop.store.policy(version)
                link.unlink(missing_ok=True)
                shutil.rmtree(self.shared / link.name, ignore_errors=True)

    @contextmanager
    def _telling(self) -> Iterator[Outcome]:
        """Around a task: what came of it, with npd's own errors as facts."""
        outcome = Outcome()
        try:
            yield outcome
        except NpdError as error:
            outcome.failed, outcome.table = WorkerEnd.of(error), None
        outcome.events, outcome.said = self._told()

    def _told(self) -> tuple[str, str]:
        """Lines for events.jsonl, and what was said, since it was last asked."""
        said = self.said.getvalue()
        self.said.seek(0)
        self.said.truncate()
        events = self.store.path / "events.jsonl"
        lines = ""
        with suppress(OSError):
            lines = events.read_text(encoding="utf-8")
            events.unlink()
        return lines, said


def _link(target: Path, link: Path) -> None:
    with suppress(FileExistsError):
        link.symlink_to(target)


def _hold(file: IO[str]) -> None:
    """Hold a lock with others, for as long as this process lives."""
    import fcntl  # not on Windows

    fcntl.flock(file, fcntl.LOCK_SH)


def _sizes_here(path: Path, wanted: Sizes) -> Sizes | None:
    """Sizes of the files of that name that lie on this node; None where one can't be looked at."""
    try:
        here = sizes_of(files_of(path))
    except OSError:
        return None
    return {name: size for name, size in here.items() if name in wanted}
