"""What teacher and student share: token ids, the tokens that start and end a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import transformers
from transformers import PreTrainedTokenizerBase

from npd.errors import UserError

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
        "NPD compares the two models token by token, so they must share a tokenizer: choose models of one family, or save "
        "the teacher's tokenizer into the student's directory if only special tokens differ."
    )
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
        shown = ", ".join(f"{t!r} is {ours.get(t)} / {theirs.get(t)}" for t in different[:3])
        raise UserError(
            f"The tokenizers of {names[0]} and {names[1]} differ in {len(different)} tokens (student's id / teacher's id: "
            f"{shown}). {remedy}"
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


def shared_vocabulary(
    tokenizer: PreTrainedTokenizerBase, *configs: transformers.PreTrainedConfig, stop_ids: Sequence[int] = ()
) -> Vocabulary:
    """The ids that every model has, and the tokens that start and end a response."""
    size = min(config.get_text_config().vocab_size for config in configs)
    eos: list[int] = [tokenizer.eos_token_id, *stop_ids]
    highest = max(tokenizer.get_vocab().values())
    if highest >= size:
        raise UserError(
            f"The tokenizer has token id {highest}, but one of the models has only {size} embeddings: "
            "model and tokenizer do not belong together."
        )
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Vocabulary(size, tuple(sorted(set(eos))), int(start))
