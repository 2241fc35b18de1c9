"""What somebody else wrote, read within bounds: ordinary files of the size that such a file has, and no endless nesting."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEEPEST = 100  # objects and lists in each other, in data and in models' configurations
MIB = 1 << 20
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


class Unreadable(ValueError):
    """Why something cannot be read, as the end of a sentence: in lower case, without a full stop."""


def reason(error: BaseException) -> str:
    """What an error of a file, of its encoding or of its contents says, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 text (byte {error.start + 1:,}); save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error) or type(error).__name__


def check_file(path: Path) -> os.stat_result:
    """See that a path is that of an ordinary file, or of a link to one: whatever else there is may never end.

    Raises:
        FileNotFoundError: there is nothing.
        Unreadable: it is something else, or cannot be looked at.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise Unreadable(reason(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")
    return found


def read_text(path: Path, most: int) -> str:
    """A file's text, of at most so many bytes.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is no ordinary file, larger, or no UTF-8.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise Unreadable(f"it has more than {most:,} bytes")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(reason(error)) from error


def parse_json(text: str, *, deepest: int = DEEPEST) -> Any:
    """What a JSON text holds. NaN and Infinity are read, as Python writes them; a key with two values is not.

    Raises:
        json.JSONDecodeError: it is no JSON.
        Unreadable: it is nested too deep, has a number that is none, or a key twice with different values.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, Unreadable):
        raise
    except RecursionError:
        raise Unreadable(f"it is nested more than {deepest} deep") from None
    except ValueError as error:
        raise Unreadable("it holds an integer of thousands of digits") from error
    if is_deeper(value, deepest):
        raise Unreadable(f"it is nested more than {deepest} deep")
    return value


def read_json(path: Path, most: int) -> Any:
    """What a JSON file of at most so many bytes holds.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it cannot be read, or is no JSON.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise Unreadable(reason(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if value is not made[key] and value != made[key]:
                raise Unreadable(f"it has the key {key[:60]!r} twice, with different values")
    return made


def is_deeper(value: Any, deepest: int) -> bool:
    """Are there more lists and objects in each other?"""
    level = [value]
    for _ in range(deepest + 1):
        level = [item for box in level for item in _items(box) if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_text(text: str) -> bool:
    """Can it be written down? Half a surrogate pair, which JSON and YAML can hold, cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_missing(value: Any) -> bool:
    """Is it what pandas writes for a value that is not there?"""
    return value is None or (isinstance(value, float) and math.isnan(value))
