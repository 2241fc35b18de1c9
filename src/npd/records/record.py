"""A record and its JSON.

Reading is lenient: a figure that is no number becomes NaN, what may be None and is of another type becomes None, what need
not be there and is of another type counts as missing, and keys that nobody knows are left alone. Whatever else is missing or
of another type is a ValueError, for the reader to say or to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Self, get_args, get_origin, get_type_hints

MOST_WHOLE = 1 << 53  # beyond it a JSON number is not a count


def number_of(value: Any) -> float:
    """A figure as a line has it; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Record:
    """Base of frozen dataclasses that stand in a file as JSON objects.

    A field is written under its name, or under `key` in its metadata. One whose default is None, False, "" or empty is left
    out while it has that value. A field `more`, if there is one, holds all further keys.
    """

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """The record that a JSON value holds.

        Raises:
            ValueError: it is no object, or lacks a fact that a record of this kind must have.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"it is {type(raw).__name__}, not an object")
        found: dict[str, Any] = {}
        lacking: list[str] = []
        readers, known = _plan(cls)  # type: ignore[arg-type]
        for name, key, read, needed in readers:
            if needed or key in raw:
                try:
                    found[name] = read(raw.get(key))
                except ValueError:
                    lacking += [key] if needed else []
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        if "more" in cls.__dataclass_fields__:
            found["more"] = {key: value for key, value in raw.items() if key not in known}
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Types that JSON has, in the order of the fields."""
        out = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            optional = spec.default is not MISSING or spec.default_factory is not MISSING
            if spec.name != "more" and not (optional and (value is None or value is False or value in ("", (), {}))):
                out[spec.metadata.get("key", spec.name)] = _as_json(value)
        return out | getattr(self, "more", {})


def _as_json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple | list) else value


@cache
def _plan(cls: Any) -> tuple[list[tuple[str, str, Callable[[Any], Any], bool]], frozenset[str]]:
    """Of each field but `more`: its name, its key, what reads it, and whether a record must have it; and all keys."""
    hints = get_type_hints(cls)
    readers = []
    for spec in fields(cls):
        if spec.name != "more":
            needed = spec.default is MISSING and spec.default_factory is MISSING
            readers.append((spec.name, spec.metadata.get("key", spec.name), _reader(hints[spec.name]), needed))
    return readers, frozenset(key for _, key, *_ in readers)


def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type out of JSON; it raises ValueError for what is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if kind is float:
        return number_of
    if NoneType in inner:
        return _or_none(_reader(next(one for one in inner if one is not NoneType)))
    if origin is tuple:
        item, count = _reader(inner[0]), None if inner[-1] is Ellipsis else len(inner)
        return lambda value: tuple(item(one) for one in _of(list, value, count))
    if origin is dict:
        item = _reader(inner[1])
        return lambda value: {str(key): item(one) for key, one in _of(dict, value).items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_json
    return lambda value: _of(kind, value)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def lenient(value: Any) -> Any:
        try:
            return None if value is None else read(value)
        except ValueError:
            return None

    return lenient


def whole(value: Any) -> int:
    """A whole number as it stands.

    Raises:
        ValueError: it is none.
    """
    return int(_of(int, value))


def _of(kind: type, value: Any, count: int | None = None) -> Any:
    """The value, if it is of this very type (true is no number), and has `count` items."""
    wrong = type(value) is not kind or (isinstance(value, int) and abs(value) > MOST_WHOLE)
    if wrong or (count is not None and len(value) != count):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value
