"""Files that appear whole: written aside, flushed, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from npd.errors import UserError
from npd.store.disk import explained_disk

HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"
STALE_SECONDS = 24 * 3600.0  # of a file that a process on another machine was writing
MOST_FACTS = 256 << 20  # bytes of a file of facts: more is none that npd wrote
MOST_LINE = 16 << 20  # bytes of a line of one

T = TypeVar("T")


def beside(path: Path) -> Path:
    """Where this process writes what is to be renamed to `path`; what it leaves there is swept away."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path` (a file or a directory), renamed to it once whole and on disk.

    Raises:
        RunError: the disk is full, read-only or broken.
    """
    aside = beside(path)
    try:
        with explained_disk(path):
            _make_folder(path.parent)
            remove(aside)  # a link there would lead elsewhere
            yield aside
            put(aside, path)
    finally:
        with suppress(OSError):
            remove(aside)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put(aside: Path, path: Path) -> None:
    """Flush what was written aside to the disk, then rename it to its place."""
    for file in [aside] if aside.is_file() else sorted(f for f in aside.rglob("*") if f.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
            if file is not aside:
                _follow_umask(handle.fileno(), file.parent)
    if path.is_dir() and aside.is_dir():  # a file never takes the place of a directory
        remove_directory(path)
    os.replace(aside, path)


def _follow_umask(file: int, folder: Path) -> None:
    """Let a file be read by whom its directory, which was just made, may be: safetensors gives its owner alone the right."""
    mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o666
    if stat.S_IMODE(os.fstat(file).st_mode) != mode and hasattr(os, "fchmod"):
        with suppress(OSError):  # some filesystems have no such rights
            os.fchmod(file, mode)


def remove_directory(path: Path) -> None:
    """Rename, then delete, so that half of a directory is never taken for a whole one."""
    aside = path.with_name(f".{path.name}.old.{HOST}.{os.getpid()}.tmp")  # what replaces it lies beside it
    os.replace(path, aside)
    shutil.rmtree(aside)


def abandoned(leftover: Path) -> bool:
    """Was this temporary file left by a process that is gone?"""
    *_, host, pid, _ = ("", "", *leftover.name.split("."))
    if pid == "trainer":  # which is who asks
        return True
    if host != HOST or not pid.isascii() or not pid.isdigit():
        with suppress(OSError):
            return time.time() - leftover.lstat().st_mtime > STALE_SECONDS
        return False
    if int(pid) == os.getpid():
        return True  # in a container every process may have this number; this one has written nothing yet
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    with suppress(OSError, IndexError):  # a container's first process may be slow to reap the others, or never do it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return False


def opened(path: Path, mode: str = "a") -> IO[Any]:
    """Open a file of a run to write in it where it stands: never through a link, and never what is no file.

    Args:
        mode: as `open` has it; text is UTF-8.

    Raises:
        UserError: a link, a directory or a device stands there.
        OSError: it can't be opened.
    """

    def without_links(name: str, flags: int) -> int:
        extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe's other end is not waited for
        return os.open(name, flags | extra, 0o666)

    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
        file: IO[Any] = open(path, mode, opener=without_links, **text)  # type: ignore[call-overload]  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise UserError(f"{path} is no plain file ({error.strerror}).", "Move it away.") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no plain file.", "Move it away.")
    return file


def append_line(path: Path, value: Any) -> None:
    """Add a line of JSON, in one write, so that lines of two processes never mix.

    Raises:
        RunError: the disk is full, read-only or broken.
        UserError: a link or a directory stands there.
    """
    with explained_disk(path), opened(path) as file:
        file.write(json.dumps(value) + "\n")


def write_text(path: Path, text: str) -> None:
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def end_last_line(path: Path) -> None:
    """End a line that a crash cut short, so that the next one stands by itself."""
    if path.exists() and path.stat().st_size:
        with explained_disk(path), opened(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_facts(path: Path) -> str:
    """The text of a file of facts.

    Raises:
        OSError: it is not there, or can't be read.
        ValueError: it is no file, no UTF-8, or too large to be one that npd wrote.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")
    if status.st_size > MOST_FACTS:
        raise ValueError(f"it has {status.st_size:,} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """As `read_facts`; of what is no JSON, ValueError or RecursionError."""
    return json.loads(read_facts(path))


def read_or_explain(path: Path, read: Callable[[], T], remedy: str = "Restore it or start over in another run_dir.") -> T:
    """What `read` makes of a file.

    Raises:
        UserError: it raised an exception of any kind: the file is damaged.
    """
    try:
        return read()
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} is damaged ({why}).", remedy) from error


def json_lines(path: Path, start: str = "") -> Iterator[Any]:
    """What the lines of a file hold, or those that begin with `start`; what is no JSON is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        cut = False  # is this a later piece of a line that is too long to be one?
        while line := file.readline(MOST_LINE):
            whole, cut = not cut, not line.endswith(b"\n")
            if not whole or (cut and len(line) >= MOST_LINE):
                continue
            text = line.decode("utf-8", "replace")
            with suppress(ValueError, RecursionError):
                if text.startswith(start):
                    yield json.loads(text)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
