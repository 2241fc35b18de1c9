"""What of a run is mirrored, in which order, and what of a mirror is still needed: names alone, nothing is read or written.

The order is that in which a run makes its files: what a file names comes before it. So whatever is there at a moment, the
newest checkpoint that is whole finds its snapshots, the parts that it was trained on and its metrics.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from npd.store.names import CHECKPOINT, GENERATION, LOG, PART, REFERENCES, SNAPSHOT, Numbered
from npd.store.sealed import SEAL

CLAIM = "mirror.json"
CONFIG, PROMPTS, MANIFEST = "config.yaml", "prompts.arrow", "manifest.json"
FINISHED = f"student/{SEAL}"
GROWING = ("metrics.jsonl", "events.jsonl")
POINTERS = ("generations/CURRENT", "policy/LATEST", "checkpoints/LATEST")

# What is copied before what.
(FIRST, SNAPSHOTS, PARTS, CHANGED, MANIFESTS, LINES, CHECKPOINTS, STUDENT, SHOWN) = range(9)


@dataclass(frozen=True)
class Item:
    """What appears at once: a file, or a directory that its seal closes."""

    rank: int
    name: str
    """Of the file, or of the directory."""
    mark: tuple[int, int]
    """Bytes and time of the file, or of the seal: when they change, it is another one."""
    sealed: bool = False

    @property
    def key(self) -> str:
        """The file whose being there says that the item is."""
        return f"{self.name}/{SEAL}" if self.sealed else self.name


def _mark(path: Path) -> tuple[int, int] | None:
    """None: it is no plain file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if os.path.isfile(path) and not os.path.islink(path) else None


def items(run_dir: Path) -> list[Item]:
    """All that is whole in a run directory and to be mirrored, in the order of copying.

    Checkpoints are looked for first: what they need was there before them.
    """
    found: list[Item] = []

    def directory(rank: int, path: Path) -> None:
        if not path.is_symlink() and (mark := _mark(path / SEAL)) is not None:
            found.append(Item(rank, path.relative_to(run_dir).as_posix(), mark, sealed=True))

    def file(rank: int, path: Path) -> None:
        if (mark := _mark(path)) is not None:
            found.append(Item(rank, path.relative_to(run_dir).as_posix(), mark))

    directory(STUDENT, run_dir / "student")
    directory(STUDENT, run_dir / "adapter")
    for kind, folder, rank in ((CHECKPOINT, "checkpoints", CHECKPOINTS), (SNAPSHOT, "policy", SNAPSHOTS)):
        for _, path in kind.within(run_dir / folder):
            directory(rank, path)
    generations = run_dir / "generations"
    for path in [generations / REFERENCES, *(path for _, path in GENERATION.within(generations))]:
        file(MANIFESTS, path / MANIFEST)
        for _, part in PART.within(path):
            file(PARTS, part)
    for rank, names in ((FIRST, (PROMPTS,)), (CHANGED, (CONFIG,)), (LINES, GROWING), (SHOWN, (*POINTERS, "report.html"))):
        for name in names:
            file(rank, run_dir / name)
    for _, log in LOG.within(run_dir / "logs"):
        file(SHOWN, log)
    return sorted(found, key=lambda item: (item.rank, item.name == "student", item.key))


def numbers(names: Iterable[str], folder: str, kind: Numbered, *, whole: bool = True) -> list[int]:
    """Numbers of the directories that a mirror holds in a folder, lowest first; `whole`: those that their seal closes."""
    found = set()
    for name in names:
        at, _, rest = name.partition("/")
        directory, _, file = rest.partition("/")
        number = kind.number(directory) if at == folder and file else None
        if number is not None and (file == SEAL or not whole):
            found.add(number)
    return sorted(found)


def parts_of(names: Iterable[str]) -> Iterator[tuple[str, int | None]]:
    """(name, generation) of the parts in a mirror; None: of the references."""
    for name in names:
        at, _, rest = name.partition("/")
        folder, _, file = rest.partition("/")
        generation = GENERATION.number(folder)
        if at == "generations" and PART.number(file) is not None and (generation is not None or folder == REFERENCES):
            yield name, generation


def old_checkpoints(names: Iterable[str], keep: int) -> list[int]:
    """Checkpoints of a mirror that it need not keep: all but the newest `keep`, and what is half of an older one."""
    names = list(names)
    kept = numbers(names, "checkpoints", CHECKPOINT)[-keep:]
    some = numbers(names, "checkpoints", CHECKPOINT, whole=False)
    return [step for step in some if kept and step < kept[-1] and step not in kept]


def old_snapshots(names: Iterable[str], generation: int, keep: int) -> list[int]:
    """Snapshots of a mirror that it need not keep where `generation` is the oldest that may still be read.

    As `npd.store.tidying` has it: the newest `keep` that are in use or older stay, and so does the first.
    """
    names = list(names)
    kept = [version for version in numbers(names, "policy", SNAPSHOT) if version <= generation][-keep:]
    some = numbers(names, "policy", SNAPSHOT, whole=False)
    return [version for version in some if version and version <= generation and version not in kept]


def needed(names: Iterable[str], step: int | None, generation: int, keep: int) -> Iterator[str]:
    """What to bring down of a mirror: files, and directories that a seal closes, in an order that ends with config.yaml.

    Of a finished run its student and what is shown of it; else all that tidying would leave to a run that stands at
    checkpoint `step` (None: there is none), in `generation`.
    """
    names = set(names)
    over = FINISHED in names
    if not over:
        old = old_snapshots(names, generation, keep)
        versions = numbers(names, "policy", SNAPSHOT)
        yield from (f"policy/{SNAPSHOT.name(v)}" for v in versions if v not in old)
        yield from (
            name for name, g in sorted(parts_of(names), key=lambda part: part[0]) if g is None or g > generation - keep
        )
        if step is not None:
            yield f"checkpoints/{CHECKPOINT.name(step)}"
    yield from (folder for folder in ("adapter", "student") if f"{folder}/{SEAL}" in names)
    manifests = [name for name in names if name.startswith("generations/") and name.endswith(f"/{MANIFEST}")]
    yield from sorted(manifests)
    logs = [name for name in names if name.startswith("logs/") and LOG.number(name.removeprefix("logs/")) is not None]
    yield from sorted(logs)
    yield from (name for name in (PROMPTS, *GROWING, POINTERS[0], "report.html", CONFIG) if name in names)
