"""Data in: files and datasets to token ids; rows that can't be used are counted and named, never cut."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from npd.config import Config
from npd.errors import UserError, foreign
from npd.prompts.layouts import Row, read_row
from npd.prompts.readers import Source
from npd.prompts.table import CHUNK, SCHEMA, TEACHER_PROMPT, WITH_TEACHERS, Prompts, mapped
from npd.prompts.teachers import OwnChat, TeacherPrompts
from npd.prompts.templates import Asked, Chat

if TYPE_CHECKING:  # to read a run's files, nobody should wait for transformers
    from transformers import PreTrainedTokenizerBase


LONG_PROMPT = "prompt longer than data.max_prompt_tokens {}"
LONG_TEACHER_PROMPT = "teacher's prompt longer than data.max_prompt_tokens {}"
LONG_COMPLETION = "completion longer than rollout.max_new_tokens {}"
MANY_CHARACTERS, TOKEN_CHARACTERS = 1 << 20, 256  # no text of more than both, for each token that may be, has as few tokens


class _Seen:
    """A set of 64-bit hashes in sorted runs that double, eight bytes an entry."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add N keys; [N] bool, was the key new when its turn came?"""
        unique, first = np.unique(keys, return_index=True)
        new = np.zeros(len(keys), bool)
        new[first] = True
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            new &= run[at] != keys
        self.runs.append(unique[new[first]])
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            self.runs[-2:] = [np.union1d(self.runs[-2], self.runs[-1])]
        self.runs = [run for run in self.runs if len(run)]
        return new


def read_data(
    config: Config, command: str, chat: Chat, held_out_need: str | None = None, own: OwnChat | None = None
) -> tuple[Prompts | None, Prompts | None]:
    """What a command reads: data.train (None for `eval`, which trains on nothing) and data.eval (None without one).

    Args:
        held_out_need: the column that every row of data.eval must have.
        own: how teachers with another tokenizer read.

    Raises:
        UserError: as `load_prompts`.
    """
    data = config.data
    given = data.references == "given"
    common: dict[str, Any] = {
        "config": data.config,
        "columns": data.columns,
        "chat": chat,
        "max_prompt_tokens": data.max_prompt_tokens,
    }
    train = held_out = None
    told = TeacherPrompts(config, chat, own) if config.has_teacher else None
    if command != "eval":
        needs = command == "sft" and given
        train = load_prompts(
            data.train,
            chat.tokenizer,
            split=data.split,
            max_completion_tokens=config.rollout.max_new_tokens if needs else None,
            need="completion" if needs else None,
            lenient=not needs and not (given and config.schedule.references),
            teachers=None if needs else told,
            **common,
        )
    if data.eval is not None:
        split = data.eval_split or data.split
        held_out = load_prompts(
            data.eval,
            chat.tokenizer,
            split=split,
            need=held_out_need,
            lenient=True,
            teachers=told if config.evaluation.kl_prompts else None,
            **common,
        )
    return train, held_out


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: Chat | None = None,
    max_prompt_tokens: int,
    max_completion_tokens: int | None = None,
    need: str | None = None,
    lenient: bool = False,
    teachers: TeacherPrompts | None = None,
) -> Prompts:
    """Read, render and tokenise prompts; rows that can't be used are counted and named, never cut.

    Args:
        source: a file, a directory of files, a directory that `save_to_disk` wrote, or a Hub dataset.
        split, config: of a dataset, as `datasets` takes them.
        columns: the data's own names for `prompt`, `completion`, `messages`, `answer`, `source`, `tools`,
            `teacher_prompt`.
        chat: the tokenizer with the template's options; by default without any.
        max_prompt_tokens: longer prompts are left out.
        max_completion_tokens: rows with a longer completion are left out, where completions matter.
        need: a column that every row must have: "completion" or "answer". Where it is the completion, rows repeat each other
            only with the same one.
        lenient: completions are not used: one that can't be written is left away, with a remark, and the prompt stays.
        teachers: what renders prompts as teachers read them; None: no teacher reads here.

    Raises:
        UserError: a missing or unreadable file, a row of the wrong shape (named by file and line), messages without a
            chat template or that it does not show, or no prompt left.
    """
    chat, columns = chat or Chat(tokenizer), columns or {}
    raw = Source(source, split, config, columns.values())
    prompts, seen = Prompts(SCHEMA.empty_table(), 0), _Seen()
    pending: list[tuple[str, dict[str, Any]]] = []
    missing = set(columns.values())

    def fresh() -> pa.RecordBatch:
        """The pending rows without repetitions."""
        keys = np.array([_key(row, need) for _, row in pending], np.uint64)
        rows = []
        for (where, row), new in zip(pending, seen.add(keys), strict=True):
            if new:
                rows.append(row)
            else:
                prompts.leave_out("duplicate of an earlier prompt", where)
        pending.clear()
        return pa.RecordBatch.from_pylist(rows, schema=WITH_TEACHERS)

    # Unlinked as soon as it is mapped: the system frees it when the last reader is gone.
    with tempfile.TemporaryDirectory(prefix="npd-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "prompts.arrow"
        with pa.ipc.new_file(str(file), WITH_TEACHERS) as writer:
            for where, record in raw.rows():
                prompts.rows += 1
                if missing:
                    missing -= record.keys()
                row = read_row(where, record, columns, chat=bool(chat.template), remark=partial(prompts.remark, where=where))
                _check_needed(row, need)
                if teachers is None:
                    row.teacher_prompt = None
                reason = overlong(row, max_prompt_tokens, max_completion_tokens)
                if reason is not None:
                    prompts.leave_out(reason, where)
                    continue
                asked, completion_ids = _rendered(row, chat, prompts, lenient)
                told = _told(row, asked, teachers, prompts)
                reason = unusable(row, asked, completion_ids, max_prompt_tokens, max_completion_tokens, told)
                if reason is not None:
                    prompts.leave_out(reason, where)
                    continue
                prompts.templated += not isinstance(row.prompt, str)
                pending.append((where, _columns(row, asked, completion_ids) | {TEACHER_PROMPT: told}))
                if len(pending) == CHUNK:
                    writer.write_batch(fresh())
            writer.write_batch(fresh())
        prompts.table = mapped(file)
    if not prompts.privileged:  # as files always were
        prompts.table = prompts.table.select(SCHEMA.names)
    if missing and prompts.rows:
        names = foreign(", ".join(map(repr, sorted(missing))), 200)
        raise UserError(f"data.columns names {names}, but no row of {raw.name} has such a column.", "Correct data.columns.")
    if not len(prompts):
        raise UserError(f"No prompts are left of the {prompts.rows} rows of {raw.name}. " + "; ".join(prompts.report()))
    limits = {"prompt": max_prompt_tokens, "completion": max_completion_tokens, "need": need}
    options = {"columns": dict(columns), "template": chat.options, **limits, "stops": sorted(chat.stop_ids)}
    options |= {} if teachers is None else teachers.facts
    prompts.made_from = {"data": raw.digest(), "tokenizer": tokenizer_digest(tokenizer), "options": options}
    if teachers is not None and teachers.own is not None:
        digests = {source: tokenizer_digest(chat.tokenizer) for source, chat in sorted(teachers.readers.items())}
        prompts.made_from["teachers' tokenizers"] = digests
    prompts.date = chat.now.isoformat() if chat.dated else None
    return prompts


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer makes ids by: its own file where it has one, else its words; and its template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    said = json.dumps([words, tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def render_row(row: Row, chat: Chat) -> tuple[Asked, list[str]]:
    """A row's prompt as the model reads it, and remarks.

    Raises:
        UserError: the template does not take it, or leaves a part out.
    """
    try:
        return chat.ask(row.where, row.prompt, row.tools, row.options)
    except (TypeError, ValueError) as error:  # of the tokenizer, on text that is none, as half a surrogate pair
        raise UserError(f"{row.where} can't be turned into tokens: {foreign(error)}") from error


def _rendered(row: Row, chat: Chat, prompts: Prompts, lenient: bool) -> tuple[Asked, list[int] | None]:
    asked, remarks = render_row(row, chat)
    for text in dict.fromkeys(remarks):
        prompts.remark(text, row.where)
    if row.completion is None or not asked.ids:
        return asked, None
    try:
        return asked, chat.answer(row.where, asked, row.completion)
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.where} can't be turned into tokens: {foreign(error)}") from error
    except UserError as error:
        if not lenient:
            raise
        prompts.remark("the completion can't be written as a reference, which nothing asks for here", error.what)
        return asked, None


def _told(row: Row, asked: Asked, teachers: TeacherPrompts | None, prompts: Prompts) -> list[int] | None:
    """What a row's teacher reads in place of the prompt, if that is another."""
    if teachers is None or row.is_empty:
        return None
    ids, remarks = teachers.ask(row, asked)
    for text in dict.fromkeys(remarks):
        prompts.remark(f"in the teacher's prompt {text}", row.where)
    return ids


def _check_needed(row: Row, need: str | None) -> None:
    answered = row.answer is not None and bool(row.answer.strip())
    if need and not (row.completion is not None if need == "completion" else answered):
        remedy = ", or set data.references: teacher so that the teacher writes one." if need == "completion" else "."
        raise UserError(f"{row.where} has no {need}, which this needs for every row. Add it{remedy}")


def unusable(
    row: Row,
    asked: Asked,
    completion_ids: list[int] | None,
    longest_prompt: int,
    longest_completion: int | None,
    told: list[int] | None = None,
) -> str | None:
    """Why a row can't be used, or None."""
    if row.is_empty or not asked.ids or told == []:
        return "empty prompt"
    if len(asked.ids) > longest_prompt:
        return LONG_PROMPT.format(longest_prompt)
    if len(told or []) > longest_prompt:
        return LONG_TEACHER_PROMPT.format(longest_prompt)
    if longest_completion is not None and len(completion_ids or []) > longest_completion:
        return LONG_COMPLETION.format(longest_completion)
    return None


def overlong(row: Row, longest_prompt: int, longest_completion: int | None) -> str | None:
    """Why a row can't be used, seen from its length alone: a tokenizer takes gigabytes for what no model reads."""
    if _characters(row.prompt) > max(MANY_CHARACTERS, longest_prompt * TOKEN_CHARACTERS):
        return LONG_PROMPT.format(longest_prompt)
    if _characters(row.teacher_prompt) > max(MANY_CHARACTERS, longest_prompt * TOKEN_CHARACTERS):
        return LONG_TEACHER_PROMPT.format(longest_prompt)
    most = None if longest_completion is None else max(MANY_CHARACTERS, longest_completion * TOKEN_CHARACTERS)
    if most is not None and _characters(row.completion) > most:
        return LONG_COMPLETION.format(longest_completion)
    return None


def _characters(text: Any) -> int:
    """Of a string, or of the strings in messages."""
    if isinstance(text, str):
        return len(text)
    if isinstance(text, dict):
        return sum(map(_characters, text.values()))
    return sum(map(_characters, text)) if isinstance(text, list | tuple) else 0


def _columns(row: Row, asked: Asked, completion_ids: list[int] | None) -> dict[str, Any]:
    return {
        # The id follows from what the model reads, so it survives reordering the file.
        "prompt_id": hashlib.sha256(json.dumps(asked.ids).encode()).hexdigest()[:16],
        "source": row.source,
        "prompt_ids": asked.ids,
        "completion_ids": completion_ids,
        "answer": row.answer,
    }


def _key(row: dict[str, Any], need: str | None) -> int:
    """What two rows that repeat each other share: the prompt, what the teacher is told instead, and where completions are
    what is learnt, these."""
    if need != "completion" and row[TEACHER_PROMPT] is None:
        return int(row["prompt_id"], 16)
    both = json.dumps([row["prompt_ids"], row["completion_ids"] if need == "completion" else row[TEACHER_PROMPT]])
    return int(hashlib.sha256(both.encode()).hexdigest()[:16], 16)
