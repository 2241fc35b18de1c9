"""A run directory copied to its mirror: what is new there, in order, and what is no longer needed."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.config import Config
from npd.errors import NpdError, UserError
from npd.mirror.arriving import AT_ONCE, reached
from npd.mirror.claim import claim_there, said, take
from npd.mirror.contents import (
    CHECKPOINTS,
    CONFIG,
    FINISHED,
    FIRST,
    LINES,
    MANIFEST,
    MANIFESTS,
    PARTS,
    PROMPTS,
    SHOWN,
    STUDENT,
    Item,
    items,
    numbers,
    old_checkpoints,
    old_snapshots,
    parts_of,
)
from npd.mirror.place import SMALL, Gone, Place
from npd.observe.events import Events, SpanName
from npd.store import Store
from npd.store.names import CHECKPOINT, GENERATION, SNAPSHOT
from npd.store.sealed import SEAL

CHANGES = 10  # of a run directory under a copy, before that one is left to the next


class Stopped(Exception):
    """The run ends; what is being copied need not go on."""


class Lost(UserError):
    """Somebody else mirrors this run now."""


@dataclass
class Tally:
    """What was copied."""

    files: int = 0
    bytes: int = 0
    deleted: int = 0
    seconds: float = 0.0
    lag: float = 0.0
    """Seconds that a file had been there when its copy was: the longest."""

    def add(self, other: Tally) -> None:
        self.files += other.files
        self.bytes += other.bytes
        self.deleted += other.deleted
        self.seconds += other.seconds
        self.lag = max(self.lag, other.lag)


class Copies:
    """Copies of a run directory, which this process has locked, in checkpoint.mirror; `claim` comes first.

    Raises:
        UserError: the mirror can't be reached.
    """

    def __init__(self, config: Config, events: Events) -> None:
        assert config.checkpoint.mirror is not None, "only a mirror that is named is kept"
        self.place = Place(config.checkpoint.mirror)
        self.store, self.keep, self.events = Store(config.run_dir), config.checkpoint.keep, events
        self.over = threading.Event()
        """Once it is set, what is under way ends after the files that are being copied."""
        self.total = Tally()
        self._now = Tally()  # of the copy that is being made
        self._counting = threading.Lock()
        self._began = time.time()
        self._done: dict[str, tuple[int, int]] = {}  # what was copied, by key, as it was then
        self._there: dict[str, int] = {}  # names and bytes in the mirror
        self._generations: dict[int, int] = {}  # where checkpoints in the mirror stand, by step
        self.place.wait = self._wait

    def claim(self) -> None:
        """Take the mirror for this process, and see what is there already.

        Raises:
            UserError: it is another run's, or can't be read or written.
        """
        self.place.check_apart(self.store.path)
        with reached(self.place):
            self.place.sweep()
            self._claim, self._there = take(self.place, self.store.path)
            self._recall()

    def _wait(self, seconds: float) -> None:
        if self.over.wait(seconds):
            raise Stopped

    def copy(self, *, everything: bool) -> bool:
        """Copy what is new, and delete what is no longer needed there, in the order that `contents` explains.

        Args:
            everything: also what grows with every step, which else waits for the next checkpoint.

        Returns:
            False: the run directory changed under it, and not all that was there was copied.

        Raises:
            Lost: the mirror is no longer this process's.
            RunError: the store fails.
            Stopped: `over` was set meanwhile.
        """
        self._now, began, start = Tally(), time.perf_counter(), time.time()
        try:
            for _ in range(CHANGES):
                with suppress(Gone):
                    if self._copy_once(everything):
                        return True
            return False
        finally:
            self._now.seconds = time.perf_counter() - began
            self.total.add(self._now)
            if self._now.files or self._now.deleted:
                facts = {"files": self._now.files, "bytes": self._now.bytes, "deleted": self._now.deleted}
                self._record(start, facts)

    def _record(self, start: float, facts: dict[str, int]) -> None:
        try:
            self.events.write(SpanName.MIRROR, start, time.time(), lag=round(self._now.lag, 3), **facts)
        except (OSError, NpdError):  # a full disk, of which there will be a better message
            return

    def _copy_once(self, everything: bool) -> bool:
        """False: the run directory changed under it."""
        steps = self.store.checkpoints()
        wanted = items(self.store.path)
        if self.store.checkpoints() != steps:  # something that one of them needs may have been tidied away since
            return False
        new = self._new(wanted)
        if not everything and not any(item.rank in (CHECKPOINTS, STUDENT) for item in new):
            new = [item for item in new if item.rank not in (LINES, SHOWN)]  # they grow with every step
        if new:
            self._check_mine()
        removed = {item for item in new if item.rank == MANIFESTS and self._says_removed(item.name)}
        for _, group in itertools.groupby(sorted({*new} - removed, key=self._rank), lambda item: self._rank(item)[:2]):
            together = list(group)
            self._put([item.name for item in together if not item.sealed])
            for item in together:
                self._copy_directory(item)
                self._copied(item)
        self._delete_old(wanted, removed)
        return True

    def _new(self, wanted: list[Item]) -> list[Item]:
        return [item for item in wanted if self._done.get(item.key) != item.mark]

    def _rank(self, item: Item) -> tuple[int, bool, str]:
        first = item.name == CONFIG and CONFIG not in self._there  # so that what follows belongs to a run
        return FIRST if first else item.rank, item.name in (CONFIG, "student"), item.key

    def _check_mine(self) -> None:
        there = claim_there(self.place)
        if there is None or there.turn != self._claim.turn:
            who = "nobody" if there is None else said(there)
            raise Lost(
                f"The mirror {self.place.shown} is no longer this process's: it was taken over by {who}.",
                "Stop one of the two, or give this run a mirror of its own.",
            )

    def _copy_directory(self, item: Item) -> None:
        if not item.sealed:
            return
        folder = self.store.path / item.name
        inside = sorted(file.relative_to(self.store.path).as_posix() for file in folder.rglob("*") if file.is_file())
        if item.key in self._there:  # another one of that name: it is none until all of this one is there
            self._delete(item.key)
        self._put([name for name in inside if name != item.key])
        self._put([item.key])
        self._generations.pop(CHECKPOINT.number(folder.name) or -1, None)

    def _copied(self, item: Item) -> None:
        self._done[item.key] = item.mark
        if item.mark[1] / 1e9 >= self._began and item.rank < SHOWN:
            self._now.lag = max(self._now.lag, time.time() - item.mark[1] / 1e9)

    def _put(self, names: list[str]) -> None:
        """Copy files, some at a time and in no order."""

        def put(name: str) -> None:
            if self.over.is_set():
                raise Stopped
            size = self.place.put(name, self.store.path / name)
            with self._counting:
                self._there[name] = size
                self._now.files, self._now.bytes = self._now.files + 1, self._now.bytes + size

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(put, names))

    def _delete(self, name: str) -> None:
        if self.over.is_set():
            raise Stopped
        self.place.delete(name)
        self._there.pop(name, None)
        self._now.deleted += 1

    # -- what is no longer needed

    def _delete_old(self, wanted: list[Item], removed: set[Item]) -> None:
        """Tidy the mirror as the run directory was tidied, as far as what is in the mirror itself allows."""
        here = {item.name for item in wanted}
        for step in old_checkpoints(self._there, self.keep):
            if (name := f"checkpoints/{CHECKPOINT.name(step)}") not in here:
                self._delete_directory(name)
        generation = self._oldest_read()
        for version in old_snapshots(self._there, generation, self.keep):
            if (name := f"policy/{SNAPSHOT.name(version)}") not in here:
                self._delete_directory(name)
        for item in sorted(removed, key=lambda item: item.key):
            self._put([item.name])
            self._copied(item)
        for name, g in [*parts_of(self._there)]:
            manifest = f"{name.rpartition('/')[0]}/{MANIFEST}"
            if g is not None and g <= generation - self.keep and name not in here and self._says_removed(manifest):
                self._delete(name)

    def _delete_directory(self, name: str) -> None:
        """Its seal first: half of a directory is never taken for a whole one."""
        inside = [file for file in self._there if file.startswith(f"{name}/")]
        if (key := f"{name}/{SEAL}") in inside:
            self._delete(key)
        if self.over.is_set():
            raise Stopped
        self.place.delete_folder(name)
        for file in inside:
            self._there.pop(file, None)
        self._now.deleted += len(inside) - (key in inside)
        self._done.pop(key, None)

    def _oldest_read(self) -> int:
        """The oldest generation that a run which goes on from the mirror may still read."""
        if FINISHED in self._there:
            return self.store.current
        steps = numbers(self._there, "checkpoints", CHECKPOINT)
        if not steps:
            return 0
        if steps[0] not in self._generations:
            facts = self._facts_there(f"checkpoints/{CHECKPOINT.name(steps[0])}/{SEAL}")
            generation = facts.get("generation") if isinstance(facts, dict) else None
            self._generations[steps[0]] = generation if type(generation) is int else 0
        return self._generations[steps[0]]

    def _facts_there(self, name: str) -> Any:
        try:
            return json.loads(self.place.read(name) or b"null")
        except (ValueError, RecursionError):
            return None

    def _says_removed(self, manifest: str) -> bool:
        """Does a manifest of the run directory say that its parts were removed?"""
        generation = GENERATION.number(manifest.split("/")[1])
        try:
            found = None if generation is None else self.store.manifest(generation)
        except UserError:  # damaged; whoever needs it says so
            return False
        return found is not None and found.removed

    # -- what is there already

    def _recall(self) -> None:
        """Find out what an earlier process of this run has copied: directories with the same seal, and the parts of
        generations with the same manifest."""
        wanted = items(self.store.path)
        asked = [item for item in wanted if item.sealed or item.rank == MANIFESTS]
        same = {item.key for item, equal in zip(asked, self._compare([item.key for item in asked]), strict=True) if equal}
        for item in wanted:
            equal = item.key in same
            if item.rank == PARTS:
                whole = f"{item.name.rpartition('/')[0]}/{MANIFEST}" in same
                equal = whole and self._there.get(item.name) == item.mark[0]
            if item.name == PROMPTS:  # which never change, and may be large
                equal = self._there.get(item.name) == item.mark[0] > SMALL
            if equal:
                self._done[item.key] = item.mark

    def _compare(self, names: list[str]) -> list[bool]:
        """Are files in the mirror what those of the run directory are?"""

        def equal(name: str) -> bool:
            try:
                here = (self.store.path / name).read_bytes()
            except OSError:
                return False
            return self._there.get(name) == len(here) and self.place.read(name) == here

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(equal, names))

    def left(self) -> str:
        """What is not in the mirror, in words; nothing where all of it is."""
        new = self._new(items(self.store.path))
        size = sum(item.mark[0] if not item.sealed else _bytes_of(self.store.path / item.name) for item in new)
        kinds = [
            folder
            for folder in ("student", "checkpoints", "policy", "generations")
            if any(item.name.startswith(folder) for item in new)
        ]
        of = f", of {', '.join(kinds)}" if kinds else ""
        return f"{len(new):,} of its files and directories ({size / 1e6:,.1f} MB{of})" if new else ""


def _bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total
