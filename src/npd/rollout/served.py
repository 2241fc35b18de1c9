"""Responses written by a model behind a server: a served teacher's references."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from npd.errors import UserError
from npd.models import Vocabulary
from npd.rollout.answers import add_answers
from npd.schedule import derive_seed
from npd.server import Server


class ServedRollout:
    """Stage: answers each prompt once, adding response_ids and finish_reason; no log-probabilities."""

    def __init__(
        self, server: Server, vocabulary: Vocabulary, *, max_new_tokens: int, temperature: float, top_p: float
    ) -> None:
        self.server, self.vocabulary = server, vocabulary
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p

    def __call__(self, table: pa.Table, seed: int = 0, progress: Callable[[int], None] | None = None) -> pa.Table:
        """Raises UserError or RunError as `Server.ask`."""
        prompts: list[list[int]] = table["prompt_ids"].to_pylist()

        def write(i: int) -> list[int]:
            written = self.server.write(
                prompts[i],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=derive_seed(seed, i) % (1 << 31),
                stop_ids=self.vocabulary.stop_ids,
            )
            if progress:
                progress(1)
            return written

        responses = self.server.each(write, len(prompts))
        highest = max(map(max, responses), default=0)
        if highest >= self.vocabulary.size:
            raise UserError(
                f"The teacher on {self.server.url} wrote token {highest}, but the student has only {self.vocabulary.size}: "
                "their tokenizers are not the same."
            )
        return add_answers(table, responses, self.vocabulary.stop_ids)
