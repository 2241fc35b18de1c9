"""What the numbered files and directories of a run are called: nothing else in their place is taken for one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DIGITS = re.compile(r"[0-9]{1,9}")


def plain_number(text: str) -> int | None:
    """A number of at most nine digits and nothing else; None for any other text."""
    return int(text) if _DIGITS.fullmatch(text) else None


@dataclass(frozen=True)
class Numbered:
    """Names of a kind: PREFIX, a number of at least `width` digits, SUFFIX."""

    prefix: str
    width: int
    suffix: str = ""

    def name(self, number: int) -> str:
        return f"{self.prefix}{number:0{self.width}d}{self.suffix}"

    def number(self, name: str) -> int | None:
        """The number that a name stands for; None for every name that `name` would not give."""
        number = plain_number(name.removeprefix(self.prefix).removesuffix(self.suffix))
        return number if number is not None and self.name(number) == name else None

    def within(self, folder: Path) -> Iterator[tuple[int, Path]]:
        """Numbers and paths of what lies in a folder under such a name, the lowest first; nothing where there is none."""
        try:
            found = [(number, path) for path in folder.iterdir() if (number := self.number(path.name)) is not None]
        except (FileNotFoundError, NotADirectoryError):
            found = []
        yield from sorted(found)


SNAPSHOT = Numbered("v", 6)
CHECKPOINT = Numbered("step-", 6)
GENERATION = Numbered("g", 3)
PART = Numbered("part-", 5, ".parquet")
LOG = Numbered("refresh-", 1, ".log")
PROGRESS = Numbered("refresh-", 1, ".progress.json")
REFERENCES = "references"
