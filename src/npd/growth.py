"""What a run takes of a disk, at its peak and in a mirror, against what there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npd.config import Config
from npd.errors import UserError
from npd.hardware import GIB
from npd.placement import engine_beside_training
from npd.preflight import Setup
from npd.registry import ENGINES
from npd.store import REFERENCE, Store, disk_usage

# Bytes on disk of what has no length of its own; measured on runs whose student takes none.
ROW = 192  # a response's identifiers and scalars
PART = 24 << 10  # a part's schema and its columns' headers, and its entry in the manifest
STEP = 2 << 10  # a step's metrics, spans and points of trackers
TOKENIZER = 192  # a token in the tokenizer's files, which every snapshot has
FILES = 64 << 10  # other small files beside weights
REPORT = 4 << 20  # report.html


class Growth(NamedTuple):
    """Bytes; all at most."""

    disk: float
    """Of the run directory at its peak."""
    left: float
    """By which the run directory still grows, from where the run is now."""
    copied: float
    """To a mirror, over the whole run."""


def growth(setup: Setup, steps: int, generations: int, held: float, adapters: float) -> Growth:
    """What a run writes.

    Args:
        steps, generations: of the run; at most.
        held: bytes of the student's weights in training, adapters aside.
        adapters: bytes of adapters, which alone learn; 0 where all weights do.
    """
    config, contents = setup.config, setup.generations
    assert setup.prompts is not None, "only what trains is planned"
    samples, learns = contents.responses(0), adapters or held
    prompts = pc.list_value_length(setup.prompts.table["prompt_ids"]).to_numpy()
    responses = response_lengths(config, setup.prompts.table, given=contents.is_reference(0))
    scored = contents.by_student or contents.mixed
    # Ids, log-probabilities of who wrote them, and the teacher's top-k in 4 + 2 bytes.
    wide = 4 + 4 * contents.by_student + 6 * config.scoring.top_k * scored
    rows = samples * (4 * float(prompts.mean()) + wide * float(responses.mean()) + ROW)
    references = 0.0
    if contents.mixed:
        each = 4 * int(prompts.max()) + (4 + 6 * config.scoring.top_k) * config.response_tokens + ROW
        references = contents.size(REFERENCE) * each
    per_generation = max(1, steps // generations)
    keep, every = config.checkpoint.keep, config.checkpoint.every_steps
    # What is in use: by the oldest checkpoint, by this generation and by the next one; what is older has `keep`.
    in_use = 2 + -(-(keep + 1) * every // per_generation)
    kept = generations if config.schedule.kl_budget is not None else min(generations, keep + in_use)
    files = FILES + TOKENIZER * len(setup.tokens.tokenizer)
    # It has the weights and two moments of what learns.
    checkpoint = held + adapters + 2 * learns + FILES

    def checkpoints_of(steps: int) -> int:
        """How many are written; one comes before each evaluation that takes long."""
        long = any(task.slow for task in setup.tasks)
        return min(steps, steps // every + long * generations * config.schedule.passes)

    def most(generations: int, steps: int, checkpoints: int, first: int) -> float:
        """Of so many generations and steps, with so many checkpoints at once and the `first` snapshot or without."""
        stay = min(generations, kept)
        count = len(contents.parts(0)) * stay + (len(contents.parts(REFERENCE)) if contents.mixed else 0)
        disk = stay * rows + references + PART * count
        disk += rows + references  # the trainer's copy of a generation's kept samples and of the references
        snapshots = (min(generations, kept + 1) + first if contents.by_student else 0) + 1  # and student/
        disk += snapshots * (held + adapters + files)
        disk += adapters + FILES * config.student.adapts  # adapter/
        if _evaluates_files(setup):
            disk += held + adapters + files
        disk += min(checkpoints, checkpoints_of(steps)) * checkpoint
        disk += setup.prompts.table.nbytes + FILES  # type: ignore[union-attr]
        return disk + STEP * steps + (REPORT if config.tracking.report else 0)

    copied = generations * (rows + PART * len(contents.parts(0))) + references + checkpoints_of(steps) * checkpoint
    copied += (2 + (generations - 1) * contents.by_student) * (held + adapters + files) + setup.prompts.table.nbytes
    disk = most(generations, steps, keep + 1, first=1)  # one is written before the oldest goes
    store = Store(config.run_dir)
    done = store.checkpoints()
    try:
        generation = min(store.current, store.resumed_generation())
    except UserError:  # what is damaged is told by who goes on from it
        generation = 0
    if not done:
        return Growth(disk, disk, copied)
    left = most(max(1, generations - generation), max(every, steps - done[-1]), max(1, keep + 1 - len(done)), first=0)
    return Growth(disk, min(disk, left), copied)


def response_lengths(config: Config, prompts: pa.Table, *, given: bool) -> np.ndarray:
    """[N] tokens of each prompt's response: of one that is given, or as many as are allowed."""
    if given and config.data.references == "given":
        given_lengths = pc.fill_null(pc.list_value_length(prompts["completion_ids"]), 0).to_numpy()
        return np.minimum(given_lengths, config.response_tokens)
    return np.full(len(prompts), config.response_tokens)


def _evaluates_files(setup: Setup) -> bool:
    """Is the student that is trained written to files for an engine that evaluates it?"""
    config, placed = setup.config, setup.placement
    if any(task.files for task in setup.tasks):
        return True
    if not (config.evaluation.tasks or config.data.eval):
        return False
    engine = config.rollout.engine if placed.turns else engine_beside_training(config, placed, 1).name
    return bool(ENGINES[engine].holds_weights)


class Room(NamedTuple):
    """A run directory's filesystem, in bytes."""

    needed: float
    """By the run, at its peak."""
    there: int
    """That it has already, where it began before."""
    free: int | None
    """None: not known."""
    left: float = float("inf")
    """By which it still grows, at most."""

    @property
    def more(self) -> float:
        """Bytes beside those that are there."""
        return max(0.0, min(self.needed - self.there, self.left))

    @property
    def lacking(self) -> float:
        """Bytes that are not there."""
        return 0.0 if self.free is None else max(0.0, self.more - self.free)


def room_for(run_dir: str, needed: float, left: float = float("inf")) -> Room:
    """What there is for a run that needs so many bytes at its peak, and from now on no more than `left` of them."""
    path = Path(run_dir)
    usage = disk_usage(path)
    return Room(needed, _size(path), None if usage is None else usage.free, left)


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # it has just gone
                continue
    return total


def disk_row(run_dir: str, room: Room) -> str:
    """For a table: what is needed, and what there is."""
    needs = f"needs at most {gib(room.needed)} at its peak"
    there = f" ({gib(room.there)} are there, at most {gib(room.more)} are to come)" if room.there else ""
    return f"{needs}{there}, {'what is free is not known' if room.free is None else f'{gib(room.free)} free'} at {run_dir}"


def disk_note(run_dir: str, room: Room) -> str:
    """A warning where a disk will not do; else nothing."""
    if not room.lacking:
        return ""
    return (
        f"Warning: the disk of {run_dir} may not do: the run needs at most {gib(room.more)}{' more' * bool(room.there)}, if "
        f"every response is as long as it may be, and {gib(room.lacking)} of that are not free. Free them, choose another "
        "run_dir, or lower checkpoint.keep; a run that fills the disk stops, and goes on once there is room."
    )


def gib(size: float) -> str:
    """A number of bytes for people: in GiB, or in a smaller unit where that would say nothing."""
    unit, name = next(((u, n) for u, n in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")) if size >= u / 10), (1, ""))
    return f"{size / unit:,.2f} {name}" if name else f"{size:.0f} bytes"
