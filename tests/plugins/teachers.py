"""A teacher that is a table: how often each token follows another one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from npd.config import TeacherConfig
from npd.registry import TEACHERS
from npd.scoring import Reading, Teacher, TeacherSetting


class Bigrams(Teacher):
    """Reads log-probabilities out of a JSON file [V, V]: row i is what follows token i. Its `model` is the file."""

    def __init__(self, config: TeacherConfig, setting: TeacherSetting) -> None:
        super().__init__(config, setting)
        self.table = np.array(json.loads(Path(config.model).read_text()), np.float32)

    def read(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reading]:
        readings = []
        for context, response in zip(contexts, responses, strict=True):
            rows = self.table[[context[-1], *response[:-1]]]
            best = np.argsort(-rows[:, : self.vocabulary.size], axis=1)[:, :top_k].astype(np.int32)
            readings.append(Reading(rows[range(len(response)), response], best, np.take_along_axis(rows, best, 1)))
        return readings


TEACHERS.register("bigrams", Bigrams)
