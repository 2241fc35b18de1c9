"""One trainer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npd.errors import UserError
from npd.store.disk import explained_disk
from npd.store.files import HOST, opened


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
        file = opened(path / ".lock", "a+")
    except OSError as error:
        raise UserError(f"run_dir {path} cannot be written ({error.strerror}); choose another.") from error
    with explained_disk(path / ".lock"), file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = "".join(filter(str.isprintable, file.read(200))).strip() or "that does not say its number"
            raise UserError(f"{path} is in use by process {holder}. Wait for it or stop it.") from None
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
