"""config.yaml of a run directory: what the run is, and who made it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from npd.store.files import read_facts, read_or_explain, write_text

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Recorded:
    """What a run began as."""

    tree: dict[str, Any]
    """Its options, without provenance."""
    provenance: dict[str, Any]

    @property
    def command(self) -> str:
        return str(self.provenance["command"])

    @property
    def other_version(self) -> str:
        """A sentence on the version of npd that made the run, where it is not this one; else nothing."""
        versions = self.provenance.get("versions")
        theirs, mine = versions.get("npd") if isinstance(versions, dict) else None, importlib.metadata.version("npd")
        return "" if theirs in (None, mine) else f" The run was made by npd {str(theirs)[:40]}; this is npd {mine}."


def recorded(run_dir: Path) -> Recorded:
    """What config.yaml of a run says.

    Raises:
        UserError: it is damaged, or not there.
    """
    file = run_dir / CONFIG

    def read() -> Recorded:
        tree = yaml.safe_load(read_facts(file))
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ValueError(f"it is {type(tree).__name__}, not options")
        provenance = tree.pop("provenance", None)
        if not isinstance(provenance, dict) or not isinstance(provenance.get("command"), str):
            raise ValueError("its provenance does not say which command began the run")
        return Recorded(tree, provenance)

    return read_or_explain(file, read)


def record(run_dir: Path, tree: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write config.yaml."""
    write_text(run_dir / CONFIG, yaml.safe_dump(tree | {"provenance": provenance}, sort_keys=False, allow_unicode=True))
