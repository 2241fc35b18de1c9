"""The prompts that a run keeps, so that everybody who makes its generations answers the same ones."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from npd.errors import UserError
from npd.prompts import Prompts
from npd.store.files import writing
from npd.store.names import GENERATION, PART, REFERENCES

PROMPTS = "prompts.arrow"


def began(path: Path) -> datetime | None:
    """When the prompts in a file were rendered: see `Store.began`."""
    if not path.is_file():
        return None
    with suppress(Exception):  # damaged: whoever opens it says so
        return datetime.fromisoformat(Prompts.facts(path)["date"])
    return datetime.fromtimestamp(path.stat().st_mtime)  # made by an older version, when the run began


def keep_prompts(run_dir: Path, prompts: Prompts) -> Prompts:
    """Write prompts into a run directory, or take those that are there: see `Store.keep_prompts`."""
    path = run_dir / PROMPTS
    why = None
    if path.exists():
        try:
            theirs = Prompts.open(path)
        except Exception:  # whatever a damaged file makes of it
            if not _answers(run_dir, prompts):
                why = f"{path} is damaged, and the prompts of today are not those that it held"
        else:
            if (theirs.made_from and theirs.made_from == prompts.made_from) or theirs.table.equals(prompts.table):
                return theirs
            before, now = theirs.made_from, prompts.made_from
            changed = [f"the {name}" for name in before if before[name] != now.get(name)] or ["the data or the tokenizer"]
            why = (
                f"The prompts are not those that {run_dir} began with ({len(theirs):,} then, {len(prompts):,} now): "
                f"{' and '.join(changed)} {'have' if len(changed) > 1 or changed[0].endswith('s') else 'has'} changed"
            )
    if why is not None and _parts(run_dir):
        raise UserError(f"{why}. Restore them, or choose another run_dir.")
    with writing(path) as aside:
        prompts.save(aside)
    return Prompts.open(path)


def _parts(run_dir: Path) -> list[Path]:
    """The parts of all generations."""
    folder = run_dir / "generations"
    generations = [folder / REFERENCES, *(path for _, path in GENERATION.within(folder))]
    return [part for generation in generations for _, part in PART.within(generation)]


def _answers(run_dir: Path, prompts: Prompts) -> bool:
    """Do the parts that are there answer these prompts?"""
    known = set(prompts.table["prompt_id"].to_pylist())
    for part in _parts(run_dir):
        with suppress(OSError, pa.ArrowException):  # a damaged part is made again
            if not known.issuperset(pq.read_table(part, columns=["prompt_id"])["prompt_id"].to_pylist()):
                return False
    return True
