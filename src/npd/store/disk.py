"""What the system says of a disk, however libraries wrap it, as one paragraph."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npd.errors import NpdError, RunError

# safetensors, Arrow and tokenizers put the system's number into words of their own: "(os error 28)", "[Errno 28]".
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)
_WORDS = {"No space left": errno.ENOSPC, "quota exceeded": errno.EDQUOT, "Read-only file system": errno.EROFS}
# PyTorch's writer of checkpoints never says why it could not write.
_UNSAID = ("enforce fail at inline_container", "PytorchStreamWriter failed", "iostream error")

UNSAID = -1
"""The number of an error of which only that is known: a file could not be written."""
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, UNSAID)
AGAIN = "run the same command again, it goes on from here."


def disk_error(error: BaseException) -> int | None:
    """The number (errno) of a disk's trouble that an error tells of, itself or what it came of; None: it tells of none."""
    seen: BaseException | None = error
    for _ in range(20):  # chains may be circular
        if seen is None or isinstance(seen, NpdError):
            return None
        number = _number(seen)
        if number in OF_DISKS:
            return number
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _number(error: BaseException) -> int | None:
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    if isinstance(error, ValueError | TypeError | KeyError):  # what is wrong with a value, whatever words it holds
        return None
    text = str(error)[:4000]
    if found := _NUMBER.search(text):
        return int(found[1])
    if any(words in text for words in _UNSAID):
        return UNSAID
    return next((number for words, number in _WORDS.items() if words in text), None)


def explanation(error: BaseException, path: Path) -> RunError | None:
    """An error of a disk as one paragraph: which file, how much is free, what to do; None for any other error."""
    number = disk_error(error)
    if number is None:
        return None
    named = getattr(error, "filename", None)
    where = path if named is None or isinstance(named, int) else Path(os.fsdecode(named))
    not_written, room = f"{path} could not be written", free_space(where)
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = "The disk is full" if number == errno.ENOSPC else "The quota of this user or project on the disk is used up"
        return RunError(f"{what}: {not_written}{room}.", f"Nothing that was finished is lost: free some space and {AGAIN}")
    if number == errno.EFBIG:
        return RunError(
            f"{not_written}: it is larger than a file may be here (`ulimit -f`, or the filesystem's own limit){room}.",
            f"Raise the limit and {AGAIN}",
        )
    if number == errno.EROFS:
        return RunError(f"{not_written}: its filesystem is read-only.", f"Make it writable and {AGAIN}")
    if number == UNSAID:
        return RunError(
            f"{not_written}{room}: PyTorch does not say why, but most likely the disk is full, or a quota or `ulimit -f` "
            "was reached.",
            f"Nothing that was finished is lost: free some space and {AGAIN}",
        )
    why = os.strerror(number)
    return RunError(f"The disk reports an error ({why}): {path} could not be read or written.", f"Look after it and {AGAIN}")


def free_space(path: Path) -> str:
    """How much room is left where a file stands or would stand, in brackets; nothing where that can't be known."""
    usage = disk_usage(path)
    return "" if usage is None else f" ({_size(usage.free)} of {_size(usage.total)} are free there)"


def disk_usage(path: Path) -> shutil._ntuple_diskusage | None:
    """Bytes of the filesystem where a file stands or would stand: total, used and free; None where that can't be known."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place)
        except OSError:
            continue
    return None


def _size(size: int) -> str:
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def explained_disk(path: Path) -> Iterator[None]:
    """An error of the disk that `path` is written to as one paragraph.

    Raises:
        RunError: it is full, over quota, read-only, broken.
    """
    try:
        yield
    except Exception as error:
        explained = explanation(error, path)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def explained_run(run_dir: Path) -> Iterator[None]:
    """Around the work on a run that has begun: whatever the system says of the files of its directory as one paragraph.

    Raises:
        RunError: the directory is gone, or can't be read or written.
    """
    try:
        yield
    except NpdError:
        raise
    except Exception as error:
        if not (run_dir / "config.yaml").exists():
            raise gone(run_dir) from error
        explained = explanation(error, run_dir)
        if explained is None and isinstance(error, OSError) and error.filename is not None:
            path = Path(os.fsdecode(error.filename))
            if path.absolute().is_relative_to(run_dir.absolute()):
                explained = RunError(f"{path} could not be read or written ({error.strerror}).", f"Mend that and {AGAIN}")
        if explained is None:
            raise
        raise explained from error


def gone(run_dir: Path) -> RunError:
    """A run directory that was there is not there any more."""
    return RunError(
        f"The run directory {run_dir} was removed or renamed while the run went on (its config.yaml is gone).",
        "Nothing more is written there: put it back and run the same command again, or start over.",
    )
