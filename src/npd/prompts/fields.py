"""Does the text that a chat template made of messages hold all that they say?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from npd.errors import UserError, foreign
from npd.inputs import parse_json

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
LINKS = ("tool_call_id", "id", "type", "index")  # say which call a result belongs to, or what kind of thing something is
THOUGHT = re.compile(r"(?s)^.*</(?:think|thinking|thought|reasoning)>|^.*\[/THINK\]")


class Renders(Protocol):
    """What renders messages: `templates.Chat`."""

    def try_render(
        self, messages: list[Message], tools: list[Any] | None = None, options: Mapping[str, Any] | None = None, how: str = ""
    ) -> str | None: ...

    def shows(self, key: str) -> bool: ...


def is_plain(message: Message) -> bool:
    """Has a message no more than a role and a content?"""
    return message.keys() <= {"role", "content"}


def strings(value: Any) -> Iterator[str]:
    """Every text in a value that says something, in its order; what only links parts to each other says nothing."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in LINKS:
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def count(text: str, said: str) -> int:
    """How often a text holds another, whatever a template did to its white space, or written as JSON."""
    squeezed = "".join(text.split())
    quoted = [json.dumps(said.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    quoted += [json.dumps(form)[1:-1] for form in quoted]
    return max(text.count(said.strip()), *(squeezed.count("".join(form.split())) for form in (said, *quoted)))


def holds(text: str, said: str, times: int = 1) -> bool:
    """Does a text hold another so many times, as `count` counts?"""
    return text.count(said.strip()) >= times or count(text, said) >= times


def check_shown(
    where: str,
    chat: Renders,
    messages: list[Message],
    tools: list[Any] | None,
    options: Mapping[str, Any] | None,
    text: str,
    only: int | None = None,
) -> list[str]:
    """See that a rendering shows every message, every field of it, and the tools.

    Args:
        only: look at the fields of this message alone (its content is the caller's affair).

    Returns:
        Remarks on what a template leaves out by design: thoughts of earlier turns.

    Raises:
        UserError: something is not there; the message names it.
    """
    remarks = [] if only is not None else _check_contents(where, messages, text)
    how = "closed" if only is not None else "open" if messages[-1]["role"] == "assistant" else "ask"
    for i, message in enumerate(messages):
        if is_plain(message) or only not in (None, i):
            continue
        for key in sorted(message.keys() - {"role", "content", *LINKS}):
            rest = {name: value for name, value in message.items() if name != key}
            without = chat.try_render([*messages[:i], rest, *messages[i + 1 :]], tools, options, how)
            if _differs(text, without, message[key]):
                continue
            if message["role"] == "assistant" and i < len(messages) - 1 and key in THOUGHTS and chat.shows(key):
                remarks.append("the chat template leaves out the thoughts of earlier turns")
            elif not (key == "name" and message["role"] in ("tool", "function") and _called(messages[:i], message[key])):
                raise _not_shown(where, f"`{key}` of message {i + 1} (role {message['role']})", message[key])
    if tools and only is None:
        without = chat.try_render(messages, None, options, how)
        names = [tool.get("function", tool).get("name") if isinstance(tool, dict) else None for tool in tools]
        if not _differs(text, without, [name for name in names if name]):
            raise _not_shown(where, "`tools`", tools)
    return remarks


def _check_contents(where: str, messages: list[Message], text: str) -> list[str]:
    remarks = []
    said: list[str] = []
    for i, message in enumerate(messages):
        for content in strings(message["content"]):
            said.append(content)
            if holds(text, content, said.count(content)):
                continue
            rest = THOUGHT.sub("", content)
            if message["role"] == "assistant" and rest != content and holds(text, rest):
                remarks.append("the chat template leaves out the thoughts of earlier turns")
            else:
                raise _not_shown(where, f"the content of message {i + 1} (role {message['role']})", content)
        if isinstance(message["content"], list) and str(message["content"]) in text:
            raise UserError(
                f"{where}: message {i + 1} has its content in parts, which the chat template does not know.",
                "Give it as one string.",
            )
    return remarks


def _differs(text: str, without: str | None, value: Any) -> bool:
    """Does a rendering show every text of a field's value, and another one without it fewer?"""
    if without == text:
        return False
    pieces = [piece for said in strings(value) for piece in strings(_json(said))]
    return all(count(text, piece) > (0 if without is None else count(without, piece)) for piece in pieces)


def _json(said: str) -> Any:
    """What a text that is JSON holds, as arguments of calls are written; else the text itself."""
    if said.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(said)
        except ValueError:
            pass
    return said


def _called(earlier: list[Message], name: Any) -> bool:
    """Did an earlier turn call a tool of this name? Then the call shows it."""
    calls = [call for message in earlier for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return any(call.get("function", call).get("name") == name for call in calls)


def _not_shown(where: str, what: str, value: Any) -> UserError:
    return UserError(
        f"{where}: the chat template does not show {foreign(what, 120)}: "
        f"{foreign(json.dumps(value, ensure_ascii=False, default=str), 80)}",
        "Take it out of the row, or give that tokenizer a template that writes it.",
    )
