"""Directories that are written once - snapshots, checkpoints, students - and the npd.json that closes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from npd.errors import UserError
from npd.store.files import read_json, read_or_explain, sha256

SEAL = "npd.json"


def seal(path: Path, facts: dict[str, Any]) -> None:
    """Write npd.json: facts, the checksums of all that lies beside it, and its own."""
    checksums = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    tree = facts | {"sha256": checksums}
    (path / SEAL).write_text(json.dumps(tree | {"seal": _digest(tree)}, indent=1) + "\n", encoding="utf-8")


def sealed_facts(path: Path, remedy: str) -> dict[str, Any]:
    """What a directory was saved with.

    Raises:
        UserError: its npd.json is damaged or missing.
    """
    file = path / SEAL

    def read() -> dict[str, Any]:
        tree = read_json(file)
        if not isinstance(tree, dict):
            raise ValueError(f"it is {type(tree).__name__}, not an object")
        said = tree.pop("seal", None)  # older versions wrote none
        if said is not None and said != _digest(tree):
            raise ValueError("its checksum is another one")
        return tree

    return read_or_explain(file, read, remedy)


def check_sealed(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Compare a directory with its checksums in npd.json; returns the facts it was saved with.

    Raises:
        UserError: a file is missing or damaged.
    """
    facts = sealed_facts(path, remedy)

    def read() -> dict[str, str]:
        checksums = facts["sha256"]
        if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
            raise ValueError("it has no checksums")
        return checksums

    for name, expected in read_or_explain(path / SEAL, read, remedy).items():
        file = path / name
        if not file.is_file() or sha256(file) != expected:
            why = "not what was written" if file.is_file() else "missing"
            raise UserError(f"The {kind} {path} is damaged: {name} is {why}.", remedy)
    return facts


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
