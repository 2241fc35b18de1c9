"""One trainer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npd.errors import UserError
from npd.store.files import HOST


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory: see `Store.locked`."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run_dir {path} cannot be written ({error.strerror}); choose another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{path} is in use by process {file.read().strip()}. Wait for it or stop it.") from None
        except OSError:  # a filesystem without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {HOST}")
        file.flush()
        try:
            yield
        finally:
            if not existed and not (path / "config.yaml").exists():  # nothing was begun
                with suppress(OSError):
                    (path / ".lock").unlink()
                    path.rmdir()
