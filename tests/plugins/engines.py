"""An engine that says what it is told: the same answer to every prompt."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from npd.config import Sampling
from npd.registry import ENGINES
from npd.rollout import Engine, Progress, Request, Weights
from npd.store.schema import add_answers


class Scripted(Engine):
    """Answers with the tokens of `rollout.options.says` and a stop token."""

    exact = True  # there is no model to compare it with

    def take(self, weights: Weights) -> None:
        pass  # whatever the student has learned

    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        stop_ids = self.setting.vocabulary.stop_ids
        says = [*self.setting.config.rollout.options["says"], stop_ids[0]]
        for number, table, _ in requests:
            count = len(table) * sampling.samples_per_prompt
            yield number, add_answers(table, [says] * count, stop_ids, [[-1.0] * len(says)] * count)
            if progress is not None:
                progress(number, count)


ENGINES.register("scripted", Scripted)
