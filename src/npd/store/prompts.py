"""A run's prompts.arrow: the same prompts for as long as the run lasts."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from npd.errors import UserError
from npd.prompts import Prompts
from npd.store.files import writing


def began(path: Path) -> datetime | None:
    """The moment that a file's prompts were rendered at, for templates that ask for the date; None: there is no file yet."""
    if not path.exists():
        return None
    with suppress(Exception):  # damaged: whoever opens it says so
        return datetime.fromisoformat(Prompts.facts(path)["date"])
    return datetime.fromtimestamp(path.stat().st_mtime)  # made by an older version, when the run began


def keep(path: Path, prompts: Prompts) -> Prompts:
    """See `Store.keep_prompts`."""
    why = _changed(path, prompts) if path.exists() else None
    if why == "":
        return Prompts.open(path)
    if why is not None and any(path.parent.glob("generations/*/part-*")):
        raise UserError(f"{why}. Restore them, or choose another run_dir.")
    with writing(path) as aside:
        prompts.save(aside)
    return Prompts.open(path)


def _changed(path: Path, prompts: Prompts) -> str | None:
    """Why other prompts cannot take a file's place; "": it holds these; None: it is damaged, and held these."""
    try:
        theirs = Prompts.open(path)
    except Exception:  # whatever a damaged file makes of it
        damaged = f"{path} is damaged, and the prompts of today are not those that it held"
        return None if _answers(path.parent, prompts) else damaged
    if (theirs.made_from and theirs.made_from == prompts.made_from) or theirs.table.equals(prompts.table):
        return ""
    before, now = theirs.made_from, prompts.made_from
    changed = [f"the {name}" for name in before if before[name] != now.get(name)] or ["the data or the tokenizer"]
    return (
        f"The prompts are not those that {path.parent} began with ({len(theirs):,} then, {len(prompts):,} now): "
        f"{' and '.join(changed)} {'have' if len(changed) > 1 or changed[0].endswith('s') else 'has'} changed"
    )


def _answers(run_dir: Path, prompts: Prompts) -> bool:
    """Do the parts that are there answer these prompts?"""
    known = set(prompts.table["prompt_id"].to_pylist())
    for part in run_dir.glob("generations/*/part-*.parquet"):
        with suppress(OSError, pa.ArrowException):  # a damaged part is made again
            if not known.issuperset(pq.read_table(part, columns=["prompt_id"])["prompt_id"].to_pylist()):
                return False
    return True
