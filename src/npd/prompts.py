"""Data in: files and Hugging Face datasets to token ids.

Conventions are those TRL's users know: `prompt` (a string or messages) with optional `completion`, `answer` and
`source`; or `messages`, whose last assistant turn is the completion.

Token ids go through a file that is mapped into memory, so a million prompts take disk, and of memory eight bytes each.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from npd.errors import UserError

if TYPE_CHECKING:  # to read a run's files, nobody should wait for transformers
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SHOWN = 5  # rows named for each reason to leave prompts out
CHUNK = 1024  # prompts held while they are read

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
    ]
)


@dataclass
class Prompts:
    """Prompts as token ids, and what was left out.

    Columns of `table`, which is mapped from a file: prompt_id, source, prompt_ids, completion_ids (the stop token included;
    null without a reference) and answer (null without one).
    """

    table: pa.Table
    rows: int
    """Rows read."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out for it."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> where the first of them stand."""

    def __len__(self) -> int:
        return len(self.table)

    def report(self) -> list[str]:
        """One line a reason: how many rows were left out, and the first of them by name."""
        return [
            f"{count} left out, {reason}: {', '.join(self.places[reason])}" + (", ..." if count > SHOWN else "")
            for reason, count in self.dropped.items()
        ]

    def leave_out(self, reason: str, where: str) -> None:
        """Count a row that can't be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if self.dropped[reason] <= SHOWN:
            self.places.setdefault(reason, []).append(where)

    def take(self, indices: np.ndarray) -> pa.Table:
        """The rows at N indices, in their order; reads nothing else (Table.take joins a whole column's chunks first)."""
        batches = self.table.to_batches()
        ends = np.cumsum([len(batch) for batch in batches])
        order = np.argsort(indices, kind="stable")
        owner = np.searchsorted(ends, indices[order], side="right")
        pieces = []
        for b in np.unique(owner):
            rows = indices[order][owner == b] - (ends[b] - len(batches[b]))
            pieces.append(batches[b].take(pa.array(rows)))
        table = pa.Table.from_batches(pieces, schema=self.table.schema).combine_chunks()
        return table.take(pa.array(np.argsort(order, kind="stable")))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(pc.max(pc.list_value_length(self.table["prompt_ids"])).as_py() or 0)

    def save(self, path: Path) -> None:
        """Write an Arrow file that `open` maps back."""
        facts = json.dumps({"rows": self.rows, "dropped": self.dropped, "places": self.places})
        with pa.ipc.new_file(str(path), SCHEMA.with_metadata({"npd": facts})) as writer:
            for batch in self.table.to_batches(max_chunksize=CHUNK):
                writer.write_batch(batch)

    @classmethod
    def open(cls, path: Path) -> Prompts:
        """Map a file that `save` wrote."""
        table = _mapped(path)
        return cls(table.replace_schema_metadata(), **json.loads(table.schema.metadata[b"npd"]))


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


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


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    max_prompt_tokens: int,
    max_completion_tokens: int | None = None,
    need: str | None = None,
) -> Prompts:
    """Read, render and tokenise prompts; rows that can't be used are counted and named, never cut.

    Args:
        source: a file, a directory of files, or a Hub dataset.
        max_prompt_tokens: longer prompts are left out.
        max_completion_tokens: rows with a longer completion are left out, where completions matter.
        need: a column that every row must have: "completion" or "answer".

    Raises:
        UserError: a missing or unreadable file, a row of the wrong shape (named by file and line), messages without a
            chat template, or no prompt left.
    """
    prompts, seen = Prompts(SCHEMA.empty_table(), 0), _Seen()
    pending: list[tuple[str, dict[str, Any]]] = []

    def fresh() -> pa.RecordBatch:
        """The pending rows without repetitions."""
        keys = np.array([int(row["prompt_id"], 16) for _, row in pending], np.uint64)
        rows = []
        for (where, row), new in zip(pending, seen.add(keys), strict=True):
            if new:
                rows.append(row)
            else:
                prompts.leave_out("duplicate of an earlier prompt", where)
        pending.clear()
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    # Unlinked as soon as it is mapped: the system frees it when the last reader is gone.
    with tempfile.TemporaryDirectory(prefix="npd-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "prompts.arrow"
        with pa.ipc.new_file(str(file), SCHEMA) as writer:
            for where, record in _read(source, split):
                prompts.rows += 1
                try:
                    row = _row(where, record, tokenizer)
                except (TypeError, ValueError) as error:  # of the tokenizer, on text that is none, as half a surrogate pair
                    raise UserError(f"{where} can't be turned into tokens: {error}") from error
                if need and row[f"{need}_ids" if need == "completion" else need] is None:
                    remedy = (
                        ", or set data.references: teacher so that the teacher writes one." if need == "completion" else "."
                    )
                    raise UserError(f"{where} has no {need}, which this needs for every row. Add it{remedy}")
                too_long = max_completion_tokens is not None and len(row["completion_ids"] or []) > max_completion_tokens
                if not row["text"].strip() or not row["prompt_ids"]:
                    prompts.leave_out("empty prompt", where)
                elif len(row["prompt_ids"]) > max_prompt_tokens:
                    prompts.leave_out(f"prompt longer than data.max_prompt_tokens {max_prompt_tokens}", where)
                elif too_long:
                    prompts.leave_out(f"completion longer than rollout.max_new_tokens {max_completion_tokens}", where)
                else:
                    del row["text"]
                    pending.append((where, row))
                    if len(pending) == CHUNK:
                        writer.write_batch(fresh())
            writer.write_batch(fresh())
        prompts.table = _mapped(file)
    if not len(prompts):
        raise UserError(f"No prompts are left of the {prompts.rows} rows of {source}. " + "; ".join(prompts.report()))
    return prompts


def _row(where: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if prompt is None:
        messages = record.get("messages")
        if messages is None:
            raise UserError(f"{where} has neither `prompt` nor `messages`; it has {', '.join(sorted(record)) or 'nothing'}.")
        prompt = _messages(where, "messages", messages)
        if prompt[-1]["role"] == "assistant":
            prompt, completion = prompt[:-1], [prompt[-1]]
            if not prompt:
                raise UserError(f"{where}: `messages` holds only an assistant turn; a user turn must come before it.")
    if isinstance(prompt, str):
        text = prompt
        ids = tokenizer(prompt)["input_ids"]
        if tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text; the response goes on from here
    else:
        prompt = _messages(where, "prompt", prompt)
        if not tokenizer.chat_template:
            raise UserError(
                f"{where} gives its prompt as messages, but the student's tokenizer has no chat template. Give the prompt "
                "as a string, or add a chat_template to the tokenizer."
            )
        text = "".join(message["content"] for message in prompt)
        ids = _render(where, tokenizer, prompt)
    completion_ids = None if completion is None else _completion(where, tokenizer, prompt, ids, completion)
    answer = record.get("answer")
    return {
        # The id follows from what the model reads, so it survives reordering the file.
        "prompt_id": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
        "source": str(record.get("source") or ""),
        "prompt_ids": ids,
        "completion_ids": completion_ids,
        "answer": None if answer is None else str(answer),
        "text": text,
    }


def _completion(
    where: str, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], prompt_ids: list[int], completion: Any
) -> list[int]:
    """A reference response as the model would have to write it, its stop token included."""
    if not isinstance(completion, str):
        turns = _messages(where, "completion", completion)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise UserError(f"{where}: `completion` must be one assistant message, or a string.")
        completion = turns[0]["content"]
    if not isinstance(prompt, str):
        # The chat template knows which token ends a turn; what it puts behind that (a line break) is not the model's.
        turn = {"role": "assistant", "content": completion}
        whole = _render(where, tokenizer, [*prompt, turn], generation_prompt=False)
        ids = whole[len(prompt_ids) :]
        ends = [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]
        if whole[: len(prompt_ids)] == prompt_ids and ends:
            return ids[: ends[-1] + 1]
    return [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _render(
    where: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, generation_prompt: bool = True
) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)
    except Exception as error:  # whatever the template's own code raises
        raise UserError(f"{where}: the chat template does not take these messages: {error}") from error
    return list(rendered)


def _messages(where: str, key: str, value: Any) -> list[dict[str, str]]:
    good = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    )
    if not good:
        raise UserError(
            f"{where}: `{key}` must be a string or a list of messages with string `role` and `content`, "
            f"but it is {json.dumps(value, ensure_ascii=False, default=str)[:120]}."
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _read(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"The directory {path} holds no {', '.join(SUFFIXES)} file.")
    elif path.suffix in SUFFIXES or path.exists():
        files = [path]
    else:
        yield from _hub(source, split)
        return
    for file in files:
        try:
            yield from _READERS.get(file.suffix, _unknown)(file)
        except FileNotFoundError:
            raise UserError(f"There is no data file {file}; check data.train and data.eval.") from None
        except (OSError, UnicodeDecodeError, pa.ArrowException, csv.Error) as error:
            raise UserError(f"The data file {file} cannot be read: {error}") from error


def _unknown(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    raise UserError(f"The data file {file} is of an unknown kind; give one of {', '.join(SUFFIXES)}.")


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is not valid JSON: {error.msg} at column {error.colno}. Mend or delete it."
                ) from None
            if not isinstance(record, dict):
                raise UserError(f'{where} must hold an object such as {{"prompt": ...}}, but it holds {line.strip()[:60]!r}.')
            yield where, record


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(records, list):
        raise UserError(f"{file} must hold a list of objects; for one object a line, name it .jsonl.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f'{file}, item {number} must be an object such as {{"prompt": ...}}.')
        yield f"{file}, item {number}", record


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", record


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            if None in record or None in record.values():
                raise UserError(f"{where} has not as many fields as the header; quote fields that hold commas.")
            # A CSV cell can't be missing: an empty one is taken as no value, except for the prompt, which is then empty.
            yield where, {key: value for key, value in record.items() if value or key == "prompt"}


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def _hub(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.count("/") > 1 or source.startswith((".", "/")):
        raise UserError(f"There is no data file or directory {source}; check data.train and data.eval.")
    import datasets

    try:
        records = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise UserError(
            f"{source} is neither a file here nor a dataset on the Hub with a split {split!r}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    for number, record in enumerate(records):
        yield f"{source} ({split}), row {number}", record


def count_sources(table: pa.Table) -> Counter[str]:
    counts = table["source"].value_counts()
    return Counter(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))
