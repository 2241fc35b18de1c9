"""A teacher behind a server: the same readings as by a model in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.errors import RunError, UserError
from npd.models import PROBES, Vocabulary, check_compatible, load_tokenizer
from npd.schedule import derive_seed
from npd.scoring import Advance, Identity, Question, Teacher, TeacherSetting
from npd.scoring.prefill import Reading
from npd.scoring.server import Server, TokenLogprobs
from npd.store.schema import add_answers

CHECK_SECONDS = 5.0  # that a server may be busy before anything has begun
MOST_ROUNDS = 12  # in which a top-k is asked for anew and wider; rows of embeddings that only pad are few, and unlikely


class ServedTeacher(Teacher):
    """Reads and writes on a server, `teacher.concurrency` requests at once."""

    elsewhere = True

    def __init__(self, config: TeacherConfig, setting: TeacherSetting) -> None:
        super().__init__(config, setting)
        self.server = Server(config, setting.say)
        self._context: int | None = None  # 0: not known

    @classmethod
    def suits(cls, config: TeacherConfig) -> bool:
        return config.server is not None

    @classmethod
    def check(cls, config: TeacherConfig, identity: Identity, question: Question) -> list[str]:
        if config.server is None:
            raise UserError(f"The teacher {config.model} is of kind {config.kind}, but it has no server; set one.")
        return check_server(config, question)

    @classmethod
    def plan(cls, config: TeacherConfig, identity: Identity) -> str:
        return f"{config.model} on {config.server}, {config.concurrency} requests at once"

    def read(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Advance | None = None,
    ) -> list[Reading]:
        """As `Teacher.read`.

        Raises:
            UserError: the server refuses, or answers something else than was asked.
            RunError: it does not answer for too long.
        """

        def read(i: int) -> Reading:
            reading = _read(self.server, self.vocabulary, [*contexts[i], *responses[i]], len(contexts[i]), top_k)
            if progress:
                progress(len(responses[i]))
            return reading

        return self.server.each(read, len(responses))

    def write(self, table: pa.Table, sampling: Sampling, seed: int = 0, progress: Advance | None = None) -> pa.Table:
        """As `Teacher.write`; raises as `read`."""
        prompts: list[list[int]] = [
            ids for ids in table["prompt_ids"].to_pylist() for _ in range(sampling.samples_per_prompt)
        ]

        def write(i: int) -> list[int]:
            written = self.server.write(
                prompts[i],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
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

    def context(self) -> int | None:
        if self._context is None:
            said = self.server.models().get(self.config.model, {}).get("max_model_len")
            self._context = said - 1 if type(said) is int and said > 0 else 0  # one token is always written
        return self._context or None

    def stop(self) -> None:
        self.server.stop()


def _read(server: Server, vocabulary: Vocabulary, ids: list[int], start: int, top_k: int) -> Reading:
    """Ask for more than top-k where ids of the teacher alone, which pad its vocabulary, are among them."""
    asked = top_k
    for _ in range(MOST_ROUNDS):
        said = server.read(ids, start, asked)
        shared = [[pair for pair in token.top if pair[0] < vocabulary.size][:top_k] for token in said]
        fewest = min((len(top) for top in shared), default=top_k)
        if fewest == top_k:
            return _reading(said, shared, top_k)
        asked += top_k - fewest
    raise UserError(
        f"Of the {asked} tokens that the teacher on {server.url} ranks highest only {fewest} are the student's too, which "
        f"has {vocabulary.size}: their tokenizers are not the same, or the server's weights are damaged."
    )


def check_server(config: TeacherConfig, question: Question) -> list[str]:
    """See, before anything is generated, that a server can do what a run will ask of it.

    Returns:
        What could not be checked.

    Raises:
        UserError: nothing answers there, it does not serve the model, its tokenizer or context does not fit, or it gives
            fewer log-probabilities than scoring.top_k.
    """
    try:
        return _check(config, question)
    except RunError as error:
        raise UserError(error.what, "Start it, or correct teacher.server.") from None


def _check(config: TeacherConfig, question: Question) -> list[str]:
    tokens, vocabulary = question.prompt + question.response, question.vocabulary
    server = Server(config.model_copy(update={"retry_seconds": min(config.retry_seconds, CHECK_SECONDS)}))
    cards = server.models(patience=0)
    if config.model not in cards:
        names = server.transport.words(", ".join(cards)) or "nothing"
        raise UserError(f"The server {server.url} serves {names}, not {config.model!r}; correct teacher.model.")
    context = cards[config.model].get("max_model_len")
    if type(context) is int and 0 < context < tokens + 1:
        raise UserError(
            f"The longest prompt and response together may have {tokens} tokens, and the server {server.url} reads at most "
            f"{context - 1}. Start it with a higher --max-model-len, or lower data.max_prompt_tokens or "
            "rollout.max_new_tokens."
        )
    notes = _check_tokenizer(config, server, question)
    # The real question, once: it shows a cap on top-k, a wrong key, and whether it is a server of a kind that is known.
    _read(server, vocabulary, [vocabulary.start_id, vocabulary.stop_ids[0]], 1, question.top_k)
    return notes


def _check_tokenizer(config: TeacherConfig, server: Server, question: Question) -> list[str]:
    tokenizer = question.tokenizer
    if config.tokenizer is not None and not question.own:
        theirs = load_tokenizer(ModelConfig(model=config.tokenizer))
        check_compatible(tokenizer, theirs, ("the student", config.tokenizer))
        return []
    for text in (*PROBES, "".join(tokenizer.all_special_tokens)):
        ids = server.tokenize(text)
        if ids is None:
            if question.own:
                return [
                    f"The server {server.url} does not tokenize, so teacher.tokenizer could not be compared with its own."
                ]
            return [
                f"The server {server.url} does not tokenize, so its tokenizer could not be compared with the student's; "
                "teacher.tokenizer would say where the teacher's own lies."
            ]
        mine = tokenizer(text)["input_ids"]
        if ids != mine and question.own:
            raise UserError(
                f"teacher.tokenizer {config.tokenizer} and {config.model} on {server.url} turn the same text {text!r} into "
                f"different ids ({mine[:8]} / {ids[:8]} ...).",
                "Name the tokenizer that the server has.",
            )
        if ids != mine:
            raise UserError(
                f"The student and {config.model} on {server.url} turn the same text {text!r} into different ids "
                f"({mine[:8]} / {ids[:8]} ...). NPD compares the two token by token, so they must share a tokenizer; or set "
                "teacher.align: true and teacher.tokenizer, and positions of two tokenizers meet by bytes."
            )
    return []


def _reading(said: list[TokenLogprobs], top: list[list[tuple[int, float]]], top_k: int) -> Reading:
    """What a server rounded to a little above 0 is 0."""
    pairs = np.array(top, np.float64).reshape(len(said), top_k, 2)
    logprobs = np.array([token.logprob for token in said])
    return Reading(
        np.minimum(logprobs, 0).astype(np.float32),
        pairs[..., 0].astype(np.int32),
        np.minimum(pairs[..., 1], 0).astype(np.float32),
    )
