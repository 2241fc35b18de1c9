"""What a teacher said in an earlier process of a run, or in another one: what it says now is compared with that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from npd.config import Config
from npd.errors import UserError
from npd.generations.generation import Generations
from npd.generations.itself import follows_snapshots
from npd.scoring import Reading
from npd.scoring.contexts import teacher_contexts
from npd.store import Store

COLUMNS = ["source", "response_ids", "topk_ids", "topk_logprobs"]
ENOUGH = 64  # responses


class Earlier(NamedTuple):
    """Answers that are kept in a part."""

    part: str
    contexts: list[list[int]]
    responses: list[list[int]]
    readings: list[Reading]
    """With top-k alone: a part holds no log-probabilities of a response's own tokens."""


def earlier_answers(
    config: Config, store: Store, generations: Generations, key: str | None, generation: int
) -> Earlier | None:
    """What the teacher of a key in `Config.all_teachers` said, in the first whole part of this generation or the one before.

    None: there is none. A teacher that is each generation's snapshot is another one in each.
    """
    for g in (generation,) if follows_snapshots(config, key) else (generation, generation - 1):
        for part in sorted(store.parts(g) & {*range(len(generations.parts(g)))}):
            try:
                table = store.read_part(g, part, COLUMNS, check=True)
            except (UserError, FileNotFoundError):  # whoever takes it will say so
                continue
            keys = [config.teacher_of(source) for source in table["source"].to_pylist()]
            mine = [i for i, k in enumerate(keys) if k == key and table["topk_ids"][i].is_valid][:ENOUGH]
            rows = table.take(mine).to_pylist()
            if rows:
                asked, each = generations.table(g, part), generations.per_prompt(g)
                if len(asked) * each != len(table):  # damaged; it is made again
                    continue
                contexts = teacher_contexts(asked.take(pa.array([i // each for i in mine])))
                responses = [row["response_ids"] for row in rows]
                return Earlier(str(store.part(g, part)), contexts, responses, [_reading(row) for row in rows])
    return None


def _reading(row: dict[str, list[float]]) -> Reading:
    tokens = len(row["response_ids"])
    ids, logprobs = (np.array(row[name]).reshape(tokens, -1) for name in ("topk_ids", "topk_logprobs"))
    return Reading(np.zeros(tokens, np.float32), ids.astype(np.int32), logprobs.astype(np.float32))
