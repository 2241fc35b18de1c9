"""Options as people write them, before they mean anything: read from YAML, and bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from npd.errors import UserError, foreign
from npd.inputs import Unreadable, is_text, read_text

LARGEST = 256 << 10  # bytes of a configuration: what YAML takes a second for
DEEPEST = 32
MOST = 20_000  # values, those of aliases counted wherever they stand


class _Loader(yaml.SafeLoader):
    """Refuses what YAML lets pass in silence: a key twice, and aliases that make a few lines a billion values."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count(node, {}, 0) > MOST:
            raise Unreadable(f"with its aliases it has more than {MOST:,} values")
        return node


def _count(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """Values in a node, those behind aliases each time."""
    if depth > DEEPEST:
        raise Unreadable(f"it is nested more than {DEEPEST} deep")
    if id(node) not in counted:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _check_keys([key for key, _ in node.value])
            inner = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count(part, counted, depth + 1) for part in inner)
    return counted[id(node)]


def _check_keys(keys: list[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
            if (key.tag, key.value) in seen:
                raise Unreadable(f"line {key.start_mark.line + 1} has the key {foreign(key.value, 60)!r} a second time")
            seen.add((key.tag, key.value))


def parse_yaml(text: str) -> Any:
    """A YAML text as Python has it.

    Raises:
        Unreadable: it is no YAML, nested too deep, or too much.
    """
    try:
        if len(text) > LARGEST:
            raise Unreadable(f"it has more than {LARGEST:,} characters")
        return yaml.load(text, _Loader)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"it is nested more than {DEEPEST} deep") from None
    except Exception as error:  # also the 31st of February, and whatever else a tag promises
        raise Unreadable(foreign(error, 400)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a file.

    Raises:
        UserError: there is none, it cannot be read, or holds something else.
    """
    name = foreign(path, 200)
    try:
        text = read_text(path, LARGEST)
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {name}; give the path of a YAML file.") from None
    except Unreadable as error:
        raise UserError(f"The configuration file {name} cannot be read: {error}.") from None
    try:
        tree = parse_yaml(text)
    except Unreadable as error:
        raise UserError(f"{name} is not valid YAML: {error}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name} must hold options as `key: value`, but it holds {type(tree).__name__}.")
    return tree


def copied(tree: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """A tree's own copy, in which nothing stands in two places, of values that a run can keep and show.

    Raises:
        UserError: something is in it that no option takes; it is named.
    """
    left = [MOST]

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        left[0] -= 1
        fault = _fault(value, len(path)) if left[0] >= 0 else f"has more than {MOST:,} values"
        if fault is not None:
            name = foreign(".".join(path), 100) or "it"
            raise UserError(f"{foreign(where, 200)} is not a valid configuration: {name} {fault}.")
        if isinstance(value, Mapping):
            for key in value:
                copy(key, (*path, "a key")) if isinstance(key, str) else None
            return {key: copy(item, (*path, foreign(key, 60))) for key, item in value.items()}
        return [copy(item, (*path, str(i))) for i, item in enumerate(value)] if isinstance(value, list) else value

    made: dict[Any, Any] = copy(tree, ())
    return made


def _fault(value: Any, depth: int) -> str | None:
    """What is wrong with a value wherever it stands, its items aside; None: nothing."""
    if depth > DEEPEST:
        return f"is nested more than {DEEPEST} deep"
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return f"is an integer of {value.bit_length():,} bits; 63 are the most"
    if isinstance(value, float) and math.isnan(value):
        return "is nan (not a number)"
    if isinstance(value, str):
        if not is_text(value):
            return "holds half of a surrogate pair, which is no text"
        control = next((c for c in value if not c.isprintable() and ord(c) < 160 and c not in "\t\n\r"), None)
        if control is not None:
            return f"holds the control character {control!r}, which no option has"
    return None
