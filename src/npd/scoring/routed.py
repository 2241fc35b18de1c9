"""Several teachers: each row goes to the one that its source names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

Stage = Callable[..., pa.Table]


class Routed:
    """Stage: every row goes through the stage of its source; rows keep their order, and stages may not change their number.
    Columns that only some stages add are null elsewhere.

    Args:
        key_of: source -> which stage.
        stage_of: gives a stage when it is needed.
    """

    def __init__(self, key_of: Callable[[str], Any], stage_of: Callable[[Any], Stage]) -> None:
        self.key_of, self.stage_of = key_of, stage_of

    def __call__(self, table: pa.Table, *args: Any) -> pa.Table:
        """`args` go to each stage."""
        keys = [self.key_of(source) for source in table["source"].to_pylist()]
        different = list(dict.fromkeys(keys))
        if len(different) == 1:
            return self.stage_of(different[0])(table, *args)
        rows = [np.flatnonzero([key == k for key in keys]) for k in different]
        pieces = [self.stage_of(k)(table.take(pa.array(mine)), *args) for k, mine in zip(different, rows, strict=True)]
        return pa.concat_tables(pieces, promote_options="default").take(
            pa.array(np.argsort(np.concatenate(rows), kind="stable"))
        )
