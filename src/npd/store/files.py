"""Files that appear whole: written aside, flushed, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from npd.errors import RunError

HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"
STALE_SECONDS = 24 * 3600.0  # of a file that a process on another machine was writing


@contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """A full disk as one paragraph."""
    try:
        yield
    except Exception as error:
        # Not only OSError: safetensors and Arrow wrap the system's error in types of their own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RunError(
                f"The disk is full: {path} could not be written. Nothing that was finished is lost: free some space and "
                "run the same command again, it goes on from here."
            ) from error
        raise


def beside(path: Path) -> Path:
    """Where this process writes what is to be renamed to `path`; what it leaves there is swept away."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path` (a file or a directory), renamed to it once whole and on disk.

    Raises:
        RunError: the disk is full.
    """
    aside = beside(path)
    try:
        with explained_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            put(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def put(aside: Path, path: Path) -> None:
    """Flush what was written aside to the disk, then rename it to its place."""
    for file in [aside] if aside.is_file() else sorted(f for f in aside.rglob("*") if f.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir() and aside.is_dir():  # a file never takes the place of a directory
        remove_directory(path)
    os.replace(aside, path)


def remove_directory(path: Path) -> None:
    """Rename, then delete, so that half of a directory is never taken for a whole one."""
    aside = path.with_name(f".{path.name}.old.{HOST}.{os.getpid()}.tmp")  # what replaces it lies beside it
    os.replace(path, aside)
    shutil.rmtree(aside)


def abandoned(leftover: Path) -> bool:
    """Was this temporary file left by a process that is gone?"""
    *_, host, pid, _ = leftover.name.split(".")
    if pid == "trainer":  # which is who asks
        return True
    if host != HOST or not pid.isdigit():
        with suppress(OSError):
            return time.time() - leftover.stat().st_mtime > STALE_SECONDS
        return False
    if int(pid) == os.getpid():
        return True  # in a container every process may have this number; this one has written nothing yet
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with suppress(OSError, IndexError):  # a container's first process may be slow to reap the others, or never do it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return False


def write_text(path: Path, text: str) -> None:
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def end_last_line(path: Path) -> None:
    """End a line that a crash cut short, so that the next one stands by itself."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def json_lines(path: Path, start: str = "") -> Iterator[Any]:
    """What the lines of a file hold, or those that begin with `start`; what is no JSON is left out."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    if line.startswith(start):
                        yield json.loads(line)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
