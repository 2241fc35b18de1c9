"""What the trainer reads of generations: kept samples, mapped from files, so that its memory does not grow with them."""

from __future__ import annotations

import bisect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from npd.errors import UserError
from npd.records import KEPT
from npd.store import Store

COLUMNS = ["sample_id", "prompt_ids", "response_ids", "behavior_logprobs", "verdict", "topk_ids", "topk_logprobs"]


def with_large_lists(schema: pa.Schema) -> pa.Schema:
    """64-bit offsets: a part's top-k entries may be more than 32 bits can count. Values keep their part's type."""
    return pa.schema([(f.name, pa.large_list(f.type.value_type) if pa.types.is_list(f.type) else f.type) for f in schema])


class Samples:
    """Kept samples of one generation and of the references, numbered in the order in which parts are taken.

    A part's kept samples are written uncompressed to a file of their own and mapped: of memory each takes the few bytes
    of its lengths.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.path / "cache"
        self._tables: list[pa.RecordBatch] = []
        self._starts: list[int] = []
        self.prompts, self.responses, self.behavior, self.topk_ids, self.topk_logprobs = (Column(self) for _ in range(5))
        self.lengths = np.empty(0, np.int64)
        """[N] tokens of prompt and response."""
        self.response_lengths = np.empty(0, np.int64)
        """[N]"""

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, generation: int, part: int) -> None:
        """Read a part and write its kept samples to a file that `add` maps; one process does it for all.

        Raises:
            UserError: the part is damaged.
        """
        table = self.store.read_part(generation, part, COLUMNS, check=True)
        schema = with_large_lists(table.schema)
        table = table.filter(pc.is_in(table["verdict"], pa.array(KEPT))).cast(schema).combine_chunks()
        with self.store.writing(self._file(generation, part)) as aside, pa.ipc.new_file(str(aside), schema) as file:
            file.write_table(table)

    def _file(self, generation: int, part: int) -> Path:
        return self.folder / f"{self.store.generation(generation).name}-{part:05d}.arrow"

    def add(self, generation: int, part: int) -> np.ndarray:
        """Map a part that was fetched and give the indices of its kept samples."""
        name = self._file(generation, part)
        first = len(self)
        for batch in pa.ipc.open_file(pa.memory_map(str(name))).read_all().to_batches():
            if not len(batch):
                continue
            self._starts.append(len(self))
            self._tables.append(batch)
            lengths = [column.add(batch[at]) for column, at in self._columns()]
            self.lengths = np.concatenate([self.lengths, lengths[0] + lengths[1]])
            self.response_lengths = np.concatenate([self.response_lengths, lengths[1]])
        return np.arange(first, len(self))

    def _columns(self) -> list[tuple[Column, str]]:
        columns = (self.prompts, self.responses, self.behavior, self.topk_ids, self.topk_logprobs)
        names = ("prompt_ids", "response_ids", "behavior_logprobs", "topk_ids", "topk_logprobs")
        return list(zip(columns, names, strict=True))

    def locate(self, i: int) -> tuple[int, int]:
        """(piece, row) of sample i."""
        piece = bisect.bisect_right(self._starts, i) - 1
        return piece, i - self._starts[piece]

    def id(self, i: int) -> str:
        piece, row = self.locate(i)
        return self._tables[piece]["sample_id"][row].as_py()

    def topk(self, samples: list[int]) -> tuple[Tensor, Tensor]:
        """Teacher's top-k ids and log-probabilities [T, K] of the samples' response tokens; K is 0 without a teacher."""
        tokens = int(self.response_lengths[samples].sum())
        ids, logprobs = self.topk_ids.gather(samples, np.int64), self.topk_logprobs.gather(samples, np.float32)
        if tokens == 0 or len(ids) % tokens:
            raise UserError(f"The samples {self.id(samples[0])} ... hold {len(ids)} top-k entries for {tokens} tokens.")
        shape = (tokens, len(ids) // tokens)
        return torch.from_numpy(ids).view(shape), torch.from_numpy(logprobs).view(shape)


class Column:
    """A list column over all pieces; a null list counts as empty."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, column: pa.Array) -> np.ndarray:
        """Add a piece's lists; their lengths."""
        offsets = column.offsets.to_numpy()
        self.pieces.append((offsets, column.values.to_numpy(zero_copy_only=False)))
        return np.diff(offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        piece, row = self.samples.locate(i)
        offsets, values = self.pieces[piece]
        return values[offsets[row] : offsets[row + 1]]

    def gather(self, rows: list[int], dtype: Any) -> np.ndarray:
        return np.concatenate([self[i] for i in rows]).astype(dtype)


def clear_cache(store: Store) -> None:
    """Delete the files that an earlier generation, or a run that was killed, has mapped."""
    shutil.rmtree(store.path / "cache", ignore_errors=True)
