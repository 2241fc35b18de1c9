"""Whose a mirror is: a run has a name, and each process that mirrors it a turn, so that two copies of it are told apart."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from npd.errors import UserError, foreign
from npd.mirror.contents import CLAIM, CONFIG, PROMPTS
from npd.mirror.place import Place
from npd.store.files import HOST, read_json, read_or_explain, write_json


@dataclass(frozen=True)
class Claim:
    """What mirror.json says, in a run directory and in its mirror."""

    run: str
    turn: str
    """Of the process that mirrored last."""
    before: str = ""
    """In a run directory: the turn before, in case that the mirror was not told of this one."""
    host: str = ""
    since: str = ""

    @classmethod
    def of(cls, tree: object) -> Claim:
        if not isinstance(tree, dict) or not all(isinstance(tree.get(name), str) for name in ("run", "turn")):
            raise ValueError("it names no run")
        return cls(**{name: str(tree[name]) for name in ("run", "turn", "before", "host", "since") if name in tree})


def claim_here(run_dir: Path) -> Claim | None:
    """What a run directory says of its mirror; None: it was never mirrored.

    Raises:
        UserError: mirror.json is damaged.
    """
    path = run_dir / CLAIM
    remedy = "Delete it; the run then needs an empty place as its checkpoint.mirror."
    return read_or_explain(path, lambda: Claim.of(read_json(path)), remedy) if path.exists() else None


def claim_there(place: Place) -> Claim | None:
    """What a mirror says of itself; None: it says nothing."""
    data = place.read(CLAIM)
    try:
        return None if data is None else Claim.of(json.loads(data))
    except (ValueError, RecursionError):
        return None


def keep_claim(run_dir: Path, claim: Claim) -> None:
    """Write mirror.json into a run directory."""
    write_json(run_dir / CLAIM, asdict(claim))


def take(place: Place, run_dir: Path) -> tuple[Claim, dict[str, int]]:
    """Claim a mirror for this process and the run that lies here; also what is there now.

    Raises:
        UserError: it is another run's, or this run was continued elsewhere since, or something else lies there.
    """
    here, there, files = claim_here(run_dir), claim_there(place), place.files()
    remedy = "Name an empty place, or the run's own."
    if there is None or CONFIG not in files:
        others = {*files} - ({CLAIM, PROMPTS} if there is not None else set())  # all that comes before config.yaml
        if others and not _same(here, there):
            some = foreign(min(others), 100)
            raise UserError(
                f"checkpoint.mirror {place.shown} is not empty and no mirror of a run (it holds {some}, and no "
                f"{CONFIG if there is not None else CLAIM}).",
                remedy,
            )
        files = files if _same(here, there) else {}
    elif not _same(here, there):
        raise UserError(
            f"checkpoint.mirror {place.shown} is the mirror of another run than that in {run_dir}.",
            f"{remedy} With an empty run_dir, the run in the mirror goes on there.",
        )
    if here is not None and there is not None and _same(here, there) and there.turn not in (here.turn, here.before):
        raise UserError(
            f"The run in {run_dir} was continued elsewhere: its mirror {place.shown} was last written by {said(there)}.",
            "Start with an empty run_dir, which takes the run from its mirror, or name another mirror for this copy.",
        )
    run = here.run if here is not None else secrets.token_hex(8)
    mine = Claim(run, secrets.token_hex(8), there.turn if there is not None else "", HOST, time.strftime("%F %T%z"))
    keep_claim(run_dir, mine)
    place.put_bytes(CLAIM, json.dumps(asdict(mine), indent=1).encode() + b"\n")
    return mine, files


def _same(here: Claim | None, there: Claim | None) -> bool:
    return here is not None and there is not None and here.run == there.run


def said(claim: Claim) -> str:
    """Who claimed it, for people."""
    return (
        f"{foreign(claim.host or 'an unknown machine', 80)}, which began {foreign(claim.since or 'at an unknown time', 40)}"
    )
