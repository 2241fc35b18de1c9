"""What teacher and student share: token ids, the tokens that start and end a response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from npd.errors import UserError, foreign
from npd.prompts.templates import Chat, shared, turn_end

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading, doubled  spaces\n\n\ttabs and lines\r\n",
    "def f(x: int) -> str:\n    return f'{x!r}'  # café",
    "3.14159 + 2718 = 1000000; 50% of $20 [1/2]",
    "你好，世界。Привет, мир! こんにちは 👩‍🚀 مرحبا",
    "<b>not & markup</b> \\frac{a}{b}",
)


@dataclass(frozen=True)
class Vocabulary:
    """What teacher and student share."""

    size: int
    """Token ids below this exist in both models and their tokenizers agree on them."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    start_id: int
    """The one token in front of a response that is read without its prompt: BOS, else EOS."""


def check_compatible(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Refuse two tokenizers that would give the same ids another meaning; padded vocabularies are no difference.

    Raises:
        UserError: with the first few differences.
    """
    remedy = (
        "NPD compares the two models token by token, so they must share a tokenizer: choose models of one family, save the "
        "teacher's tokenizer into the student's directory if only special tokens differ, or set teacher.align: true, and "
        "positions of two tokenizers meet by bytes."
    )
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
        shown = ", ".join(f"{t!r} is {ours.get(t)} / {theirs.get(t)}" for t in different[:3])
        raise UserError(
            f"The tokenizers of {names[0]} and {names[1]} differ in {len(different)} tokens (student's id / teacher's id: "
            f"{foreign(shown)}). {remedy}"
        )
    for role in ("bos_token", "eos_token", "unk_token"):
        mine, other = getattr(student, role), getattr(teacher, role)
        if mine != other:
            raise UserError(
                f"{names[0]} and {names[1]} treat special tokens differently: {role} is {mine!r} / {other!r}. {remedy}"
            )
    for text in PROBES:
        mine, other = student(text)["input_ids"], teacher(text)["input_ids"]
        if mine != other:
            raise UserError(
                f"{names[0]} and {names[1]} turn the same text {text!r} into different ids ({mine[:8]} / {other[:8]} ...). "
                f"{remedy}"
            )


_QUESTION = {"role": "user", "content": "1 + 1?"}
_TURNS = (_QUESTION, {"role": "assistant", "content": "2"}, _QUESTION)
TALKS = (({"role": "system", "content": "Be brief."}, *_TURNS), _TURNS, (_QUESTION,))
"""Conversations by which chat templates are compared."""


def template_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
) -> str | None:
    """Where two tokenizers' chat templates first write the same conversation differently, in words; None: nowhere.

    A teacher reads what the student's template writes: another format than its own is not what it was made for.
    """
    if student.chat_template == teacher.chat_template or not (student.chat_template and teacher.chat_template):
        return None
    known = {name: value for name, value in (options or {}).items() if name in str(teacher.chat_template)}
    now = Chat(student, options).now
    ours, theirs = Chat(student, options, now=now), Chat(teacher, known, now=now)
    for messages in TALKS:
        mine, other = (chat.try_render([dict(message) for message in messages], how="ask") for chat in (ours, theirs))
        if mine is not None and other is not None and mine != other:
            return parting(mine, other, ("the student's", "the teacher's"))
    return None


def parting(mine: str, other: str, whose: tuple[str, str]) -> str:
    """Where two writings of a conversation part, in words."""
    at = shared(mine, other)
    return f"behind {mine[max(0, at - 20) : at]!r} {whose[0]} writes {mine[at:][:40]!r}, {whose[1]} {other[at:][:40]!r}"


def named_stops(*configs: Any) -> list[int]:
    """The tokens that models' or generation's configurations name as the end of a text."""
    ids: list[int] = []
    for config in configs:
        for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
            named = getattr(part, "eos_token_id", None)
            ids += [] if named is None else named if isinstance(named, list) else [named]
    return list(dict.fromkeys(token for token in ids if isinstance(token, int) and token >= 0))


def stops_of(tokenizer: PreTrainedTokenizerBase, named: Iterable[int], options: Mapping[str, Any] | None = None) -> list[int]:
    """Every token that ends a response: the tokenizer's, the chat template's, and those that configurations name."""
    ids = [tokenizer.eos_token_id, turn_end(tokenizer, options).token, *named]
    return [int(token) for token in dict.fromkeys(ids) if token is not None]


def shared_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    *configs: transformers.PreTrainedConfig,
    stop_ids: Sequence[int] = (),
    template_options: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """The ids that every model has, and the tokens that start and end a response.

    All that says what ends one is joined: the tokenizer, its chat template, the models' configurations, and `stop_ids`.
    """
    size = min(config.get_text_config().vocab_size for config in configs)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= size:
        raise UserError(
            f"The tokenizer has token id {highest}, but one of the models has only {size} embeddings: "
            "model and tokenizer do not belong together."
        )
    stops = [token for token in stops_of(tokenizer, [*stop_ids, *named_stops(*configs)], template_options) if token < size]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Vocabulary(size, tuple(sorted(stops)), int(start))
