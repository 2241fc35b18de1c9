"""metrics.jsonl: a record a line."""

from __future__ import annotations

import json
from pathlib import Path

from npd.records import GenerationEnd, Line, as_line
from npd.store.files import append_line, json_lines, write_text


def append(path: Path, line: Line) -> None:
    """See `Store.append_metrics`."""
    append_line(path, line.to_json())


def read(path: Path) -> list[Line]:
    """See `Store.read_metrics`."""
    return [line for raw in json_lines(path) if (line := as_line(raw)) is not None]


def rewind(path: Path, step: int) -> None:
    """See `Store.rewind_metrics`."""
    kept = []
    for raw in json_lines(path):
        line = as_line(raw)
        if line is not None and (line.step < step or (line.step == step and not isinstance(line, GenerationEnd))):
            kept.append(json.dumps(raw) + "\n")  # as it was, whatever else it has
    write_text(path, "".join(kept))
