"""A run copied to a mirror, or brought down from one, by hand: `npd sync`."""

from __future__ import annotations

from pathlib import Path

from npd.config import load_config
from npd.errors import UserError, foreign
from npd.mirror.arriving import bring_down, is_fresh, reached, say_brought
from npd.mirror.contents import CONFIG
from npd.mirror.keeping import Mirror
from npd.mirror.place import Place
from npd.observe.display import Display
from npd.observe.events import Events
from npd.store import Store, check_places


def synchronise(source: str, target: str, display: Display) -> None:
    """Copy a run directory to a mirror, or bring the run in a mirror down to an empty directory.

    Raises:
        UserError: not one of the two is a URI, there is no run in the source, or the target is another's.
        RunError: the store fails, or the disk here.
    """
    if ("://" in source) == ("://" in target):
        raise UserError(
            f"Of {foreign(source, 200)!r} and {foreign(target, 200)!r} one must be a run directory here and one a URI.",
            "A mirror on a disk of this machine is named by file:///PATH.",
        )
    if "://" in target:
        _up(Path(source), target, display)
    else:
        _down(source, Path(target), display)


def _up(run_dir: Path, uri: str, display: Display) -> None:
    check_places(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} holds no run.")
    config = load_config(run_dir / "config.yaml", {"run_dir": str(run_dir), "checkpoint.mirror": uri})
    with Store(run_dir).locked():
        mirror = Mirror(config, display, Events(run_dir / "events.jsonl", "sync"))
        mirror.copies.claim()
        mirror.close(None)


def _down(uri: str, run_dir: Path, display: Display) -> None:
    if not is_fresh(run_dir):
        raise UserError(f"{run_dir} is not empty, and a run is brought down to an empty directory only.")
    place = Place(uri)
    with reached(place):
        has_run = CONFIG in place.files()
    if not has_run:
        raise UserError(f"{place.shown} holds no run.")
    say_brought(bring_down(place, run_dir), run_dir, display)
