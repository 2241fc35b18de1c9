"""The run directory: every file appears whole, and what is finished is never made twice.

A part is a pure function of (configuration, policy version, part number). Parts are written aside and renamed; the
manifest of a generation is written last and names every part with its checksum. Several processes may work on a run: one
trainer, which holds its lock, and refreshes, which make parts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from npd.config import Config, SelectionConfig, as_begun, config_tree, differing_keys
from npd.errors import UserError
from npd.prompts import Prompts
from npd.records import Line, Manifest, PartEntry
from npd.store import files, metrics
from npd.store.files import (
    HOST,
    abandoned,
    end_last_line,
    explained_full_disk,
    remove_directory,
    sha256,
    write_json,
    write_text,
    writing,
)  # fmt: skip
from npd.store.kept_prompts import PROMPTS, began, keep_prompts
from npd.store.lock import run_lock
from npd.store.provenance import versions
from npd.store.schema import REFERENCE, SCHEMA, write_columns


class Store:
    """Names and states of what lies in a run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir)
        self.student = self.path / "student"
        self.metrics = self.path / "metrics.jsonl"

    # -- the run itself

    def check(self, config: Config, command: str) -> None:
        """See whether a run can start or go on here; changes nothing.

        Raises:
            UserError: the directory belongs to another configuration or command, is not a run's, or is no directory.
        """
        tree = config_tree(config)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir {self.path} is a file; choose a directory.")
        if (old := self._config()) is not None:
            theirs = old.pop("provenance", {}).get("command")
            if theirs != command:
                raise UserError(f"{self.path} holds a run of `npd {theirs}`; choose another run_dir for `npd {command}`.")
            changes = differing_keys(old, tree)
            if changes:
                raise UserError(
                    f"{self.path} was made by another configuration: " + "; ".join(changes) + ". Choose another run_dir, "
                    "put the options back to go on with that run, or delete the directory to start over."
                )
        elif self.path.exists() and any(
            not fnmatch(p.name, ".config.yaml.*.tmp") and p.name != ".lock" for p in self.path.iterdir()
        ):
            raise UserError(f"{self.path} is not empty and holds no run of npd; choose another run_dir.")

    def as_begun(self, config: Config) -> Config:
        """A configuration as the run here was begun, where it leaves that open; see `npd.config.as_begun`."""
        return config if (old := self._config()) is None else as_begun(config, old)

    def _config(self) -> dict[str, Any] | None:
        file = self.path / "config.yaml"
        return None if not file.exists() else self._read(file, lambda: dict(yaml.safe_load(file.read_text(encoding="utf-8"))))

    def open(self, config: Config, command: str) -> None:
        """Start a run here, or go on with the one that is here.

        Raises:
            UserError: as `check`, or the directory cannot be written.
        """
        self.check(config, command)
        file = self.path / "config.yaml"
        self.sweep()
        end_last_line(self.path / "events.jsonl")
        if self.checkpoints():
            self._tidy_checkpoints(config.checkpoint.keep)
        provenance = {"command": command, "versions": versions()}
        tree = config_tree(config) | {"provenance": provenance}
        try:
            write_text(file, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written ({error.strerror}); choose another.") from error

    def selection(self) -> SelectionConfig:
        """The selection that config.yaml has now."""
        tree = self._read(self.path / "config.yaml", lambda: (self._config() or {})["selection"])
        return SelectionConfig.model_validate(tree)

    def sweep(self) -> None:
        """Delete what processes that were killed have left: files half written, and what workers said they were doing."""
        for leftover in (self.path / "logs").glob("*.progress.json"):
            leftover.unlink(missing_ok=True)
        for leftover in list(self.path.rglob(".*.tmp")):
            if abandoned(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Be the only process that trains or changes this run; the system lets go of the lock when the process ends.

        Raises:
            UserError: another process has it, or the directory cannot be written.
        """
        return run_lock(self.path)

    @property
    def finished(self) -> bool:
        return (self.student / "npd.json").exists()

    def _read(self, path: Path, read: Callable[[], Any], remedy: str = "Restore it or start over in another run_dir.") -> Any:
        try:
            return read()
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path} is damaged ({why}).", remedy) from error

    def _point_latest(self, newest: Path) -> None:
        pointer = newest.with_name("LATEST")
        if not pointer.exists() or pointer.read_text() != f"{newest.name}\n":
            write_text(pointer, f"{newest.name}\n")

    # -- policy snapshots

    def policy(self, version: int) -> Path:
        return self.path / "policy" / f"v{version:06d}"

    def policies(self) -> list[int]:
        """Versions whose snapshots are whole, oldest first."""
        return sorted(int(path.name[1:]) for path in (self.path / "policy").glob("v[0-9]*") if path.is_dir())

    def publish(self, version: int, save: Callable[[Path], None], step: int) -> None:
        """Write snapshot `version` whole unless it is there, and point LATEST to the newest.

        Called again after a crash, it does whatever of this was not done.
        """
        if version not in self.policies():
            self.save_model(self.policy(version), save, {"policy_version": version, "step": step})
        self.point_to_newest_policy()

    def point_to_newest_policy(self) -> None:
        self._point_latest(self.policy(self.policies()[-1]))

    def tidy(self, generation: int, keep: int) -> None:
        """Drop old snapshots and generations, now that `generation` is the oldest one that may still be read.

        The newest `keep` of each that are in use or older stay, and so does the first snapshot. A generation that is
        dropped keeps its manifest.
        """
        for version in [v for v in self.policies() if v <= generation][:-keep]:
            if version != 0:
                remove_directory(self.policy(version))
        there = []
        for old in range(generation - keep, -1, -1):
            if self.manifest(old) is not None and not self.parts(old):
                break  # and so are all before it
            there.append(old)
        for old in reversed(there):  # oldest first, so that a crash leaves none behind that this would not look at
            manifest = self.manifest(old)
            if manifest is not None:
                self.finish_generation(replace(manifest, removed=True))
            for part in self.parts(old):
                self.part(old, part).unlink()

    def save_model(self, path: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
        """Write a model directory with its checksums in npd.json."""
        with writing(path) as aside:
            save(aside)
            self._seal(aside, facts)

    def _seal(self, path: Path, facts: dict[str, Any]) -> None:
        """Write npd.json: facts, and the checksums of all that lies beside it."""
        checksums = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
        (path / "npd.json").write_text(json.dumps(facts | {"sha256": checksums}, indent=1) + "\n")

    def check_model(
        self,
        path: Path,
        kind: str = "snapshot",
        remedy: str = "Restore it from a copy, or delete the run directory and start over.",
    ) -> dict[str, Any]:
        """Compare a directory with its checksums in npd.json; returns the facts it was saved with.

        Raises:
            UserError: a file is missing or damaged.
        """
        file = path / "npd.json"
        facts: dict[str, Any] = self._read(file, lambda: json.loads(file.read_text()), remedy)
        checksums: dict[str, str] = self._read(file, lambda: facts["sha256"], remedy)
        for name, expected in checksums.items():
            file = path / name
            if not file.is_file() or sha256(file) != expected:
                why = "not what was written" if file.is_file() else "missing"
                raise UserError(f"The {kind} {path} is damaged: {name} is {why}.", remedy)
        return facts

    # -- generations

    def generation(self, index: int) -> Path:
        return self.path / "generations" / ("references" if index == REFERENCE else f"g{index:03d}")

    def part(self, generation: int, part: int) -> Path:
        return self.generation(generation) / f"part-{part:05d}.parquet"

    def manifest(self, generation: int) -> Manifest | None:
        """The manifest of a finished generation, or None.

        Raises:
            UserError: it is damaged.
        """
        path = self.generation(generation) / "manifest.json"
        remedy = "Delete it and run the same command again: it will be made again from the parts."

        def read() -> Manifest:
            return Manifest.from_json(json.loads(path.read_text()))

        return self._read(path, read, remedy) if path.exists() else None

    @property
    def current(self) -> int:
        """The generation that is trained on: no earlier one need be made."""
        path = self.path / "generations" / "CURRENT"
        return self._read(path, lambda: int(path.read_text()), "Delete it.") if path.exists() else 0

    @current.setter
    def current(self, generation: int) -> None:
        if generation != self.current:
            write_text(self.path / "generations" / "CURRENT", f"{generation}\n")

    def parts(self, generation: int) -> set[int]:
        """Numbers of the parts that are there."""
        return {int(path.stem.removeprefix("part-")) for path in self.generation(generation).glob("part-*.parquet")}

    def missing_parts(self, generation: int, count: int) -> list[int]:
        there = self.parts(generation)
        return [part for part in range(count) if part not in there]

    def write_part(self, generation: int, part: int, table: pa.Table, *, keep_manifest: bool = False) -> None:
        """Write a finished part with the contract's columns in their order; columns a stage did not add are null."""
        path = self.part(generation, part)
        with writing(path) as aside:
            write_columns(table, aside)
        manifest = None if keep_manifest else self.manifest(generation)
        if manifest is not None and {p.file: p.sha256 for p in manifest.parts}.get(path.name) != sha256(path):
            (self.generation(generation) / "manifest.json").unlink()  # made again, and not the same, as on other hardware

    def read_part(self, generation: int, part: int, columns: list[str] | None = None) -> pa.Table:
        """Read a part, verifying its page checksums.

        Raises:
            UserError: the part is damaged.
            FileNotFoundError: it is not there, or no longer.
        """
        path = self.part(generation, part)
        try:
            table = pq.read_table(path, columns=columns, page_checksum_verification=True)
            return table.select(columns or SCHEMA.names)  # names have no checksum
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged_part(path, " ".join(str(error).split())[:200]) from error

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
            UserError: one is damaged or missing.
        """
        entries = []
        for part in range(count):
            path = self.part(generation, part)
            rows = self._read(path, partial(pq.read_metadata, path)).num_rows
            entries.append(PartEntry(path.name, rows, path.stat().st_size, sha256(path)))
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
        prompts: Prompts = self._read(self.path / PROMPTS, lambda: Prompts.open(self.path / PROMPTS), remedy)
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
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps whose checkpoints are whole, oldest first."""
        return sorted(int(p.name.removeprefix("step-")) for p in (self.path / "checkpoints").glob("step-*") if p.is_dir())

    def checkpoint_facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of its place in the run.

        Raises:
            UserError: it is damaged.
        """
        path = self.checkpoint(step)
        remedy = f"Delete {path} and run the same command again: the run goes on from the one before."
        facts: dict[str, Any] = self._read(path / "npd.json", lambda: json.loads((path / "npd.json").read_text()), remedy)
        return facts

    def resumed_generation(self, *, oldest: bool = False) -> int:
        """The generation that a resumed run would go on with, from its newest or its oldest checkpoint."""
        steps = self.checkpoints()
        return int(self.checkpoint_facts(steps[0 if oldest else -1])["generation"]) if steps else 0

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
            with explained_full_disk(path):
                save(aside)
                wait()
                if main:
                    self._seal(aside, facts)
                    files.put(aside, path)
                    self._tidy_checkpoints(keep)
                wait()
        finally:
            if main:
                shutil.rmtree(aside, ignore_errors=True)

    def _tidy_checkpoints(self, keep: int) -> None:
        """Point LATEST to the newest checkpoint and drop those beyond the newest `keep`."""
        steps = self.checkpoints()
        self._point_latest(self.checkpoint(steps[-1]))
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
