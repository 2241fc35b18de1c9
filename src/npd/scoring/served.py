"""Scoring by a teacher behind a server: the same readings as by a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from npd.config import ModelConfig, TeacherConfig
from npd.errors import RunError, UserError
from npd.models import PROBES, Vocabulary, check_compatible, load_tokenizer
from npd.scoring.prefill import Reading
from npd.server import Server, TokenLogprobs

CHECK_SECONDS = 5.0  # that a server may be busy before anything has begun


class ServedPrefill:
    """Reads responses behind their contexts on a server, `teacher.concurrency` of them at once."""

    def __init__(self, server: Server, vocabulary: Vocabulary) -> None:
        self.server, self.vocabulary = server, vocabulary

    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reading]:
        """As `Prefill`: log-probabilities of every response token, and the model's top-k at its position.

        Raises:
            UserError: the server refuses, or answers something else than was asked.
            RunError: it does not answer for too long.
        """

        def read(i: int) -> Reading:
            reading = self._read([*contexts[i], *responses[i]], len(contexts[i]), top_k)
            if progress:
                progress(len(responses[i]))
            return reading

        return self.server.each(read, len(responses))

    def _read(self, ids: list[int], start: int, top_k: int) -> Reading:
        """Ask for more than top-k where ids of the teacher alone, which pad its vocabulary, are among them."""
        asked = top_k
        while True:
            said = self.server.read(ids, start, asked)
            shared = [[pair for pair in token.top if pair[0] < self.vocabulary.size][:top_k] for token in said]
            fewest = min((len(top) for top in shared), default=top_k)
            if fewest == top_k:
                return _reading(said, shared, top_k)
            asked += top_k - fewest


def check_server(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, top_k: int, tokens: int, vocabulary: Vocabulary
) -> list[str]:
    """See, before anything is generated, that a server can do what a run will ask of it.

    Args:
        tokens: of the longest prompt and response together.

    Returns:
        What could not be checked.

    Raises:
        UserError: nothing answers there, it does not serve the model, its tokenizer or context does not fit, or it gives
            fewer log-probabilities than scoring.top_k.
    """
    try:
        return _check(config, tokenizer, top_k, tokens, vocabulary)
    except RunError as error:
        raise UserError(error.what, "Start it, or correct teacher.server.") from None


def _check(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, top_k: int, tokens: int, vocabulary: Vocabulary
) -> list[str]:
    server = Server(config.model_copy(update={"retry_seconds": min(config.retry_seconds, CHECK_SECONDS)}))
    cards = server.models(patience=0)
    if config.model not in cards:
        raise UserError(
            f"The server {server.url} serves {', '.join(cards) or 'nothing'}, not {config.model!r}; correct teacher.model."
        )
    context = cards[config.model].get("max_model_len")
    if isinstance(context, int) and tokens + 1 > context:
        raise UserError(
            f"The longest prompt and response together may have {tokens} tokens, and the server {server.url} reads at most "
            f"{context - 1}. Start it with a higher --max-model-len, or lower data.max_prompt_tokens or "
            "rollout.max_new_tokens."
        )
    notes = _check_tokenizer(config, server, tokenizer)
    # The real question, once: it shows a cap on top-k, a wrong key, and whether it is a server of a kind that is known.
    ServedPrefill(server, vocabulary)([[vocabulary.start_id]], [[vocabulary.stop_ids[0]]], top_k)
    return notes


def _check_tokenizer(config: TeacherConfig, server: Server, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if config.tokenizer is not None:
        theirs = load_tokenizer(ModelConfig(model=config.tokenizer))
        check_compatible(tokenizer, theirs, ("the student", config.tokenizer))
        return []
    for text in (*PROBES, "".join(tokenizer.all_special_tokens)):
        ids = server.tokenize(text)
        if ids is None:
            return [
                f"The server {server.url} does not tokenize, so its tokenizer could not be compared with the student's; "
                "teacher.tokenizer would say where the teacher's own lies."
            ]
        mine = tokenizer(text)["input_ids"]
        if ids != mine:
            raise UserError(
                f"The student and {config.model} on {server.url} turn the same text {text!r} into different ids "
                f"({mine[:8]} / {ids[:8]} ...). NPD compares the two token by token, so they must share a tokenizer."
            )
    return []


def _reading(said: list[TokenLogprobs], top: list[list[tuple[int, float]]], top_k: int) -> Reading:
    pairs = np.array(top, np.float64).reshape(len(said), top_k, 2)
    logprobs = np.array([token.logprob for token in said], np.float32)
    return Reading(logprobs, pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float32))
