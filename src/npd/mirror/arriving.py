"""A run brought down from its mirror to a machine that does not have it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from npd.config import Config, as_begun, config_tree, differing_keys, load_config
from npd.errors import RunError, UserError
from npd.mirror.claim import Claim, claim_here, claim_there, keep_claim, said
from npd.mirror.contents import CLAIM, CONFIG, FINISHED, MANIFEST, needed, numbers
from npd.mirror.place import CREDENTIALS, Place
from npd.observe.display import Display
from npd.records import Manifest
from npd.store import Store, check_places, explained_disk, recorded, sha256, writing
from npd.store.files import beside
from npd.store.names import CHECKPOINT, GENERATION, PART, SNAPSHOT
from npd.store.pointers import point_latest
from npd.store.sealed import SEAL, check_sealed, sealed_facts

AT_ONCE = 8  # files
PAUSE = 0.5  # seconds between looks at what another process brings down

DAMAGED = "Delete it there, with all that lies beside it, and run the same command again."


@dataclass
class Brought:
    """What was brought down."""

    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    step: int | None = None
    """Of the checkpoint that the run goes on from; None: it has none, or is finished."""
    finished: bool = False
    left_out: list[str] = field(default_factory=list)
    """A sentence on each thing that is not what it should be in the mirror, and is left out."""


def is_fresh(run_dir: Path) -> bool:
    """Is there no run here, but for one that was not brought down to its end?"""
    if not run_dir.is_dir():
        return not os.path.lexists(run_dir)
    names = {path.name for path in run_dir.iterdir()}
    if CLAIM in names and CONFIG not in names:
        return True
    return not {name for name in names if name != ".lock" and not (name.startswith(".") and name.endswith(".tmp"))}


def arrive(config: Config, command: str, display: Display) -> None:
    """Before a command looks at its run directory: bring the run down from its mirror, if only that has it.

    Where several processes train, the first brings it down, and the others wait for it.

    Raises:
        UserError: the mirror can't be reached, or holds a run of another configuration or command.
        RunError: it, or the disk here, fails.
    """
    run_dir = Path(config.run_dir)
    if config.checkpoint.mirror is None or not is_fresh(run_dir):
        return
    place, others = Place(config.checkpoint.mirror), os.environ.get("RANK", "0") not in ("", "0")
    with reached(place):
        has_run = CONFIG in place.files()
    if not has_run:
        return
    if others:
        while not (run_dir / CONFIG).exists():
            time.sleep(PAUSE)
        return
    display.say(f"{run_dir} is empty, and {place.shown} holds a run: it is brought down.")
    say_brought(bring_down(place, run_dir, config, command), run_dir, display)


def say_brought(brought: Brought, run_dir: Path, display: Display) -> None:
    """Tell people what was brought down."""
    for sentence in brought.left_out:
        display.say(sentence)
    state = (
        "is finished"
        if brought.finished
        else "has no checkpoint yet"
        if brought.step is None
        else f"is at step {brought.step}"
    )
    display.say(
        f"Brought down {brought.files:,} files ({brought.bytes / 1e6:,.1f} MB) to {run_dir} in {brought.seconds:.1f} s; "
        f"the run {state}."
    )


@contextmanager
def reached(place: Place) -> Iterator[None]:
    """Around the first look at a mirror: what goes wrong is what the user gave.

    Raises:
        UserError: it can't be reached, or may not be read or written.
    """
    try:
        yield
    except RunError as error:
        raise UserError(f"checkpoint.mirror cannot be used. {error.what}.", CREDENTIALS) from error


def bring_down(place: Place, run_dir: Path, config: Config | None = None, command: str = "") -> Brought:
    """Write what a run needs to go on, or a finished one's student and record, into an empty run directory.

    config.yaml comes last: a directory without it holds no run, and what is there is written again. Directories are compared
    with their checksums, parts with their manifest's.

    Args:
        config: what the run has to be made by; None: by any.

    Raises:
        UserError: the run is another one's, or damaged in the mirror.
        RunError: the mirror, or the disk here, fails.
    """
    place.check_apart(run_dir)
    check_places(run_dir)
    began, names = time.time(), place.files()
    check_same(place, config, command)
    there = claim_there(place)
    if there is None:
        raise UserError(f"{place.shown} has no {CLAIM} that names its run.", "Is it the mirror of a run?")
    if (here := claim_here(run_dir)) is not None and here.run != there.run:
        raise UserError(f"{run_dir} has what was brought down of another run than that in {place.shown}.", "Delete it.")
    brought = Brought(finished=FINISHED in names)
    with Store(run_dir).locked():
        keep_claim(run_dir, Claim(there.run, there.turn))
        generation = keep = 0
        if not brought.finished:
            keep = (config or _recorded_config(place)).checkpoint.keep
            brought.step, generation = _newest(place, names, run_dir, brought)
        wanted = list(needed(names, brought.step, generation, keep))
        known = _checksums(place, {f"{name.rpartition('/')[0]}/{MANIFEST}" for name in wanted if name.endswith(PART.suffix)})
        whole = [name for name in wanted[:-1] if name != _checkpoint(brought.step)]
        sealed = [name for name in whole if f"{name}/{SEAL}" in names]
        for name in sealed:
            _bring_sealed(place, names, name, run_dir, brought)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = {
                name: pool.submit(_bring_file, place, name, run_dir, known.get(name)) for name in whole if name not in sealed
            }
            sizes = {name: job.result() for name, job in jobs.items()}
        for name, size in sizes.items():
            if size is None:
                brought.left_out.append(f"{place.shown}/{name} is not what its manifest says; it is made again.")
            else:
                _count(brought, size)
        _point(run_dir)
        if not brought.finished:
            _call_removed(Store(run_dir), generation - keep)
        _count(brought, _bring_file(place, CONFIG, run_dir, None) or 0)
    brought.seconds = time.time() - began
    return brought


def check_same(place: Place, config: Config | None, command: str) -> None:
    """See that a mirror's run is the one that a configuration and a command mean.

    Raises:
        UserError: it is not.
    """
    if config is None:
        return
    with _config_of(place) as folder:
        old = recorded(folder)
        changes = differing_keys(old.tree, config_tree(as_begun(config, old.tree)))
        remedy = "Name another mirror, or put the options back to go on with that run."
        if old.command != command:
            raise UserError(f"checkpoint.mirror {place.shown} holds a run of `npd {old.command}`.", remedy)
        if changes:
            raise UserError(
                f"checkpoint.mirror {place.shown} holds a run that another configuration made: {'; '.join(changes)}."
                f"{old.other_version}",
                remedy,
            )


def mirror_plan(config: Config, command: str) -> str:
    """What a mirror is for a run that is planned: where it is, and whether a run is there.

    Raises:
        UserError: it can't be reached, or holds another run.
    """
    assert config.checkpoint.mirror is not None, "only a mirror that is named is looked at"
    place = Place(config.checkpoint.mirror)
    with reached(place):
        names = place.files()
    if CONFIG not in names:
        return f"{place.shown}, which holds no run yet"
    if not is_fresh(Path(config.run_dir)):
        return f"{place.shown}, which holds a run last written by {said(claim_there(place) or Claim('', ''))}"
    check_same(place, config, command)
    steps = numbers(names, "checkpoints", CHECKPOINT)
    where = "finished" if FINISHED in names else f"at step {steps[-1]}" if steps else "without a checkpoint"
    return f"{place.shown}, whose run ({where}) is brought down to {config.run_dir}"


# -- a mirror's pieces


@contextmanager
def _config_of(place: Place) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="npd-mirror-") as folder:
        with explained_disk(Path(folder)):
            place.fetch(CONFIG, Path(folder) / CONFIG)
        yield Path(folder)


def _recorded_config(place: Place) -> Config:
    with _config_of(place) as folder:
        return load_config(folder / CONFIG)


def _checkpoint(step: int | None) -> str | None:
    return None if step is None else f"checkpoints/{CHECKPOINT.name(step)}"


def _newest(place: Place, names: dict[str, int], run_dir: Path, brought: Brought) -> tuple[int | None, int]:
    """Bring down the newest checkpoint that is whole; its step, and the generation that it stands in."""
    for step in reversed(numbers(names, "checkpoints", CHECKPOINT)):
        name = f"checkpoints/{CHECKPOINT.name(step)}"
        try:
            _bring_sealed(place, names, name, run_dir, brought)
        except UserError as error:
            brought.left_out.append(f"{error.what} The one before is taken.")
            continue
        generation = sealed_facts(run_dir / name, DAMAGED).get("generation")
        return step, generation if type(generation) is int else 0
    return None, 0


def _bring_sealed(place: Place, names: dict[str, int], name: str, run_dir: Path, brought: Brought) -> None:
    """Bring down a directory, whole, or nothing of it.

    Raises:
        UserError: it is not what its checksums say.
    """
    target = run_dir / name
    if target.is_dir():  # of an earlier try
        with suppress(UserError):
            check_sealed(target, "directory", DAMAGED)
            return
    files = [file for file in names if file.startswith(f"{name}/")]
    with writing(target) as aside, ThreadPoolExecutor(AT_ONCE) as pool:
        aside.mkdir()
        jobs = [pool.submit(_fetched(place, file, aside / file.removeprefix(f"{name}/"))) for file in files]
        sizes = [job.result() for job in jobs]
        try:
            facts = check_sealed(aside, "directory", DAMAGED)
        except UserError as error:
            what = error.what.replace(str(aside), f"{place.shown}/{name}")
            raise UserError(what, error.remedy) from error
        for file in files:  # what an upload that was cut short had left there before
            inner = file.removeprefix(f"{name}/")
            if inner != SEAL and inner not in facts["sha256"]:
                (aside / inner).unlink()
    for size in sizes:
        _count(brought, size)


def _fetched(place: Place, name: str, to: Path) -> Callable[[], int]:
    def fetch() -> int:
        with explained_disk(to):
            return place.fetch(name, to)

    return fetch


def _bring_file(place: Place, name: str, run_dir: Path, checksum: str | None) -> int | None:
    """Its bytes; None: it is not what its manifest says, and is left out, to be made again."""
    target = run_dir / name
    if checksum is not None and target.is_file() and sha256(target) == checksum:
        return target.stat().st_size
    with explained_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = beside(target)
        try:
            size = place.fetch(name, aside)
            if checksum is not None and sha256(aside) != checksum:
                return None
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    return size


def _checksums(place: Place, manifests: set[str]) -> dict[str, str]:
    """Checksums of parts by name, as far as there are manifests that can be read."""
    found: dict[str, str] = {}

    def read(name: str) -> None:
        with suppress(ValueError, RecursionError):
            manifest = Manifest.from_json(json.loads(place.read(name) or b"{}"))
            found.update({f"{name.removesuffix(MANIFEST)}{part.file}": part.sha256 for part in manifest.parts})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(read, manifests))
    return found


def _call_removed(store: Store, last: int) -> None:
    """Say in manifests that parts are not there which a run as far as this one has no use for."""
    for generation, _ in GENERATION.within(store.path / "generations"):
        if generation <= last and not store.parts(generation) and (manifest := store.manifest(generation)) is not None:
            store.finish_generation(replace(manifest, removed=True))


def _point(run_dir: Path) -> None:
    """Let LATEST name what is there."""
    for folder, kind in (("policy", SNAPSHOT), ("checkpoints", CHECKPOINT)):
        there = [path for _, path in kind.within(run_dir / folder)]
        if there:
            point_latest(there[-1], kind)


def _count(brought: Brought, size: int) -> None:
    brought.files += 1
    brought.bytes += size
