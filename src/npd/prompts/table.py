"""Prompts as token ids in a file that is mapped into memory: a million take disk, and of memory eight bytes each."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SHOWN = 5  # rows named for each reason to leave prompts out
CHUNK = 1024  # prompts held while they are read

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
    ]
)

# Where a teacher reads another prompt than the student, or the same with another tokenizer, a last column has its ids, in its
# own tokens: null where they are the student's own.
TEACHER_PROMPT = "teacher_prompt_ids"
WITH_TEACHERS = SCHEMA.append(pa.field(TEACHER_PROMPT, pa.list_(pa.int32())))

# Several right answers share a cell, apart by a character that no text holds: files of older versions stay readable.
SEPARATOR = "\x1f"
ENTRY = "\x1e"  # begins a cell that holds a reasoning-gym entry as JSON
NO_DIGEST = "0" * 64  # in the place of a file's digest while the digest is taken


@dataclass
class Prompts:
    """Prompts as token ids, and what was left out.

    Columns of `table`, which is mapped from a file: prompt_id, source, prompt_ids, completion_ids (the stop token included;
    null without a reference) and answer (null without one; several right ones as `accepted_answers` reads them, a
    reasoning-gym entry as `reasoning_gym_entry` does). Where a teacher reads some of them otherwise, also teacher_prompt_ids
    (null: as the student).
    """

    table: pa.Table
    rows: int
    """Rows read."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out for it."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Reason or remark -> where the first of its rows stand."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What the user should know of how rows were read -> rows it is true of."""
    templated: int = 0
    """Rows that went through the chat template."""
    made_from: dict[str, Any] = field(default_factory=dict)
    """What the ids follow from, as digests: raw data, tokenizer, options. Empty: made by an older version."""
    date: str | None = None
    """The moment that a chat template was told where it asked for the date (ISO 8601)."""

    def __len__(self) -> int:
        return len(self.table)

    def report(self) -> list[str]:
        """One line a reason: how many rows were left out, and the first of them by name."""
        return [
            f"{count} left out, {reason}: {', '.join(self.places[reason])}" + (", ..." if count > SHOWN else "")
            for reason, count in self.dropped.items()
        ]

    @property
    def notes(self) -> list[str]:
        """One line for each thing to know of how rows were read, with the rows it is true of."""
        notes = [
            f"{text} ({count:,} row{'s' * (count > 1)}, first {self.places[text][0]})."
            for text, count in self.remarks.items()
        ]
        if self.date is not None and self.templated:
            notes.append(f"the chat template asks for the date: this run keeps {self.date[:10]}.")
        return notes

    def leave_out(self, reason: str, where: str) -> None:
        """Count a row that can't be used."""
        self._count(self.dropped, reason, where)

    def remark(self, text: str, where: str) -> None:
        """Count a row that something is to be said of."""
        self._count(self.remarks, text, where)

    def _count(self, counts: dict[str, int], text: str, where: str) -> None:
        counts[text] = counts.get(text, 0) + 1
        if counts[text] <= SHOWN:
            self.places.setdefault(text, []).append(where)

    def rows_at(self, indices: np.ndarray) -> pa.Table:
        """The rows at N indices, in their order; reads nothing else (Table.take joins a whole column's chunks first)."""
        batches = self.table.to_batches()
        ends = np.cumsum([len(batch) for batch in batches])
        order = np.argsort(indices, kind="stable")
        owner = np.searchsorted(ends, indices[order], side="right")
        pieces = []
        for b in np.unique(owner):
            rows = indices[order][owner == b] - (ends[b] - len(batches[b]))
            pieces.append(batches[b].take(pa.array(rows)))
        table = pa.Table.from_batches(pieces, schema=self.table.schema).combine_chunks()
        return table.take(pa.array(np.argsort(order, kind="stable")))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(pc.max(pc.list_value_length(self.table["prompt_ids"])).as_py() or 0)

    @property
    def told_otherwise(self) -> np.ndarray:
        """[N] bool, does a teacher read another prompt than the student?"""
        if TEACHER_PROMPT not in self.table.column_names:
            return np.zeros(len(self.table), bool)
        return pc.is_valid(self.table[TEACHER_PROMPT]).to_numpy()

    @property
    def privileged(self) -> int:
        """Prompts that a teacher reads otherwise than the student."""
        return int(self.told_otherwise.sum())

    @property
    def longest_of_teacher(self) -> int:
        """Tokens of the longest prompt as teachers read it."""
        if not self.privileged:
            return self.longest
        lengths = pc.list_value_length(self.table[TEACHER_PROMPT])
        return int(pc.max(pc.coalesce(lengths, pc.list_value_length(self.table["prompt_ids"]))).as_py() or 0)

    def save(self, path: Path) -> None:
        """Write an Arrow file that `open` maps back; its last, empty batch carries the digest of the whole file."""
        facts = {name: value for name, value in vars(self).items() if name != "table"}
        schema = self.table.schema.remove_metadata()
        with pa.ipc.new_file(str(path), schema.with_metadata({"npd": json.dumps(facts)})) as writer:
            for batch in self.table.to_batches(max_chunksize=CHUNK):
                writer.write_batch(batch)
            last = pa.RecordBatch.from_pylist([], schema=schema)
            writer.write_batch(last, custom_metadata={"sha256": NO_DIGEST})
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            at = content.rfind(NO_DIGEST.encode())
            content[at : at + len(NO_DIGEST)] = hashlib.sha256(content).hexdigest().encode()

    @staticmethod
    def facts(path: Path) -> dict[str, Any]:
        """What a file says of itself, without a look at its rows."""
        facts: dict[str, Any] = json.loads(pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata[b"npd"])
        return facts

    @classmethod
    def open(cls, path: Path) -> Prompts:
        """Map a file that `save` wrote, its digest checked; older versions' files have none.

        Raises:
            ValueError, OSError: the file is damaged.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            table, facts = reader.read_all(), json.loads(reader.schema.metadata[b"npd"])
            if "made_from" in facts:
                last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
                if last.custom_metadata is None or not _is_whole(path, last.custom_metadata[b"sha256"]):
                    raise ValueError("its checksum is another one")
            return cls(table.replace_schema_metadata(), **facts)
        except (KeyError, TypeError, pa.ArrowException) as error:  # what other bytes may look like
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _is_whole(path: Path, said: bytes) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.rfind(said)
        if at < 0:
            return False
        with memoryview(content) as view:
            for piece in (view[:at], NO_DIGEST.encode(), view[at + len(said) :]):
                digest.update(piece)
                if isinstance(piece, memoryview):
                    piece.release()
    return digest.hexdigest().encode() == said


def mapped(path: Path) -> pa.Table:
    """The table of an Arrow file, mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def accepted_answers(answer: str) -> list[str]:
    """The answers of which any one is right, from a cell of column `answer`: none where a reasoning-gym verifier judges."""
    return [] if answer.startswith(ENTRY) else [text for text in answer.split(SEPARATOR) if text.strip()]


def verifiable(answers: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which cells of column `answer` say what is right: bool [N]. An answer of white space alone says nothing."""
    return pc.fill_null(pc.match_substring_regex(answers, rf"[^\s\pZ{SEPARATOR}]"), False)


def reasoning_gym_entry(answer: str) -> dict[str, Any] | None:
    """The reasoning-gym entry (question, answer, metadata) that a cell of column `answer` holds; None: it holds answers."""
    if not answer.startswith(ENTRY):
        return None
    entry: dict[str, Any] = json.loads(answer[len(ENTRY) :])
    return entry


def count_sources(table: pa.Table) -> Counter[str]:
    counts = table["source"].value_counts()
    return Counter(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))
