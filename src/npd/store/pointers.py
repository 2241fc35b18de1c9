"""LATEST and CURRENT: small files that name something else in the run."""

from __future__ import annotations

from pathlib import Path

from npd.store.files import read_facts, read_or_explain, write_text
from npd.store.names import Numbered, plain_number


def point_latest(newest: Path, kind: Numbered) -> str | None:
    """Let LATEST beside a snapshot or checkpoint name it; a sentence for people if what it said before named none."""
    pointer = newest.with_name("LATEST")
    try:
        said = read_facts(pointer)
    except FileNotFoundError:
        said = ""
    except (OSError, ValueError):
        said = "?"
    if said == f"{newest.name}\n":
        return None
    write_text(pointer, f"{newest.name}\n")
    named = kind.number(said.strip()) is not None
    return f"{pointer} was damaged; it names {newest.name} again, the newest that is there." if said and not named else None


def read_current(path: Path) -> int:
    """The generation that CURRENT names; 0 where it is not there yet.

    Raises:
        UserError: it is damaged.
    """

    def read() -> int:
        number = plain_number(read_facts(path).strip())
        if number is None:
            raise ValueError("it names no generation")
        return number

    return read_or_explain(path, read, "Delete it, and run `npd distill` again.") if path.exists() else 0
