"""Columns of a part, and how they are written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

REFERENCE = -1
"""The generation of reference responses."""
NO_POLICY = -1
"""The policy_version of text that no student snapshot wrote."""

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
        ("topk_logprobs", pa.list_(pa.float16())),
    ]
)

ALIGNED = pa.schema([("aligned_exact", pa.int32()), ("aligned_merged", pa.int32())])
"""Where a teacher has another tokenizer: how many of a response's tokens met one of its own, and how many several or the
beginning of one. Null in rows of other teachers."""

LATER = pa.schema([("reward", pa.float32()), *ALIGNED])
"""Columns that a part need not have: those of older versions' runs, and of runs that do not ask for them, have not."""

COLUMNS = pa.schema([*SCHEMA, *LATER])
"""All that a part can have."""

# Written byte by byte of like place, which zstd makes smaller than a dictionary of values that hardly repeat
# (benchmarks/scoring.py counts the bytes).
SPLIT = [f"{name}.list.element" for name in ("behavior_logprobs", "topk_ids", "topk_logprobs")]
OTHERS = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in SCHEMA]
OTHERS = [path for path in OTHERS if path not in SPLIT]

SCALARS = [field.name for field in SCHEMA if not pa.types.is_list(field.type)]
"""Columns of one value a response."""


def write_columns(table: pa.Table, path: Path) -> None:
    """Write a part's table with SCHEMA's columns in their order; columns that it lacks are null. Of LATER's, those that it
    has follow."""
    for field in SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    schema = pa.schema([*SCHEMA, *(field for field in LATER if field.name in table.column_names)])
    pq.write_table(
        table.select(schema.names).cast(schema),
        path,
        compression="zstd",
        use_dictionary=OTHERS,
        column_encoding=dict.fromkeys(SPLIT, "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
    )


def count_aligned(path: Path) -> tuple[int, int, int] | None:
    """Positions of a part's file that are exact, merged and left out; None: its teachers have the student's tokenizer."""
    if not set(ALIGNED.names) <= set(pq.read_schema(path).names):
        return None
    table = pq.read_table(path, columns=[*ALIGNED.names, "response_ids"])
    tokens = pc.filter(pc.list_value_length(table["response_ids"]), pc.is_valid(table[ALIGNED.names[0]]))
    exact, merged, read = (int(pc.sum(column).as_py() or 0) for column in (*(table[n] for n in ALIGNED.names), tokens))
    return exact, merged, read - exact - merged


def read_columns(path: Path, names: list[str] | None = None) -> pa.Table:
    """Read a part's columns, in that order (None: all), page checksums verified; of LATER's, those that it lacks are null.

    Raises:
        OSError, ValueError, KeyError, pa.ArrowException: it is damaged, or one of SCHEMA's columns is not there.
    """
    wanted = names
    if names is not None and set(names) & set(LATER.names):
        there = pq.read_schema(path).names
        wanted = [name for name in names if name in there or name not in LATER.names]
    table = pq.read_table(path, columns=wanted, page_checksum_verification=True)
    for name in names or ():
        if name in LATER.names and name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), LATER.field(name).type))
    return table.select(names or [*SCHEMA.names, *(name for name in LATER.names if name in table.column_names)])


def add_answers(
    table: pa.Table,
    responses: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    logprobs: Sequence[Sequence[float]] | None = None,
) -> pa.Table:
    """Add response_ids, behavior_logprobs (if there are any) and finish_reason; N rows with S responses each become N·S."""
    each = len(responses) // len(table)
    rows = [i for i in range(len(table)) for _ in range(each)]
    table = table.take(pa.array(rows, pa.int64())).append_column("response_ids", pa.array(responses, pa.list_(pa.int32())))
    if logprobs is not None:
        table = table.append_column("behavior_logprobs", pa.array(logprobs, pa.list_(pa.float32())))
    reasons = ["stop" if ids[-1] in stop_ids else "length" for ids in responses]
    return table.append_column("finish_reason", pa.array(reasons, pa.string()))


def count_tokens(column: pa.ChunkedArray) -> int:
    """Tokens in a list column."""
    return int(pc.sum(pc.list_value_length(column)).as_py() or 0)
