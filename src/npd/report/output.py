"""Files that a user asked for."""

from __future__ import annotations

from pathlib import Path

from npd.errors import RunError, UserError
from npd.store import write_text


def check_output(path: Path, name: str) -> None:
    """See that a file can stand there; `name` is one that it might have.

    Raises:
        UserError: there is a directory.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory, and nothing in it is touched; name a file, such as {path / name}.")


def write_output(path: Path, text: str, option: str) -> None:
    """Write a file whole; `option` names another.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_text(path, text)
    except RunError as error:  # of the disk
        raise UserError(error.what, f"Name a file elsewhere with {option} FILE.") from error
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be written ({why}); name a file elsewhere with {option} FILE.") from error
