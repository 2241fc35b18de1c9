"""What verifiers said of responses, beside what the rule says: `selection.reward`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npd.errors import RunError
from npd.records import INCORRECT, PROXIMAL, UNANIMOUS, UNVERIFIED

RIGHT = 1.0
"""The reward of a right response; part marks, as some verifiers give for a format, are below it."""


def rewarded(verdicts: npt.NDArray[np.str_], table: pa.Table, reward: str) -> npt.NDArray[np.object_]:
    """Verdicts [N] where selection.reward has its say as well, on those that the rule keeps.

    What the rule drops keeps the rule's verdict. Whether a prompt has right and wrong responses is asked of all that were
    judged, whatever the rule says of them: it is a property of prompt and student.

    Args:
        table: [N] a part, with `prompt_id` and `reward` (float32, null where nothing verifies) unless reward is any. All
            responses to a prompt are in it.

    Raises:
        RunError: a plug-in's rule has taken `reward` away.
    """
    words = verdicts.astype(object)
    if reward == "any":
        return words
    if "reward" not in table.column_names:
        raise RunError(f"selection.reward is {reward}, but the part has no column reward.", "Set scoring.verify: true.")
    rewards = table["reward"].to_numpy(zero_copy_only=False).astype(np.float64)
    judged = ~np.isnan(rewards)
    right = judged & (rewards >= RIGHT)
    kept = words == PROXIMAL
    words[kept & ~judged] = UNVERIFIED
    if reward == "correct":
        words[kept & judged & ~right] = INCORRECT
        return words
    _, prompt = np.unique(table["prompt_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    some_right, some_wrong = (np.bincount(prompt, weights=which) > 0 for which in (right, judged & ~right))
    words[kept & judged & ~(some_right & some_wrong)[prompt]] = UNANIMOUS
    return words
