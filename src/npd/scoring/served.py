"""A teacher behind a server: the same readings as by a model in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.errors import RunError, UserError, foreign
from npd.models import PROBES, TALKS, Vocabulary, check_compatible, load_tokenizer, parting
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
    # The real question, once: it shows a cap on top-k, a wrong key, whether it is a server of a kind that is known, and that
    # it reads the tokens that it is sent.
    prompt = [*question.prompt_ids] or [vocabulary.start_id]
    _read(server, vocabulary, [*prompt, vocabulary.stop_ids[0]], len(prompt), question.top_k)
    return notes


def _check_tokenizer(config: TeacherConfig, server: Server, question: Question) -> list[str]:
    tokenizer, named = question.tokenizer, config.tokenizer is not None
    if config.tokenizer is not None and not question.own:
        tokenizer = load_tokenizer(ModelConfig(model=config.tokenizer))
        check_compatible(question.tokenizer, tokenizer, ("the student", config.tokenizer))
    asked = [(text, True) for text in (*PROBES, "".join(tokenizer.all_special_tokens))]
    if question.prompt_ids:  # with what a chat template puts around it
        asked.append((_text(tokenizer, question.prompt_ids), False))
    for text, special in asked:
        ids = server.tokenize(text, special=special)
        if ids is None:
            if question.own:
                return [
                    f"The server {server.url} does not tokenize, so teacher.tokenizer could not be compared with its own."
                ]
            return [] if named else [
                f"The server {server.url} does not tokenize, so its tokenizer could not be compared with the student's; "
                "teacher.tokenizer would say where the teacher's own lies."
            ]  # fmt: skip
        mine = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        if ids == mine or (not special and ids == list(tokenizer(text)["input_ids"])):  # not every server knows the option
            continue
        at = next((i for i, pair in enumerate(zip(mine, ids, strict=False)) if pair[0] != pair[1]), min(len(mine), len(ids)))
        shown, first = foreign(repr(text), 200), max(0, at - 4)
        apart = f"{mine[first : at + 4]} / {ids[first : at + 4]} from token {first}"
        if named:
            raise UserError(
                f"teacher.tokenizer {config.tokenizer} and {config.model} on {server.url} turn the same text {shown} into "
                f"different ids ({apart}).",
                "Name the tokenizer that the server has.",
            )
        raise UserError(
            f"The student and {config.model} on {server.url} turn the same text {shown} into different ids ({apart}). NPD "
            "compares the two token by token, so they must share a tokenizer; or set teacher.align: true and "
            "teacher.tokenizer, and positions of two tokenizers meet by bytes."
        )
    return _template_notes(config, server, question)


def _template_notes(config: TeacherConfig, server: Server, question: Question) -> list[str]:
    """What a person should know where the server's chat template is not the one that prompts are written with."""
    chat = question.chat
    if chat is None or chat.dated:  # the server has today's date
        return []
    for messages in TALKS:
        mine = chat.try_render([dict(message) for message in messages], how="ask")
        theirs = server.tokenize_chat(messages, chat.options) if mine is not None else None
        ids = [] if mine is None else list(chat.tokenizer(mine, add_special_tokens=False)["input_ids"])
        if theirs is None or theirs == ids:
            continue
        mine, other = _text(chat.tokenizer, ids), _text(chat.tokenizer, theirs)
        told = parting(mine, other, (chat.whose, "the server's"))
        return [f"The chat template of {config.model} on {server.url} is not {chat.whose}, which writes the prompts: {told}."]
    return []


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _reading(said: list[TokenLogprobs], top: list[list[tuple[int, float]]], top_k: int) -> Reading:
    """What a server rounded to a little above 0 is 0."""
    pairs = np.array(top, np.float64).reshape(len(said), top_k, 2)
    logprobs = np.array([token.logprob for token in said])
    return Reading(
        np.minimum(logprobs, 0).astype(np.float32),
        pairs[..., 0].astype(np.int32),
        np.minimum(pairs[..., 1], 0).astype(np.float32),
    )
