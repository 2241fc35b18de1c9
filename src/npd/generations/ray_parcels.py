"""Files that go from the trainer's machine to the nodes of a Ray cluster, through Ray's object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.config import Config
from npd.store.files import remove

CHUNK = 16 << 20  # bytes of an object: several fit into the smallest object store that Ray allows
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Parcel:
    """A directory, or a file, in pieces."""

    name: str
    files: dict[str, list[Any]]
    """By their paths below it (of a file alone: ""), references to their bytes in the object store."""


def pack(name: str, files: dict[str, Path], put: Callable[[bytes], Any]) -> Parcel:
    """Put files into the object store, of which `put` gives references; one piece lies in memory at a time.

    Raises:
        FileNotFoundError: one is gone.
    """
    packed: dict[str, list[Any]] = {}
    for inner, path in files.items():
        pieces = packed[inner] = []
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                pieces.append(put(piece))
    return Parcel(name, packed)


def files_of(path: Path, *, weights: bool = True) -> dict[str, Path]:
    """What lies in a directory, by paths below it; a file alone is ""."""
    if path.is_file():
        return {"": path}
    found = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if weights or not name.endswith(WEIGHTS)}


def unpack(parcel: Parcel, folder: Path, get: Callable[[Any], bytes]) -> Path:
    """Where a parcel lies in a folder, whole: whoever asks first unpacks it, and others of this node wait for that."""
    import fcntl  # not on Windows

    target = folder / parcel.name
    with (folder / f".{parcel.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        aside = folder / f".{parcel.name}.tmp"
        remove(aside)  # of one that was killed
        for inner, pieces in parcel.files.items():
            file = aside / inner if inner else aside
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as whole:
                for piece in pieces:
                    whole.write(get(piece))
        os.replace(aside, target)
    return target


Sizes = dict[str, int]


def sizes_of(files: dict[str, Path]) -> Sizes:
    return {name: file.stat().st_size for name, file in files.items()}


Option = tuple[str, ...]
"""An option by its keys, such as ("teachers", "math", "model")."""


def carried(config: Config) -> dict[Option, tuple[Path, dict[str, Path]]]:
    """Models, tokenizers and adapters that lie on this machine, by the option that names them: where, and their files.

    Of a student that every snapshot holds whole, the weights stay here.
    """
    student = config.student
    bare = student.adapts or any(teacher.is_student for teacher in config.given_teachers.values())
    named: dict[Option, str | None] = {("student", "model"): student.model, ("student", "adapter"): student.adapter}
    for key, teacher in config.given_teachers.items():
        section = ("teacher",) if key is None else ("teachers", key)
        if teacher.server is not None:
            named[*section, "tokenizer"] = teacher.tokenizer
        elif not teacher.is_student:
            named |= {(*section, "model"): teacher.model, (*section, "adapter"): teacher.adapter}
    found = {option: Path(value).absolute() for option, value in named.items() if value and Path(value).exists()}
    return {option: (path, files_of(path, weights=bare or option != ("student", "model"))) for option, path in found.items()}


def sweep(folders: Iterable[Path]) -> None:
    """Delete the folders of processes that are all gone: nobody holds their lock."""
    import fcntl  # not on Windows

    for folder in folders:
        with suppress(OSError), (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
