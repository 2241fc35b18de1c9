"""Rows in the layouts that people bring, as a prompt and what belongs to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from npd.errors import UserError, foreign
from npd.inputs import Unreadable, is_deeper, is_missing, is_text, parse_json, reason
from npd.prompts.fields import Message
from npd.prompts.table import ENTRY, SEPARATOR

COLUMNS = ("prompt", "completion", "messages", "answer", "source", "tools", "teacher_prompt", "reasoning_gym")

# Names in data without `prompt` and `messages`, as public datasets have them.
CONVERSATIONS = ("conversations", "conversation")
QUESTIONS = ("instruction", "question", "problem", "query")
INPUTS = ("input", "context")
REPLIES = ("output", "response", "solution")
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
}
# Every name that a layout looks for. Of other columns only the name is read, whatever type they have.
USED = frozenset((*COLUMNS, *CONVERSATIONS, *QUESTIONS, *INPUTS, *REPLIES, "system", "history", "chat_template_kwargs"))
DEEPEST = 64  # lists and objects in each other, in what a template is given

PYTHON_NOTATION = (
    "It is written in Python's own notation, as pandas writes lists to CSV: write it with json.dumps, or save Parquet."
)

Remark = Callable[[str], None]


@dataclass(slots=True)
class Row:
    """What a row says, its shape checked, nothing rendered yet."""

    where: str
    prompt: str | list[Message]
    completion: Message | None = None
    answer: str | None = None
    source: str = ""
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None
    teacher_prompt: str | list[Message] | None = None

    @property
    def is_empty(self) -> bool:
        """Is there nothing to answer?"""
        if isinstance(self.prompt, str):
            return not self.prompt.strip()
        return not any(m.keys() - {"role", "content"} or str(m["content"] or "").strip() for m in self.prompt)


def read_row(where: str, record: Mapping[str, Any], columns: Mapping[str, str], *, chat: bool, remark: Remark) -> Row:
    """A record as a row.

    Args:
        columns: the record's own names for `prompt`, `completion`, ... (`data.columns`).
        chat: does the tokenizer have a chat template? A layout's question then goes through it, else it is a line.
        remark: told what the user should know of how this row is read.

    Raises:
        UserError: it has another shape.
    """
    record = {key: None if is_missing(value) else value for key, value in record.items()}
    if columns:
        record = {**record, **{ours: record.get(theirs) for ours, theirs in columns.items()}}
    if record.get("prompt") is None and record.get("messages") is None:
        record = _layout(where, record, chat, remark)
    prompt, completion, messages = _unpacked(where, "prompt", record), record.get("completion"), record.get("messages")
    if prompt is not None and messages is not None:
        if completion is None and isinstance(prompt, str) and _first_words(messages) == prompt.strip():
            remark("`messages` is read, and `prompt`, which repeats its first turn, is not")
            prompt = None
        else:
            remark("both `prompt` and `messages` are there: `prompt` is read and `messages` is not")
    if prompt is None:
        turns = read_messages(where, "messages", messages)
        if turns[-1]["role"] == "assistant":
            if completion is not None and completion != turns[-1]["content"]:
                raise UserError(
                    f"{where}: `messages` ends with a reply, and `completion` gives another one.", "Take one away."
                )
            turns, completion = turns[:-1], [turns[-1]]
            if not turns:
                raise UserError(f"{where}: `messages` holds only an assistant turn; a user turn must come before it.")
        prompt = turns
    elif isinstance(prompt, str):
        if chat:
            remark("prompts that are strings are read as they are, not through the chat template")
    else:
        prompt = read_messages(where, "prompt", prompt)
    reply = None if completion is None else _reply(where, completion, prompt)
    tools, options = _listed(where, "tools", record.get("tools")), record.get("chat_template_kwargs")
    if tools and isinstance(prompt, str):
        raise UserError(f"{where}: a prompt that is a string cannot show `tools`.", "Give messages, or take the tools out.")
    if options is not None and not isinstance(options, dict):
        raise UserError(f"{where}: `chat_template_kwargs` must be an object, but it is {_shown(options)}.")
    source = record.get("source")
    answer = answer_cell(where, record.get("answer"), record.get("reasoning_gym"))
    told = _teacher_prompt(where, record, tools, chat, remark)
    source = "" if source is None else _plain(where, "source", source)
    row = Row(where, prompt, reply, answer, source, tools or None, options, told)
    _check_text(row)
    return row


def _teacher_prompt(
    where: str, record: Mapping[str, Any], tools: list[Any] | None, chat: bool, remark: Remark
) -> str | list[Message] | None:
    """What the teacher reads in place of the prompt; None where the row does not say."""
    told = _unpacked(where, "teacher_prompt", record)
    if told is None or (isinstance(told, str) and not told.strip()):
        return None
    if not isinstance(told, str):
        return read_messages(where, "teacher_prompt", told)
    if tools:
        raise UserError(
            f"{where}: a teacher_prompt that is a string cannot show `tools`.", "Give messages, or take the tools out."
        )
    if chat:
        remark("teacher_prompts that are strings are read as they are, not through the chat template")
    return told


def _check_text(row: Row) -> None:
    """See that all that a row says can be written down.

    Raises:
        UserError: it can't.
    """
    parts = {"prompt": row.prompt, "completion": row.completion, "answer": row.answer, "source": row.source}
    parts["teacher_prompt"] = row.teacher_prompt
    for name, value in (parts | {"tools": row.tools, "chat_template_kwargs": row.options}).items():
        if is_deeper(value, DEEPEST):
            raise UserError(f"{row.where}: `{name}` is nested more than {DEEPEST} deep.")
        if not all(map(is_text, _texts(value))):
            raise UserError(
                f"{row.where} can't be turned into tokens: `{name}` holds half of a surrogate pair (such as \\ud83d).",
                "Mend or delete the row.",
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _plain(where: str, name: str, value: Any) -> str:
    """A value of one piece as text."""
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        raise UserError(f"{where}: `{name}` is {_shown(value)}.") from None


def _reply(where: str, completion: Any, prompt: str | list[Message]) -> Message:
    if isinstance(completion, str) and not _is_list(completion):
        return {"role": "assistant", "content": completion}
    turns = read_messages(where, "completion", completion)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise UserError(f"{where}: `completion` must be one assistant message, or a string.")
    extra = turns[0].keys() - {"role", "content"}
    if isinstance(prompt, str) and extra:
        raise UserError(
            f"{where}: beside a prompt that is a string, `completion` cannot show {foreign(', '.join(sorted(extra)), 100)}.",
            "Give the prompt as messages.",
        )
    return turns[0]


def _unpacked(where: str, key: str, record: Mapping[str, Any]) -> Any:
    """A prompt, as a list where a string holds messages as JSON."""
    prompt = record.get(key)
    return _listed(where, key, prompt) if isinstance(prompt, str) and _is_list(prompt) else prompt


def _is_list(text: str) -> bool:
    """Does a string hold messages, as far as its beginning says?"""
    head = text[:200].lstrip()
    return (
        head.startswith("[")
        and head[1:].lstrip().startswith("{")
        and any(f"{q}{k}{q}" in head for q in "'\"" for k in ("role", "from"))
    )


def _listed(where: str, key: str, value: Any) -> Any:
    """A list, also where it is a string that holds it as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, deepest=DEEPEST)
    except json.JSONDecodeError as error:
        remedy = PYTHON_NOTATION if value.lstrip().startswith(("[{'", "{'")) else ""
        shown = foreign(value, 60)
        raise UserError(f"{where}: `{key}` is a string that is no JSON ({error.msg}): {shown!r}.", remedy) from None
    except Unreadable as error:
        raise UserError(f"{where}: `{key}` is a string of JSON that cannot be read: {foreign(error)}.") from None


def _first_words(messages: Any) -> str | None:
    """What the first user's turn says."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            return content.strip() if isinstance(content, str) else None
    return None


def read_messages(where: str, key: str, value: Any) -> list[Message]:
    """Messages with role and content, in the words of chat templates; fields without a value are left away.

    Raises:
        UserError: they have another shape, or parts that are no text.
    """
    given = value
    if isinstance(value, str) and value.lstrip().startswith(("[", "{'")):
        value = _listed(where, key, value)
    messages = [_message(where, m) for m in value] if isinstance(value, list) else []
    if not messages or None in messages:
        raise UserError(
            f"{where}: `{key}` must be a string or a list of messages with string `role` and `content`, "
            f"but it is {_shown(given)}."
        )
    return [message for message in messages if message is not None]


def _message(where: str, value: Any) -> Message | None:
    """A message, or None where it is none."""
    if not isinstance(value, dict):
        return None
    message = {key: item for key, item in value.items() if item is not None and item != "" and item != [] and item != {}}
    if "role" not in message and "from" in message:
        message = _of_sharegpt(where, message)
    content = message.get("content", "" if "content" in value or message.keys() - {"role"} else None)
    if value.get("content") is None and not message.keys() - {"role"}:
        return None
    if isinstance(content, list):
        content = _text_of_parts(where, content)
    if not isinstance(message.get("role"), str) or not isinstance(content, str | list):
        return None
    message = {"role": message.pop("role"), "content": content, **{k: v for k, v in message.items() if k != "content"}}
    if "tool_calls" in message:
        message["tool_calls"] = (
            [_call(call) for call in message["tool_calls"]] if isinstance(message["tool_calls"], list) else None
        )
        if message["tool_calls"] is None:
            raise UserError(f"{where}: `tool_calls` must be a list of calls, but it is {_shown(value['tool_calls'])}.")
    return message


def _text_of_parts(where: str, parts: list[Any]) -> str | list[Any] | None:
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise UserError(
                f"{where}: a message has content of type {foreign(part['type'], 60)!r}; npd reads text alone.",
                "Take such parts out, or leave such rows away.",
            )
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return None
    return parts[0]["text"] if len(parts) == 1 else [{"type": "text", "text": part["text"]} for part in parts]


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object: chat templates write them as JSON themselves."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = parse_json(function["arguments"], deepest=DEEPEST)
        except ValueError:
            return call
        if isinstance(arguments, dict):
            function = {**function, "arguments": arguments}
            return {**call, "function": function} if "function" in call else function
    return call


def _of_sharegpt(where: str, message: Message) -> Message:
    """{from, value} in the words of chat templates."""
    who, said = message.pop("from"), message.pop("value", "")
    role = ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise UserError(f"{where}: a message is from {foreign(who, 60)!r}; it can be from {', '.join(ROLES)}.")
    if who == "function_call":
        try:
            calls = parse_json(said, deepest=DEEPEST)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: a function_call holds no JSON ({foreign(reason(error))}): {_shown(said)}.") from None
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "tool_calls": [{"type": "function", "function": call} for call in calls], **message}
    return {"role": role, "content": said, **message}


def answer_cell(where: str, answer: Any, entry: Any = None) -> str | None:
    """A cell of column `answer`, from what a row says is right; None where it says nothing.

    Args:
        answer: what a verifier compares; of a list any member counts, and those that are missing do not.
        entry: a reasoning-gym entry, or its JSON, which goes before `answer` unless it is empty.

    Raises:
        UserError: it is something else, or holds the characters that keep answers apart in a cell.
    """
    empty = entry.values() if isinstance(entry, dict) else [entry]  # Arrow may write an object of nulls for none
    if not all(is_missing(value) or (isinstance(value, str) and not value.strip()) for value in empty):
        return _entry(where, entry)
    members = list(answer) if isinstance(answer, list | tuple) else [answer]
    members = [member for member in members if not is_missing(member)]
    if any(isinstance(member, Collection) and not isinstance(member, str) for member in members):
        raise UserError(
            f"{where}: `answer` must be a text or a number, or a list of them, any of which is right, but it is "
            f"{_shown(answer)}."
        )
    texts = [_plain(where, "answer", member) for member in members]
    if any(SEPARATOR in text or ENTRY in text for text in texts):
        raise UserError(
            f"{where}: `answer` holds a control character (U+001E or U+001F) by which npd keeps answers apart: "
            f"{_shown(answer)}.",
            "Take it out; several right answers are a list.",
        )
    return SEPARATOR.join(texts) if texts else None


def _entry(where: str, value: Any) -> str:
    """A reasoning-gym entry, by whose verifier a response is judged, as a cell of column `answer`."""
    entry = _listed(where, "reasoning_gym", value)
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not isinstance(entry.get("answer"), str | None) or is_deeper(entry, DEEPEST):
        raise UserError(
            f"{where}: `reasoning_gym` must be an entry of reasoning-gym, an object with `answer` and `metadata`, whose "
            f"`source_dataset` names the task, but it is {_shown(value)}."
        )
    kept = {key: entry.get(key) for key in ("question", "answer", "metadata")}
    return ENTRY + json.dumps(kept, ensure_ascii=False, default=str)


def _layout(where: str, record: Mapping[str, Any], chat: bool, remark: Remark) -> Mapping[str, Any]:
    """A record without `prompt` and `messages` in npd's own names, if it is in a layout that is known."""
    for name in CONVERSATIONS:
        if record.get(name) is not None:
            turns = read_messages(where, name, record[name])
            before = record.get("system") if turns[0]["role"] != "system" else None
            if before:
                turns = [{"role": "system", "content": str(before)}, *turns]
            remark(f"`{name}` is read as messages" + (", with `system` before them" if before else ""))
            return {**record, "messages": turns}
    question = next((name for name in QUESTIONS if isinstance(record.get(name), str)), None)
    reply = next((name for name in REPLIES if record.get(name) is not None), None)
    if question is None:
        names = foreign(", ".join(sorted(map(str, record))))
        raise UserError(
            f"{where} has neither `prompt` nor `messages`; it has {names or 'nothing'}.",
            "Say by data.columns which columns to read, such as {prompt: body}." if record else "",
        )
    more = next((name for name in INPUTS if isinstance(record.get(name), str) and record[name].strip()), None)
    text = record[question] + (f"\n\n{record[more]}" if more else "")
    how = "goes through the chat template as a user's turn" if chat else "is the prompt, with a line break behind it"
    told = f"`{question}`{f' with `{more}`' if more else ''} {how}"
    mine: dict[str, Any] = {**record, "prompt": text + "\n" if not chat else None}
    if chat:
        turns = [{"role": "user", "content": text}]
        for earlier in reversed(_history(where, record.get("history") or [])):
            turns = [*({"role": r, "content": c} for r, c in zip(("user", "assistant"), earlier, strict=True)), *turns]
        if record.get("system"):
            turns = [{"role": "system", "content": str(record["system"])}, *turns]
        mine["prompt"] = turns
    elif record.get("history") or record.get("system"):
        raise UserError(f"{where} has `history` or `system`, which a tokenizer without a chat template cannot show.")
    if reply is not None and record.get("completion") is None:
        mine["completion"] = record[reply]
        told += f", `{reply}` is the completion"
    if isinstance(record.get("answer"), str) and "####" in record["answer"] and mine.get("completion") is None:
        # GSM8K's way: the reasoning, then the answer.
        mine["completion"], mine["answer"] = record["answer"], record["answer"].rpartition("####")[2].strip()
        told += ", `answer` is the completion, and what stands behind its #### the answer"
    remark(told)
    return mine


def _shown(value: Any) -> str:
    try:
        return foreign(json.dumps(value, ensure_ascii=False, default=str), 120)
    except (ValueError, TypeError, RecursionError):
        return foreign(value, 120)


def _history(where: str, history: Any) -> list[list[str]]:
    """Earlier turns as Alpaca's descendants have them: pairs of a question and its reply."""
    pairs: list[Any] = history if isinstance(history, list) else [None]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise UserError(f"{where}: `history` must be a list of pairs [question, reply], but it is {_shown(history)}.")
    return pairs
