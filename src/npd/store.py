"""The run directory: every file appears whole, and what is finished is never made twice.

A part is a pure function of (configuration, policy version, part number). Parts are written aside and renamed; the
manifest of a generation is written last and names every part with its checksum.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from npd.config import Config, config_tree, differing_keys
from npd.errors import RunError, UserError

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("policy_version", pa.int32()),
        ("finish_reason", pa.string()),
        ("student_nll", pa.float32()),
        ("student_nll_free", pa.float32()),
        ("teacher_nll", pa.float32()),
        ("teacher_nll_free", pa.float32()),
        ("ifd_student", pa.float32()),
        ("ifd_teacher", pa.float32()),
        ("delta_ifd", pa.float32()),
        ("verdict", pa.string()),
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_logprobs", pa.list_(pa.float32())),
    ]
)

MANIFEST_KEYS = {"generation", "rows", "parts", "policy_version", "selection"}

PACKAGES = ("npd", "torch", "transformers", "accelerate", "peft", "pyarrow", "tokenizers")


@contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """A full disk as one paragraph."""
    try:
        yield
    except Exception as error:
        # Not only OSError: safetensors and Arrow wrap the system's error in types of their own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RunError(
                f"The disk is full: {path} could not be written. Nothing that was finished is lost: free some space and "
                "run the same command again, it goes on from here."
            ) from error
        raise


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path` (a file or a directory), renamed to it once whole and on disk.

    Raises:
        RunError: the disk is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            _put(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _put(aside: Path, path: Path) -> None:
    """Flush what was written aside to the disk, then rename it to its place."""
    for file in [aside] if aside.is_file() else sorted(f for f in aside.rglob("*") if f.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        remove_directory(path)
    os.replace(aside, path)


def remove_directory(path: Path) -> None:
    """Rename, then delete, so that half of a directory is never taken for a whole one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    os.replace(path, aside)
    shutil.rmtree(aside)


def write_text(path: Path, text: str) -> None:
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


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
        file = self.path / "config.yaml"
        tree = config_tree(config)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir {self.path} is a file; choose a directory.")
        if file.exists():
            old = self._read(file, lambda: dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
            theirs = old.pop("provenance", {}).get("command")
            if theirs != command:
                raise UserError(f"{self.path} holds a run of `npd {theirs}`; choose another run_dir for `npd {command}`.")
            changes = differing_keys(old, tree)
            if changes:
                raise UserError(
                    f"{self.path} was made by another configuration: " + "; ".join(changes) + ". Choose another run_dir, "
                    "put the options back to go on with that run, or delete the directory to start over."
                )
        elif self.path.exists() and any(not fnmatch(p.name, f".{file.name}.*.tmp") for p in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run of npd; choose another run_dir.")

    def open(self, config: Config, command: str) -> None:
        """Start a run here, or go on with the one that is here.

        Raises:
            UserError: as `check`, or the directory cannot be written.
        """
        self.check(config, command)
        file = self.path / "config.yaml"
        for leftover in list(self.path.rglob(".*.tmp")):  # of a process that was killed while writing
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if self.checkpoints():
            self._tidy_checkpoints(config.checkpoint.keep)
        provenance = {"command": command, "versions": versions()}
        tree = config_tree(config) | {"provenance": provenance}
        try:
            write_text(file, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written ({error.strerror}); choose another.") from error

    @property
    def finished(self) -> bool:
        return (self.student / "npd.json").exists()

    def _read(self, path: Path, read: Callable[[], Any], remedy: str = "Restore it or start over in another run_dir.") -> Any:
        try:
            return read()
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}). {remedy}"
            ) from error

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

    def publish(self, version: int, save: Callable[[Path], None], step: int, keep: int) -> None:
        """Write snapshot `version` whole unless it is there, point LATEST to the newest, and drop older ones than `keep`.

        Called again after a crash, it does whatever of this was not done.
        """
        if version not in self.policies():
            self.save_model(self.policy(version), save, {"policy_version": version, "step": step})
        versions = self.policies()
        self._point_latest(self.policy(versions[-1]))
        for old in [v for v in versions if v <= version][:-keep]:
            if old != 0:
                remove_directory(self.policy(old))

    def save_model(self, path: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
        """Write a model directory with its checksums in npd.json."""
        with writing(path) as aside:
            save(aside)
            self._seal(aside, facts)

    def _seal(self, path: Path, facts: dict[str, Any]) -> None:
        """Write npd.json: facts, and the checksums of all that lies beside it."""
        checksums = {file.name: sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
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
                raise UserError(f"The {kind} {path} is damaged: {name} is {why}. {remedy}")
        return facts

    # -- generations

    def generation(self, index: int) -> Path:
        return self.path / "generations" / f"g{index:03d}"

    def part(self, generation: int, part: int) -> Path:
        return self.generation(generation) / f"part-{part:05d}.parquet"

    def manifest(self, generation: int) -> dict[str, Any] | None:
        """The manifest of a finished generation, or None."""
        path = self.generation(generation) / "manifest.json"

        def read() -> dict[str, Any]:
            manifest: dict[str, Any] = json.loads(path.read_text())
            if not manifest.keys() >= MANIFEST_KEYS:
                raise ValueError(f"it lacks {', '.join(sorted(MANIFEST_KEYS - manifest.keys()))}")
            return manifest

        remedy = "Delete it and run the same command again: it will be made again from the parts."
        return self._read(path, read, remedy) if path.exists() else None

    def missing_parts(self, generation: int, count: int) -> list[int]:
        return [part for part in range(count) if not self.part(generation, part).exists()]

    def write_part(self, generation: int, part: int, table: pa.Table) -> None:
        """Write a finished part with the contract's columns in their order; columns a stage did not add are null."""
        for field in SCHEMA:
            if field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(SCHEMA.names).cast(SCHEMA)
        with writing(self.part(generation, part)) as aside:
            pq.write_table(table, aside, compression="zstd", write_page_checksum=True)

    def read_part(self, generation: int, part: int, columns: list[str] | None = None) -> pa.Table:
        """Read a part, verifying its page checksums.

        Raises:
            UserError: the part is damaged.
        """
        path = self.part(generation, part)
        try:
            return pq.read_table(path, columns=columns, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged_part(path, " ".join(str(error).split())[:200]) from error

    def _damaged_part(self, path: Path, why: str) -> UserError:
        return UserError(
            f"The part {path} is damaged ({why}). Delete it and run the same command again: it will be made again, identical."
        )

    def finish_generation(self, generation: int, count: int, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, the last file of a generation."""
        parts = []
        for part in range(count):
            path = self.part(generation, part)
            rows = self._read(path, partial(pq.read_metadata, path)).num_rows
            parts.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)})
        manifest = {"generation": generation, "rows": sum(p["rows"] for p in parts), "parts": parts} | facts
        write_json(self.generation(generation) / "manifest.json", manifest)
        return manifest

    def check_generation(self, generation: int) -> dict[str, Any]:
        """Compare every part of a finished generation with the manifest's checksums.

        Raises:
            UserError: a part is damaged.
        """
        manifest = self.manifest(generation)
        assert manifest is not None, "only a finished generation is checked"
        for part in manifest["parts"]:
            path = self.generation(generation) / part["file"]
            if sha256(path) != part["sha256"]:
                raise self._damaged_part(path, "its checksum is not the manifest's")
        return manifest

    # -- trainer state

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps whose checkpoints are whole, oldest first."""
        return sorted(int(p.name.removeprefix("step-")) for p in (self.path / "checkpoints").glob("step-*") if p.is_dir())

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
        aside = path.with_name(f".{path.name}.tmp")
        try:
            with explained_full_disk(path):
                save(aside)
                wait()
                if main:
                    self._seal(aside, facts)
                    _put(aside, path)
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

    def append_metrics(self, line: dict[str, Any]) -> None:
        with explained_full_disk(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; a line that a crash cut short is left out."""
        lines = []
        if self.metrics.exists():
            for text in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Forget what was logged after a checkpoint: those steps will be trained again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
