"""Conversations as a chat template writes them, cut into what a model is asked and what it answers.

One place decides the ids of prompts, of references and of evaluation's questions. A reference is cut out of the rendering of
the whole conversation; where that does not begin with the prompt's own ids (tokens that merge across the border, thoughts
that the template strips), it is put together from the reply and the token that ends a turn, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from npd.errors import UserError, foreign
from npd.prompts.bounded import TooMuch, render
from npd.prompts.fields import Message, check_shown, holds, is_plain, strings

if TYPE_CHECKING:  # to read a run's files, nobody should wait for transformers
    from transformers import PreTrainedTokenizerBase

SENTINEL = "Kestrels"  # a reply that no template takes for anything else
TAG = re.compile(r"<\w+>|\[[A-Z_]+\]")
REPLACE = "Give its tokenizer another chat_template."
THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]")


@dataclass(frozen=True)
class TurnEnd:
    """What a chat template writes behind an assistant's reply."""

    token: int | None = None
    """The token that ends the turn; None: the template writes none, or there is no template."""
    text: str = ""
    """From the reply to that token, itself included."""
    whole: str = ""
    """All of it."""


@dataclass(slots=True)
class Asked:
    """What a model is asked: the text as rendered, its ids, and what both follow from."""

    prompt: str | list[Message]
    text: str
    ids: list[int]
    tools: list[Any] | None = None
    options: Mapping[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        """Does it end within an assistant's turn, which the response goes on with?"""
        return not isinstance(self.prompt, str) and self.prompt[-1]["role"] == "assistant"


class Chat:
    """A tokenizer with its chat template, the template's options, and the tokens that end a response.

    Args:
        options: variables for the template (`data.template_options`).
        now: what the template is told where it asks for the date.
        whose: for messages.
        stop_ids: tokens that end a response besides those of tokenizer and template.

    Raises:
        UserError: the template knows nothing of an option.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None = None,
        *,
        now: datetime | None = None,
        stop_ids: Sequence[int] = (),
        whose: str = "the student's",
    ) -> None:
        self.whose = whose
        self.tokenizer, self.options, self.now = tokenizer, dict(options or {}), now or datetime.now()
        self.template = str(tokenizer.chat_template or "")
        if unknown := self.unknown(self.options):
            raise UserError(
                f"data.template_options has {foreign(', '.join(unknown), 200)}, but {whose} tokenizer has "
                + ("a chat template that knows nothing of it." if self.template else "no chat template.")
            )
        self.dated = "strftime_now" in self.template
        self.end = turn_end(tokenizer, self.options)
        self._eos = tokenizer.eos_token_id  # asking the tokenizer takes its time
        self._bos = str(tokenizer.bos_token or "")
        self._begins = None if tokenizer.bos_token_id is None else [tokenizer.bos_token_id] * 2
        ends = (self._eos, self.end.token, *stop_ids)
        self.stop_ids = frozenset(token for token in ends if token is not None)
        self._shows: dict[str, bool] = {}

    def unknown(self, options: Mapping[str, Any]) -> list[str]:
        """Options that the template knows nothing of."""
        return [name for name in options if not re.search(rf"\b{re.escape(name)}\b", self.template)]

    # -- what is asked

    def ask(
        self,
        where: str,
        prompt: str | list[Message],
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Asked, list[str]]:
        """A prompt as the model reads it, and remarks on what the template leaves out on purpose.

        A string is read as it is. Messages that end with an assistant's turn are left open, for the response to go on with.

        Raises:
            UserError: no template, one that does not take these messages, or does not show a part of them.
        """
        if isinstance(prompt, str):
            return Asked(prompt, prompt, self.ids_of(prompt)), []
        if not self.template:
            raise UserError(
                f"{where} gives its prompt as messages, but {self.whose} tokenizer has no chat template. Give the prompt "
                "as a string, or add a chat_template to the tokenizer."
            )
        text = self._render(where, prompt, tools, options, "open" if prompt[-1]["role"] == "assistant" else "ask")
        remarks = check_shown(where, self, prompt, tools, options, text)
        return Asked(prompt, text, self._encode(text), tools, options), remarks

    def ids_of(self, text: str) -> list[int]:
        """A plain text's ids: one BOS at most in front, and no EOS behind, for the response goes on from here."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if self._begins is not None and ids[:2] == self._begins and text.startswith(self._bos):
            ids = ids[1:]
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def question(self, text: str) -> list[int]:
        """A question's ids: a user's turn through the template, or without one a line of its own."""
        prompt: str | list[Message] = [{"role": "user", "content": text}] if self.template else text + "\n"
        return self.ask("The question", prompt)[0].ids

    # -- what is answered

    def answer(self, where: str, asked: Asked, reply: Message) -> list[int]:
        """A reference as the model would have to write it behind the prompt: it ends with the one stop token it has.

        Raises:
            UserError: the template leaves out a part of it, or the reply holds a stop token itself.
        """
        said = list(strings(reply["content"]))
        if isinstance(asked.prompt, str):
            content = reply["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            return self._cut(where, asked, text, said)
        history, turn = list(asked.prompt), reply
        if asked.is_open:
            opened = history.pop()
            if not (isinstance(opened["content"], str) and isinstance(reply["content"], str)):
                raise UserError(f"{where}: a turn that the completion goes on with must have a string as content.")
            turn = {**opened, **reply, "content": opened["content"] + reply["content"]}
        whole = self._render(where, [*history, turn], asked.tools, asked.options, "closed")
        check_shown(where, self, [*history, turn], asked.tools, asked.options, whole, only=len(history))
        rest = whole.removeprefix(asked.text) if whole.startswith(asked.text) else ""
        body = rest.removesuffix(self.end.whole)
        kept = body if self.end.token is None else rest
        if rest and all(holds(body, text) for text in said) and not THOUGHT.search(asked.text[-200:]):
            return self._cut(where, asked, kept, said)
        base = self._render(where, asked.prompt, asked.tools, asked.options, "closed")
        opening = asked.text[shared(base, asked.text) :]
        if rest and all(holds(opening + body, text) for text in said) and _clash(opening, body) is None:
            return self._cut(where, asked, kept, said)
        if not is_plain(reply) or not isinstance(reply["content"], str):
            at = shared(whole, asked.text)
            raise UserError(
                f"{where}: the chat template writes the conversation with this reply otherwise than the prompt alone, so the "
                f"reply cannot be cut out: they part behind {whole[max(0, at - 40) : at]!r}, where the prompt goes on with "
                f"{asked.text[at:][:60]!r} and the conversation with {whole[at:][:60]!r}.",
                "Set data.template_options so that both agree (a thought does not go with enable_thinking: false), or give "
                "the reply as one string.",
            )
        content = self._after(where, opening, reply["content"])
        return self._cut(where, asked, content + self.end.text, [content])

    def _after(self, where: str, opening: str, content: str) -> str:
        """A reply behind a generation prompt that has begun it already, as some open a thought."""
        begun = opening.rstrip()
        for at in sorted(m.start() for m in TAG.finditer(begun)):
            if content.lstrip().startswith(begun[at:]):
                space = opening[len(begun) :]
                content = content.lstrip()[len(begun) - at :]
                return content.removeprefix(space) if space and content.startswith(space) else content
        if clash := _clash(opening, content):
            raise UserError(f"{where}: the prompt ends with {opening!r}, {clash[0]}.", clash[1])
        return content

    def _cut(self, where: str, asked: Asked, rest: str, said: list[str]) -> list[int]:
        """Ids of what follows the prompt, up to the first stop token; the one that belongs there is put where none is.

        Args:
            said: what the reply says, of which nothing may stand behind a stop token.
        """
        plain = isinstance(asked.prompt, str)
        whole = self.ids_of(asked.text + rest) if plain else self._encode(asked.text + rest)
        prompt_first = whole[: len(asked.ids)] == asked.ids
        ids = whole[len(asked.ids) :] if prompt_first else self._apart(where, asked.ids, whole, rest)
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        ends_itself = not plain and self.end.token is not None
        if len(stops) > ends_itself:
            self._check_stops(where, said, ids[: stops[0]])
        if stops:
            return ids[: stops[0] + 1]
        return [*ids, self.end.token if ends_itself and self.end.token is not None else self._eos]

    def _apart(self, where: str, prompt_ids: list[int], whole: list[int], rest: str) -> list[int]:
        """Ids of a text by itself, where with the prompt before it a token would reach across the border."""
        front = self.tokenizer.eos_token or ""
        fronts = self._encode(front) if front else []
        behind = self._encode(front + rest)
        candidates = [self._encode(rest)]
        if behind[: len(fronts)] == fronts:
            candidates.append(behind[len(fronts) :])  # without the space that some tokenizers put before a text
        wanted = self.decode(whole)
        for ids in candidates:
            if self.decode([*prompt_ids, *ids]) == wanted:
                return ids
        if "".join(self.decode([*prompt_ids, *candidates[0]]).split()) == "".join(wanted.split()):
            return candidates[0]  # white space alone
        raise UserError(
            f"{where}: the completion begins within a token of the prompt, and as tokens of its own it becomes another text: "
            f"{self.decode(candidates[0])[:60]!r}.",
            "Move the border between prompt and completion to the end of a word.",
        )

    def _check_stops(self, where: str, said: list[str], before: list[int]) -> None:
        """See that all of a reply stands before the first stop token."""
        for text in said:
            ids = self._encode(text)
            while ids and (ids[-1] in self.stop_ids or not self.decode(ids[-1:]).strip()):
                ids.pop()
            inside = [token for token in ids if token in self.stop_ids]
            if inside or not holds(self.decode(before), self.decode(ids)):
                name = f"the stop token {self.tokenizer.convert_ids_to_tokens(inside[0])!r}" if inside else "a stop token"
                raise UserError(
                    f"{where}: the completion holds {name} before its end, so what follows would be lost.",
                    "Give one reply without it, or a conversation as messages.",
                )

    # -- the template itself

    def shows(self, key: str) -> bool:
        """Does the template write this field of an assistant's last turn?"""
        if key not in self._shows:
            turn = {"role": "assistant", "content": SENTINEL, key: SENTINEL.upper()}
            self._shows[key] = SENTINEL.upper() in (self.try_render([{"role": "user", "content": "?"}, turn]) or "")
        return self._shows[key]

    def try_render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        how: str = "closed",
    ) -> str | None:
        """The text, or None where the template refuses."""
        try:
            return self._render("", messages, tools, options, how)
        except UserError as error:
            if isinstance(error.__cause__, TooMuch):
                raise
            return None

    def _render(
        self, where: str, messages: list[Message], tools: list[Any] | None, options: Mapping[str, Any] | None, how: str
    ) -> str:
        """`how`: "ask" for the next turn, the last one "open" to be gone on with, or "closed"."""
        now: dict[str, Any] = {"strftime_now": self.now.strftime} if self.dated else {}
        try:
            return render(
                self.tokenizer,
                messages,
                tools=tools,
                add_generation_prompt=how == "ask",
                continue_final_message=how == "open",
                **{**now, **self.options, **(options or {})},
            )
        except TooMuch as error:
            raise UserError(f"{where}: the chat template {error}.", REPLACE) from error
        except Exception as error:  # whatever the template's own code raises
            told = foreign(error) or type(error).__name__
            raise UserError(f"{where}: the chat template does not take these messages: {told}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _clash(opening: str, content: str) -> tuple[str, str] | None:
    """How a reply does not go on from the thought that a generation prompt opened, and the remedy; None: it does."""
    for match in THOUGHT.finditer(opening):
        tag, end = match[0], match[0][0] + "/" + match[0][1:]
        if tag in content:
            remedy = "Take the thought out of the completion, or set data.template_options so that the prompt has none."
            return f"and the completion has another {tag}", remedy
        if end not in opening[match.end() :] and end not in content:
            remedy = "Give completions with their thoughts, or set data.template_options so that the template opens none."
            return f"but the completion has no {end}: a response goes on from within the thought", remedy
    return None


def shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving compares long texts at the speed of memory
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> TurnEnd:
    """What a tokenizer's chat template writes behind an assistant's last turn, found by rendering one.

    Raises:
        UserError: the template passes its bounds.
    """
    if not tokenizer.chat_template:
        return TurnEnd()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
    for messages in (turns, [{"role": "system", "content": "!"}, *turns]):
        try:
            text = render(tokenizer, messages, **(options or {}))
        except TooMuch as error:
            name = foreign(tokenizer.name_or_path, 200)
            raise UserError(f"The chat template{' of ' * bool(name)}{name} {error}.", REPLACE) from error
        except Exception:  # whatever the template's own code raises
            continue
        found, _, tail = text.rpartition(SENTINEL)
        if found:
            break
    else:
        return TurnEnd()
    # Tokens that stand for a text of their own, whether a role names them or not; but no ordinary word.
    added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    names = tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids)
    added |= {name: (number, True) for number, name in zip(tokenizer.all_special_ids, names, strict=True)}
    for only_special in (True, False):
        there = [(tail.find(name), -len(name), name) for name, (_, special) in added.items() if special or not only_special]
        ends = sorted(place for place in there if place[0] >= 0 and place[2])
        if ends:
            at, _, name = ends[0]
            return TurnEnd(added[name][0], tail[: at + len(name)], tail)
    return TurnEnd(None, "", tail)
