"""What every engine adds to a table of prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa


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
