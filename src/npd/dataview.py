"""What a model will be asked and shown, before anything runs: `npd data`, and `--dry-run`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.compute as pc

from npd.config import Config
from npd.errors import UserError
from npd.observe.display import Display
from npd.prompts.layouts import read_row
from npd.prompts.load import overlong, render_row, unusable
from npd.prompts.readers import Source
from npd.prompts.table import TEACHER_PROMPT, Prompts, count_sources
from npd.prompts.teachers import TeacherPrompts
from npd.prompts.templates import Chat

QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99, "most": 1.0}
LONGEST = 1500  # characters of a text that are shown where several rows are
IDS = 12  # token ids shown from either end
SOURCES = 20


def show_data(
    config: Config,
    command: str,
    chat: Chat,
    display: Display,
    read: Callable[[], tuple[Prompts | None, Prompts | None]],
    rows: int = 3,
    row: int | None = None,
    told: bool = False,
) -> None:
    """Print rows of data.train as a model reads them, what stops a response, what is left out and why, lengths and sources.

    Args:
        read: gives data.train and data.eval, once the rows are shown.
        rows: so many from the first.
        row: this one alone, counted from 1, and whole.
        told: what was left out has been said already.

    Raises:
        UserError: as `read_data`, or there is no such row.
    """
    first, end = (0, rows) if row is None else (row - 1, row)
    shown = list(describe_rows(config, command, chat, first, end, whole=row is not None))
    if row is not None and not shown:
        raise UserError(f"--row is {row}, but {config.data.train} has fewer rows.")
    for number, lines in enumerate(shown, first + 1):
        display.say("\n".join([f"\nRow {number} of data.train", *lines]))
    prompts, held_out = read()
    display.say("\nA response stops at " + "; ".join(stops(chat)) + ".")
    for data, name in ((prompts, "data.train"), (held_out, "data.eval")):
        if data is None:
            continue
        display.say(f"{name}: {len(data):,} prompts of {data.rows:,} rows.")
        for line in (*data.report(), *data.notes) if not told else ():
            display.say(f"{name}: {line}")
        display.table(f"{name}: tokens", ["", "rows", *QUANTILES], list(_lengths(data)))
        display.table(f"{name}: sources", ["source", "prompts", "teacher"], list(_sources(config, data)))


def describe_rows(
    config: Config, command: str, chat: Chat, first: int, end: int, *, whole: bool = False
) -> Iterator[list[str]]:
    """Rows `first` to `end` of data.train, in lines: where each stands, prompt, the teacher's own and
    reference as text and ids, remarks.

    Args:
        whole: long texts too.
    """
    data = config.data
    columns = {str(ours): theirs for ours, theirs in data.columns.items()}
    given = command == "sft" and data.references == "given"
    teachers = TeacherPrompts(config, chat) if config.has_teacher and not given else None
    for where, record in itertools.islice(Source(data.train, data.split, data.config, columns.values()).rows(), first, end):
        said: list[str] = []
        lines = [where]
        try:
            row = read_row(where, record, columns, chat=bool(chat.template), remark=said.append)
            lines[0] += f"; source {row.source or '(none)'!r}, teacher {_teacher(config, row.source)}"
            longest = config.rollout.max_new_tokens if given else None
            if (reason := overlong(row, data.max_prompt_tokens, longest)) is not None:
                yield [*lines, f"It is left out: {reason}."]
                continue
            asked, remarks = render_row(row, chat)
            lines += [f"The prompt, {len(asked.ids):,} tokens {_ids(asked.ids)}:", visible(chat, asked.ids, whole)]
            said += remarks
            told = None
            if teachers is not None:
                told, remarks = teachers.ask(row, asked)
                said += [f"in the teacher's prompt {text}" for text in remarks]
            if told is not None:
                lines += [f"The teacher's prompt, {len(told):,} tokens {_ids(told)}:", visible(chat, told, whole)]
            answer = None
            if row.completion is not None:
                answer = chat.answer(where, asked, row.completion)
                lines.append(
                    f"The reference behind it, {len(answer):,} tokens {_ids(answer)}, the last {_name(chat, answer[-1])}:"
                )
                lines.append(visible(chat, answer, whole))
            else:
                lines.append("It has no reference: the response begins here.")
            reason = unusable(row, asked, answer, data.max_prompt_tokens, longest, told)
            lines += [f"It is left out: {reason}."] if reason else []
        except UserError as error:
            lines.append(f"It is refused: {error}")
        yield lines + [f"Note: {text}." for text in dict.fromkeys(said)]


def visible(chat: Chat, ids: list[int], whole: bool = True) -> str:
    """A text with its special tokens in ⟦brackets⟧ and its line breaks marked, cut in the middle where it is long."""
    text = chat.decode(ids)
    if not whole and len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
    special = {token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(map(str, chat.tokenizer.all_special_tokens))
    if special:
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        text = re.sub(names, lambda match: f"⟦{match[0]}⟧", text)
    return "  | " + text.replace("\n", "↵\n  | ")


def stops(chat: Chat) -> list[str]:
    """The tokens that end a response, each with who says so."""
    told = []
    for token in sorted(chat.stop_ids):
        who = [
            name
            for name, id_ in (("tokenizer", chat.tokenizer.eos_token_id), ("chat template", chat.end.token))
            if id_ == token
        ]
        told.append(f"{_name(chat, token)} ({', '.join(who) or 'a model’s configuration'})")
    return told


def _name(chat: Chat, token: int) -> str:
    return f"{chat.tokenizer.convert_ids_to_tokens(token)!r} {token}"


def _ids(ids: list[int]) -> str:
    if len(ids) <= 2 * IDS:
        return str(ids)
    return f"[{', '.join(map(str, ids[:IDS]))}, … {', '.join(map(str, ids[-IDS:]))}]"


def _lengths(data: Prompts) -> Iterator[list[str]]:
    columns = {"prompt_ids": "prompt", TEACHER_PROMPT: "teacher's prompt", "completion_ids": "reference"}
    for column, name in columns.items():
        if column not in data.table.column_names:
            continue
        lengths = pc.drop_null(pc.list_value_length(data.table[column])).to_numpy()
        quantiles = np.quantile(lengths, list(QUANTILES.values())) if len(lengths) else []
        yield [name, f"{len(lengths):,}", *([f"{q:,.0f}" for q in quantiles] or ["-"] * len(QUANTILES))]


def _sources(config: Config, data: Prompts) -> Iterator[list[str]]:
    counts = count_sources(data.table).most_common()
    for source, count in counts[:SOURCES]:
        yield [source or "(none)", f"{count:,}", _teacher(config, source)]
    if len(counts) > SOURCES:
        yield [f"{len(counts) - SOURCES:,} others", f"{sum(count for _, count in counts[SOURCES:]):,}", ""]


def _teacher(config: Config, source: str) -> str:
    teacher = config.all_teachers.get(config.teacher_of(source))
    return "-" if teacher is None else teacher.model
