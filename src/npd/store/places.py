"""Where a run's files stand: links and strange things in those places are refused before anything is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from npd.errors import UserError
from npd.store.names import CHECKPOINT, GENERATION, LOG, PART, PROGRESS, REFERENCES, SNAPSHOT

DIRECTORIES = ("student", "adapter", "policy", "generations", "checkpoints", "cache", "logs", "trackers")
FILES = (
    *(".lock", "config.yaml", "events.jsonl", "metrics.jsonl", "prompts.arrow", "report.html", "mirror.json"),
    *("policy/LATEST", "checkpoints/LATEST", "generations/CURRENT", "student/npd.json", "adapter/npd.json"),
)


def check_places(run_dir: Path) -> None:
    """See that what stands in the places of a run's files is of the kind that npd puts there, so that nothing is written
    anywhere else. The run directory itself may be a link, and so may what lies above it.

    Raises:
        UserError: a place holds a link, a file instead of a directory, a directory or a device instead of a file.
    """
    for name in DIRECTORIES:
        _check(run_dir / name, directory=True)
    for name in FILES:
        _check(run_dir / name, directory=False)
    for path in _numbered_directories(run_dir):
        _check(path, directory=True)
        if path.parent.name == "generations":
            _check(path / "manifest.json", directory=False)
            for _, part in PART.within(path):
                _check(part, directory=False)
        else:
            _check(path / "npd.json", directory=False)
    for kind in (LOG, PROGRESS):
        for _, path in kind.within(run_dir / "logs"):
            _check(path, directory=False)


def _numbered_directories(run_dir: Path) -> Iterator[Path]:
    for folder, kind in (("policy", SNAPSHOT), ("checkpoints", CHECKPOINT), ("generations", GENERATION)):
        for _, path in kind.within(run_dir / folder):
            yield path
    yield run_dir / "generations" / REFERENCES


def _check(path: Path, *, directory: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be looked at ({error.strerror}).", "Mend that, or choose another run_dir.") from error
    if stat.S_ISDIR(mode) if directory else stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path} is a symbolic link, and npd writes through none inside a run directory.",
            "Put what it points to in its place; run_dir itself may be a link, so that a whole run can lie elsewhere.",
        )
    is_one = "a directory" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "neither a file nor a directory"
    wanted = "directory" if directory else "file"
    what = f"{path} is {is_one}, where a run has a {wanted} of that name."
    raise UserError(what, "Move it away, or choose another run_dir.")
