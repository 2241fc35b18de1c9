"""What a teacher said in an earlier process of a run, or in another one: what it says now is compared with that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npd.config import Config
from npd.errors import UserError
from npd.generations.generation import Generations
from npd.prompts import OWN_PROMPT
from npd.scoring import Reading
from npd.store import Store

COLUMNS = ["prompt_id", "source", "prompt_ids", "response_ids", "topk_ids", "topk_logprobs"]
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

    None: there is none.
    """
    for g in (generation, generation - 1):
        for part in sorted(store.parts(g)):
            try:
                table = store.read_part(g, part, COLUMNS, check=True)
            except (UserError, FileNotFoundError):  # whoever takes it will say so
                continue
            keys = [config.teacher_of(source) for source in table["source"].to_pylist()]
            mine = [i for i, k in enumerate(keys) if k == key and table["topk_ids"][i].is_valid][:ENOUGH]
            rows = table.take(mine).to_pylist()
            if rows:
                asked = generations.table(g, part)
                own = (
                    dict(zip(*(asked[name].to_pylist() for name in ("prompt_id", OWN_PROMPT)), strict=True))
                    if (OWN_PROMPT in asked.column_names)
                    else {}
                )
                contexts = [own.get(row["prompt_id"]) or row["prompt_ids"] for row in rows]
                responses = [row["response_ids"] for row in rows]
                return Earlier(str(store.part(g, part)), contexts, responses, [_reading(row) for row in rows])
    return None


def _reading(row: dict[str, list[float]]) -> Reading:
    tokens = len(row["response_ids"])
    ids, logprobs = (np.array(row[name]).reshape(tokens, -1) for name in ("topk_ids", "topk_logprobs"))
    return Reading(np.zeros(tokens, np.float32), ids.astype(np.int32), logprobs.astype(np.float32))
