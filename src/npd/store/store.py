"""The run directory: every file appears whole, and what is finished is never made twice.

A part is a pure function of (configuration, policy version, part number). Parts are written aside and renamed; the
manifest of a generation is written last and names every part with its checksum. Several processes may work on a run: one
trainer, which holds its lock, and refreshes, which make parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from npd.config import Config, SelectionConfig, as_begun, config_tree, differing_keys
from npd.errors import UserError, foreign
from npd.prompts import Prompts
from npd.records import Line, Manifest, PartEntry
from npd.store import files, metrics, tidying
from npd.store.answers import wrong_part
from npd.store.disk import explained_disk, gone
from npd.store.files import HOST, read_json, read_or_explain, remove_directory, sha256, write_json, write_text
from npd.store.kept_prompts import PROMPTS, began, keep_prompts
from npd.store.lock import run_lock
from npd.store.names import CHECKPOINT, GENERATION, PART, PROGRESS, REFERENCES, SNAPSHOT, Numbered
from npd.store.places import check_places
from npd.store.pointers import point_latest, read_current
from npd.store.provenance import VARLEN, versions
from npd.store.recorded import CONFIG, record, recorded
from npd.store.schema import REFERENCE, read_columns, write_columns
from npd.store.sealed import check_sealed, seal, sealed_facts

RESTORE = "Restore it from a copy, or delete the run directory and start over."
DELETE_CHECKPOINT = "Delete it and run the same command again: the run goes on from the one before."


class Store:
    """Names and states of what lies in a run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir)
        self.student, self.adapter = self.path / "student", self.path / "adapter"
        self.metrics = self.path / "metrics.jsonl"
        self.vocabulary_size: int | None = None  # token ids of parts lie below it, where it is known
        self.joined = False  # has this process begun to work on the run? Then its directory must stay
        self.mended: list[str] = []  # a sentence on each thing that was damaged when the run was opened, and is whole again

    # -- the run itself

    def check(self, config: Config, command: str) -> None:
        """See whether a run can start or go on here; changes nothing.

        Raises:
            UserError: the directory belongs to another configuration or command, is not a run's, or is no directory.
        """
        tree = config_tree(config)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir {self.path} is a file; choose a directory.")
        check_places(self.path)
        if (self.path / CONFIG).exists():
            old = recorded(self.path)
            if old.command != command:
                theirs = f"{self.path} holds a run of `npd {old.command}`"
                raise UserError(f"{theirs}; choose another run_dir for `npd {command}`.")
            changes = differing_keys(old.tree, tree)
            if changes:
                raise UserError(
                    f"{self.path} was made by another configuration: {'; '.join(changes)}.{old.other_version}",
                    "Choose another run_dir, put the options back to go on with that run, or delete the directory to start "
                    "over.",
                )
        elif self.path.exists() and any(
            not fnmatch(p.name, f".{CONFIG}.*.tmp") and p.name != ".lock" for p in self.path.iterdir()
        ):
            raise UserError(f"{self.path} is not empty and holds no run of npd; choose another run_dir.")

    def as_begun(self, config: Config) -> Config:
        """A configuration as the run here was begun, where it leaves that open; see `npd.config.as_begun`."""
        return as_begun(config, recorded(self.path).tree) if (self.path / CONFIG).exists() else config

    def open(self, config: Config, command: str) -> None:
        """Start a run here, or go on with the one that is here.

        Raises:
            UserError: as `check`, or the directory cannot be written.
        """
        self.check(config, command)
        try:
            self.sweep()
            files.end_last_line(self.path / "events.jsonl")
            if self.checkpoints():
                self._tidy_checkpoints(config.checkpoint.keep)
            provenance = {"command": command, "versions": versions(), VARLEN: not self.began_in_rows}
            record(self.path, config_tree(config), provenance)
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written ({error.strerror}); choose another.") from error
        self.joined = True

    def check_there(self) -> None:
        """See that the directory of a run that this process works on is still there.

        Raises:
            RunError: it was removed or renamed meanwhile.
        """
        if self.joined and not (self.path / CONFIG).exists():
            raise gone(self.path)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """As `npd.store.writing`, for a file of this run: its directory is never made anew.

        Raises:
            RunError: it was removed meanwhile, or its disk is full, read-only or broken.
        """
        self.check_there()
        with files.writing(path) as aside:
            yield aside

    @property
    def began_in_rows(self) -> bool:
        """Was the run here begun by a version that read in rows where attention is auto?"""
        return (self.path / CONFIG).exists() and not recorded(self.path).provenance.get(VARLEN)

    def selection(self) -> SelectionConfig:
        """The selection that config.yaml has now."""
        options = recorded(self.path).tree.get("selection")
        selection: SelectionConfig = read_or_explain(self.path / CONFIG, lambda: SelectionConfig.model_validate(options))
        return selection

    def sweep(self) -> None:
        """Delete what processes that were killed have left: files half written, and what workers said they were doing."""
        for _, leftover in PROGRESS.within(self.path / "logs"):
            files.remove(leftover)
        for leftover in list(self.path.rglob(".*.tmp")):
            if files.abandoned(leftover):
                files.remove(leftover)

    def locked(self) -> AbstractContextManager[None]:
        """Be the only process that trains or changes this run; the system lets go of the lock when the process ends.

        Raises:
            UserError: another process has it, or the directory cannot be written.
        """
        return run_lock(self.path)

    @property
    def finished(self) -> bool:
        return (self.student / "npd.json").exists()

    def _point_latest(self, newest: Path, kind: Numbered) -> None:
        mended = point_latest(newest, kind)
        self.mended += [mended] if mended else []

    # -- policy snapshots

    def policy(self, version: int) -> Path:
        return self.path / "policy" / SNAPSHOT.name(version)

    def policies(self) -> list[int]:
        """Versions whose snapshots are whole, oldest first."""
        return [version for version, path in SNAPSHOT.within(self.path / "policy") if path.is_dir()]

    def publish(self, version: int, save: Callable[[Path], None], step: int) -> None:
        """Write snapshot `version` whole unless it is there, and point LATEST to the newest.

        Called again after a crash, it does whatever of this was not done.
        """
        if version not in self.policies():
            self.save_model(self.policy(version), save, {"policy_version": version, "step": step})
        self.point_to_newest_policy()

    def point_to_newest_policy(self) -> None:
        self._point_latest(self.policy(self.policies()[-1]), SNAPSHOT)

    def tidy(self, generation: int, keep: int) -> None:
        """Drop old snapshots and generations, now that `generation` is the oldest one that may still be read.

        The newest `keep` of each that are in use or older stay, and so does the first snapshot. A generation that is
        dropped keeps its manifest.
        """
        tidying.tidy(self, generation, keep)

    def save_model(self, path: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
        """Write a model directory with its checksums in npd.json."""
        with self.writing(path) as aside:
            save(aside)
            seal(aside, facts)

    def check_model(self, path: Path, kind: str = "snapshot", remedy: str = RESTORE) -> dict[str, Any]:
        """Compare a directory with its checksums in npd.json; returns the facts it was saved with.

        Raises:
            UserError: a file is missing or damaged.
        """
        return check_sealed(path, kind, remedy)

    # -- generations

    def generation(self, index: int) -> Path:
        return self.path / "generations" / (REFERENCES if index == REFERENCE else GENERATION.name(index))

    def part(self, generation: int, part: int) -> Path:
        return self.generation(generation) / PART.name(part)

    def manifest(self, generation: int) -> Manifest | None:
        """The manifest of a finished generation, or None.

        Raises:
            UserError: it is damaged.
        """
        path = self.generation(generation) / "manifest.json"
        remedy = "Delete it and run the same command again: it will be made again from the parts."

        def read() -> Manifest:
            manifest = Manifest.from_json(read_json(path))
            if manifest.generation != generation:
                raise ValueError(f"it is the manifest of generation {manifest.generation}")
            if any(PART.number(part.file) is None for part in manifest.parts):
                raise ValueError("it names parts that are none")
            return manifest

        return read_or_explain(path, read, remedy) if path.exists() else None

    @property
    def current(self) -> int:
        """The generation that is trained on: no earlier one need be made."""
        return read_current(self.path / "generations" / "CURRENT")

    @current.setter
    def current(self, generation: int) -> None:
        if generation != self.current:
            write_text(self.path / "generations" / "CURRENT", f"{generation}\n")

    def parts(self, generation: int) -> set[int]:
        """Numbers of the parts that are there."""
        return {part for part, _ in PART.within(self.generation(generation))}

    def missing_parts(self, generation: int, count: int) -> list[int]:
        there = self.parts(generation)
        return [part for part in range(count) if part not in there]

    def write_part(self, generation: int, part: int, table: pa.Table, *, keep_manifest: bool = False) -> None:
        """Write a finished part with the contract's columns in their order; columns a stage did not add are null."""
        path = self.part(generation, part)
        with self.writing(path) as aside:
            write_columns(table, aside)
        manifest = None if keep_manifest else self.manifest(generation)
        if manifest is not None and {p.file: p.sha256 for p in manifest.parts}.get(path.name) != sha256(path):
            (self.generation(generation) / "manifest.json").unlink()  # made again, and not the same, as on other hardware

    def read_part(self, generation: int, part: int, columns: list[str] | None = None, *, check: bool = False) -> pa.Table:
        """Read a part, verifying its page checksums; with `check`, also that its values are such as a part can hold.

        Raises:
            UserError: the part is damaged.
            FileNotFoundError: it is not there, or no longer.
        """
        path = self.part(generation, part)
        try:
            table = read_columns(path, columns)  # names have no checksum
            if check and (wrong := wrong_part(table, self.vocabulary_size)):
                raise ValueError(wrong)
            return table
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged_part(path, foreign(error, 200)) from error

    def _damaged_part(self, path: Path, why: str) -> UserError:
        remedy = "Delete it and run the same command again: it will be made again, identical."
        return UserError(f"The part {path} is damaged ({why}).", remedy)

    def drop_damaged_parts(self, generation: int) -> list[str]:
        """Delete the parts of a finished generation that are not what its manifest says; their names."""
        manifest = self.manifest(generation)
        damaged = []
        for part in manifest.parts if manifest is not None and not manifest.removed else ():
            path = self.generation(generation) / part.file
            if path.exists() and (path.stat().st_size != part.bytes or sha256(path) != part.sha256):
                path.unlink()
                damaged.append(part.file)
        return damaged

    def part_entries(self, generation: int, count: int) -> tuple[PartEntry, ...]:
        """What a manifest says of a generation's `count` parts.

        Raises:
            UserError: one is damaged.
            FileNotFoundError: one is not there.
        """
        entries = []
        for part in range(count):
            path = self.part(generation, part)
            size, rows = path.stat().st_size, read_or_explain(path, partial(pq.read_metadata, path)).num_rows
            entries.append(PartEntry(path.name, rows, size, sha256(path)))
        return tuple(entries)

    def finish_generation(self, manifest: Manifest) -> None:
        """Write the manifest, the last file of a generation."""
        write_json(self.generation(manifest.generation) / "manifest.json", manifest.to_json())

    def check_generation(self, generation: int) -> Manifest:
        """Compare every part of a finished generation with the manifest's checksums.

        Raises:
            UserError: a part is damaged.
        """
        manifest = self.manifest(generation)
        assert manifest is not None, "only a finished generation is checked"
        for part in manifest.parts:
            path = self.generation(generation) / part.file
            if sha256(path) != part.sha256:
                raise self._damaged_part(path, "its checksum is not the manifest's")
        return manifest

    # -- prompts

    @property
    def began(self) -> datetime | None:
        """The moment that prompts of this run were rendered at, for templates that ask for the date; None: not yet."""
        return began(self.path / PROMPTS)

    def prompts(self) -> Prompts:
        """The prompts of this run, mapped.

        Raises:
            UserError: they are damaged, or not there.
        """
        remedy = "Delete it, and run `npd distill` again on this directory: it will be made again."
        prompts: Prompts = read_or_explain(self.path / PROMPTS, lambda: Prompts.open(self.path / PROMPTS), remedy)
        return prompts

    def keep_prompts(self, prompts: Prompts) -> Prompts:
        """Keep tokenised prompts for whoever makes generations; returns them, mapped from the run directory.

        Those that are there already stay while raw data, tokenizer and options are the same, whatever the template would
        make of them today; a damaged file is made again.

        Raises:
            UserError: the run began with other prompts.
        """
        return keep_prompts(self.path, prompts)

    # -- trainer state

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / CHECKPOINT.name(step)

    def checkpoints(self) -> list[int]:
        """Steps whose checkpoints are whole, oldest first."""
        return [step for step, path in CHECKPOINT.within(self.path / "checkpoints") if path.is_dir()]

    def checkpoint_facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of its place in the run.

        Raises:
            UserError: it is damaged.
        """
        return sealed_facts(self.checkpoint(step), DELETE_CHECKPOINT)

    def resumed_generation(self, *, oldest: bool = False) -> int:
        """The generation that a resumed run would go on with, from its newest or its oldest checkpoint.

        Raises:
            UserError: that is damaged.
        """
        steps = self.checkpoints()
        if not steps:
            return 0
        step = steps[0 if oldest else -1]
        generation = self.checkpoint_facts(step).get("generation")
        if type(generation) is not int or generation < 0:
            raise UserError(f"{self.checkpoint(step)} is damaged (its npd.json names no generation).", DELETE_CHECKPOINT)
        return generation

    def save_checkpoint(
        self,
        step: int,
        save: Callable[[Path], None],
        facts: dict[str, Any],
        keep: int,
        *,
        main: bool,
        wait: Callable[[], None],
    ) -> None:
        """Write a checkpoint; every process writes its own files aside before the main one renames them all."""
        path = self.checkpoint(step)
        aside = path.with_name(f".{path.name}.{HOST}.trainer.tmp")  # one name for all its processes
        try:
            with explained_disk(path):
                self.check_there()
                save(aside)
                wait()
                if main:
                    seal(aside, facts)
                    files.put(aside, path)
                    self._tidy_checkpoints(keep)
                wait()
        finally:
            if main:
                shutil.rmtree(aside, ignore_errors=True)

    def _tidy_checkpoints(self, keep: int) -> None:
        """Point LATEST to the newest checkpoint and drop those beyond the newest `keep`."""
        steps = self.checkpoints()
        self._point_latest(self.checkpoint(steps[-1]), CHECKPOINT)
        for old in steps[:-keep]:
            remove_directory(self.checkpoint(old))

    # -- lines

    def append_metrics(self, line: Line) -> None:
        """Add a line to metrics.jsonl."""
        metrics.append(self.metrics, line)

    def read_metrics(self) -> list[Line]:
        """Every whole line of metrics.jsonl that has a step; what a crash cut short is left out."""
        return metrics.read(self.metrics)

    def rewind_metrics(self, step: int) -> None:
        """Forget what was logged after a checkpoint: those steps will be trained again, and that generation ended."""
        metrics.rewind(self.metrics, step)
