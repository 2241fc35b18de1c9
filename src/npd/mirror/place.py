"""The store that a mirror lies in: any filesystem that pyarrow knows by a URI. Files in it appear whole."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from npd.errors import RunError, UserError, foreign
from npd.store.files import HOST

PIECE = 16 << 20  # bytes that are read or written at once
SMALL = 64 << 20  # bytes that are read before any of them is written: a file that can't be read is not half written then
ASIDE = ".mirror.tmp"  # what ends the name of a file that is being written where files do not appear whole by themselves
TRIES = 5  # of one file or question, before the store counts as failing
WHOLE = ("s3", "gcs", "abfs")  # where a file appears when the last of its bytes is there
FIRST_PAUSE = 0.5  # seconds before something is tried again; twice as many each time
LONGEST_PAUSE = 30.0
# What no second try mends, in the words of S3, of Azure and of the system.
_REFUSED = (
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "INVALID_SIGNATURE"),
    *("MISSING_AUTHENTICATION_TOKEN", "EXPIRED", "UNRECOGNIZED_CLIENT", "NO_SUCH_BUCKET", "HTTP status 403", "Forbidden"),
    *("AuthenticationFailed", "AuthorizationFailure", "Permission denied"),
)
CREDENTIALS = (
    "Credentials come from the environment, as the store's own tools have them (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY or ~/.aws for s3, GOOGLE_APPLICATION_CREDENTIALS for gs, AZURE_… for abfs); a server that is not "
    "Amazon's is named by ?endpoint_override=HOST:PORT&scheme=http."
)

T = TypeVar("T")


class Refused(RunError):
    """The store said no in a way that trying again does not mend."""


class Gone(Exception):
    """A file of the run directory went away before it was copied."""


class _DiskError(Exception):
    """The disk of this machine failed, which is no fault of the store's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Place:
    """Files under a URI by their names below it, such as policy/v000000/npd.json.

    Args:
        uri: of a directory, as `pyarrow.fs.FileSystem.from_uri` takes it, or an absolute path.

    Raises:
        UserError: no filesystem is known by this URI, or it can't be reached.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.filesystem, base = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError, KeyError, TypeError, ImportError, pa.ArrowException) as error:
            raise UserError(f"checkpoint.mirror {self.shown} cannot be used ({foreign(error)}).", CREDENTIALS) from error
        self.base = base.rstrip("/")
        self.wait: Callable[[float], object] = time.sleep
        """Waits so many seconds between tries; what it raises ends them."""

    @property
    def shown(self) -> str:
        """The URI without its options."""
        return foreign(self.uri.partition("?")[0], 200)

    # -- reading

    def files(self) -> dict[str, int]:
        """Names and bytes of all files; those half written are left out.

        Raises:
            UserError: one has a name that would lead out of a directory here, as a store of keys may hold.
        """
        found = {name: size for name, size in self._all().items() if not name.endswith(ASIDE)}
        for name in found:
            if "\\" in name or {"", ".", ".."} & {*name.split("/")}:
                raise UserError(
                    f"{self.shown} holds {foreign(name, 100)!r}, which is no name of a file below it.",
                    "npd wrote no such file: see who did, and delete it.",
                )
        return found

    def _all(self) -> dict[str, int]:
        def look() -> dict[str, int]:
            selector = fs.FileSelector(self.base, recursive=True, allow_not_found=True)
            found = {i.path: i.size or 0 for i in self.filesystem.get_file_info(selector) if i.type == fs.FileType.File}
            return {path.removeprefix(self.base).lstrip("/"): size for path, size in found.items()}

        return self._steadily("be listed", look)

    def read(self, name: str) -> bytes | None:
        """What a small file holds; None: it is not there."""

        def read() -> bytes | None:
            if self.filesystem.get_file_info(self._path(name)).type == fs.FileType.NotFound:
                return None
            with self.filesystem.open_input_file(self._path(name)) as file:
                return bytes(file.read())

        return self._steadily(f"give {name}", read)

    def fetch(self, name: str, to: Path) -> int:
        """Write what a file holds to a path of this machine; its bytes."""

        def fetch() -> int:
            size = 0
            with (
                self.filesystem.open_input_file(self._path(name)) as source,
                _on_this_disk(lambda: to.open("wb", buffering=0)) as target,
            ):
                while piece := source.read(PIECE):
                    size += _on_this_disk(lambda: _write_all(target, piece))
            return size

        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._steadily(f"give {name}", fetch)
        except _DiskError as failed:
            raise failed.error from failed

    # -- writing

    def put(self, name: str, file: Path) -> int:
        """Write a file of this machine; its bytes.

        Raises:
            Gone: it is not there any more.
        """
        try:
            size = file.stat().st_size
            data = file.read_bytes() if size <= SMALL else None
        except FileNotFoundError:
            raise Gone(str(file)) from None
        if data is not None:
            return self.put_bytes(name, data)

        def put() -> int:
            return self._write(name, size, lambda target: _stream(file, size, target))

        return self._steadily(f"take {name} ({size:,} bytes)", put)

    def put_bytes(self, name: str, data: bytes) -> int:
        """Write a small file; its bytes."""

        def put() -> int:
            return self._write(name, len(data), lambda target: target.write(data))

        return self._steadily(f"take {name} ({len(data):,} bytes)", put)

    def _write(self, name: str, size: int, write: Callable[[Any], object]) -> int:
        path = self._path(name)
        whole = self.filesystem.type_name in WHOLE
        folder, _, last = path.rpartition("/")
        aside = path if whole else f"{folder}/.{last}.{HOST}{ASIDE}"
        if not whole:
            self.filesystem.create_dir(folder, recursive=True)
        try:
            with self.filesystem.open_output_stream(aside) as target:
                write(target)
            there = self.filesystem.get_file_info(aside).size
            if there != size:
                raise OSError(errno.EIO, f"it has {there} bytes of {size} there")
            if not whole:
                self._rename(aside, path)
        except BaseException:
            with suppress(OSError, pa.ArrowException):  # closing a stream that failed may have made a file of what it had
                self.filesystem.delete_file(aside)
            raise
        return size

    def _rename(self, aside: str, path: str) -> None:
        try:
            self.filesystem.move(aside, path)
        except OSError:
            if self.filesystem.type_name != "hdfs":  # which renames over nothing
                raise
            self.filesystem.delete_file(path)
            self.filesystem.move(aside, path)

    def delete(self, name: str) -> None:
        """Delete a file, or nothing."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                if self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File:
                    self.filesystem.delete_file(self._path(name))

        self._steadily(f"delete {name}", delete)

    def sweep(self) -> None:
        """Delete what processes that are gone were writing."""
        for name in self._all():
            if name.endswith(ASIDE):
                self.delete(name)

    def check_apart(self, run_dir: Path) -> None:
        """See that this is not where a run itself lies.

        Raises:
            UserError: it is.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            there, here = Path(self.base).resolve(), run_dir.resolve()
            if there.is_relative_to(here) or here.is_relative_to(there):
                raise UserError(
                    f"checkpoint.mirror {self.shown} and run_dir {run_dir} lie in each other.", "Name a place of its own."
                )

    def delete_folder(self, name: str) -> None:
        """Delete all that lies below a name, in no order."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_dir(self._path(name))

        self._steadily(f"delete {name}", delete)

    # -- trying

    def _path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _steadily(self, what: str, call: Callable[[], T]) -> T:
        """What a call gives, tried a few times.

        Raises:
            Refused: the store says no.
            RunError: it failed at every try.
        """
        pause = FIRST_PAUSE
        for left in reversed(range(TRIES)):
            try:
                return call()
            except (OSError, pa.ArrowException) as error:
                refused = isinstance(error, PermissionError) or any(word in str(error) for word in _REFUSED)
                if left and not refused:
                    self.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                kind = Refused if refused else RunError
                raise kind(f"The mirror {self.shown} can't {what}: {foreign(error)}") from error
        raise AssertionError("a try gives or raises")


def _stream(file: Path, size: int, target: Any) -> None:
    """The first `size` bytes: lines may be added meanwhile."""
    try:
        source = file.open("rb")
    except FileNotFoundError:
        raise Gone(str(file)) from None
    with source:
        while size and (piece := source.read(min(PIECE, size))):
            target.write(piece)
            size -= len(piece)


def _on_this_disk(call: Callable[[], T]) -> T:
    try:
        return call()
    except OSError as error:
        raise _DiskError(error) from error


def _write_all(target: Any, piece: bytes) -> int:
    rest = memoryview(piece)
    while rest:
        rest = rest[target.write(rest) :]
    return len(piece)
