"""Files and datasets as rows, each with its place in words.

Files are read here and not by `datasets`, whose errors name neither file nor line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from npd.errors import UserError, foreign
from npd.inputs import Unreadable, check_file, parse_json, reason
from npd.prompts.layouts import USED

Record = dict[str, Any]
Rows = Iterator[tuple[str, Record]]

PACKED = {".gz": "gzip", ".zst": "zstd"}
LONGEST_LINE = 64 << 20  # characters of a row: more than any model reads
LONGEST_JSON = 1 << 30  # characters of a file that is one list
csv.field_size_limit(LONGEST_LINE)  # Python's own limit, 128 KiB, is less than one long conversation
UNREAD = ...  # in the place of a value that no layout asks for


class Source:
    """Rows of a file, a directory of files, a directory that `save_to_disk` wrote, or a dataset on the Hub.

    Args:
        split: of a dataset, also with a slice (`train[:1%]`); of files a slice by row numbers alone.
        config: the configuration of a Hub dataset that has several.
        columns: names that are read besides those of the layouts; of all others only the name is.

    Raises:
        UserError: there is no such thing, or it cannot be read; also while `rows` goes on, with file and line.
    """

    def __init__(self, source: str, split: str = "train", config: str | None = None, columns: Collection[str] = ()) -> None:
        self.name, self.split = foreign(source, 200), foreign(split, 80)
        self.columns = USED | set(columns)
        self._read: dict[Path, tuple[int, int]] = {}
        self.files: list[Path] = []
        self.dataset: Any = None
        path = Path(source)
        _check_place(path, self.name)
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            self.dataset = _saved(path, split)
        elif path.is_dir():
            self.files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
            if not self.files and not any(_suffix(file) in SUFFIXES for file in path.rglob("*")):
                raise UserError(f"The directory {self.name} holds no {', '.join(KINDS)} file.")
        elif _suffix(path) in SUFFIXES or path.exists():
            self.files = [path]
        if not self.files and self.dataset is None:
            self.dataset = _loaded(source, split, config)
        if self.files and config is not None:
            raise UserError(
                f"data.config is {foreign(config, 80)!r}, but {self.name} is a file here and has none; take data.config away."
            )

    def rows(self) -> Rows:
        """(place in words, row) one by one."""
        if self.dataset is not None:
            yield from self._dataset_rows()
            return
        rows = itertools.chain.from_iterable(map(self._file, self.files))
        yield from itertools.islice(rows, *_slice(self.split))

    def _dataset_rows(self) -> Rows:
        names = self.dataset.column_names
        unread = dict.fromkeys((name for name in names if name not in self.columns), UNREAD)
        rows, number = iter(self.dataset.select_columns([name for name in names if name in self.columns])), 0
        if len(unread) == len(names):  # nothing that a layout knows: the first row says so
            yield f"{self.name} ({self.split}), row 1", unread
        while True:
            number += 1
            where = f"{self.name} ({self.split}), row {number}"
            try:
                record = next(rows, None)
            except Exception as error:  # whatever the columns' types make of a value
                raise UserError(f"{where} cannot be read: {foreign(error)}.") from error
            if record is None:
                return
            yield where, {**_without_nulls(record), **unread}

    def digest(self) -> list[str]:
        """What the raw data is: of each file size and SHA-256, of a dataset its fingerprint."""
        if self.dataset is not None:
            return [str(self.dataset._fingerprint)]
        digests = []
        for path in self.files:
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._check_unchanged(path)
                digests.append(f"{path.stat().st_size}:{digest}")
            except OSError as error:
                raise UserError(f"The data file {foreign(path, 200)} cannot be read again: {reason(error)}.") from error
        return digests

    def _file(self, file: Path) -> Rows:
        name = foreign(file, 200)
        read = _READERS.get(_suffix(file).removesuffix(file.suffix if file.suffix in PACKED else ""), _unknown)
        try:
            found = check_file(file)
            self._read[file] = found.st_size, found.st_mtime_ns
            yield from read(file, name, self.columns)
            self._check_unchanged(file)
        except FileNotFoundError:
            raise UserError(f"There is no data file {name}; check data.train and data.eval.") from None
        except (OSError, UnicodeDecodeError, Unreadable) as error:
            raise UserError(f"The data file {name} cannot be read: {foreign(reason(error))}.") from error
        except (pa.ArrowException, csv.Error, EOFError, MemoryError) as error:
            raise UserError(f"The data file {name} cannot be read: {foreign(error)}") from error

    def _check_unchanged(self, file: Path) -> None:
        now = file.stat()
        if self._read.get(file, (now.st_size, now.st_mtime_ns)) != (now.st_size, now.st_mtime_ns):
            raise UserError(f"The data file {foreign(file, 200)} changed while it was read.", "Start again once it is whole.")


def _check_place(path: Path, name: str) -> None:
    """See that a path can be asked about at all."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {foreign(reason(error))}.") from None


def _suffix(file: Path) -> str:
    """The end of a name that says its kind: .jsonl, .csv.gz, ..."""
    return "".join(file.suffixes[-2:]) if file.suffix in PACKED else file.suffix


def _slice(split: str) -> tuple[int | None, int | None]:
    """First row and end of the slice of a split, for files."""
    if "[" not in split:
        return None, None
    match = re.fullmatch(r"\w+\[(\d*):(\d*)\]", split)
    if match is None:
        raise UserError(
            f"data.split is {foreign(split, 80)!r}; of a file it can be a slice by row numbers alone, such as train[:1000] "
            "or train[1000:2000]."
        )
    first, end = (min(int(number[:18]), sys.maxsize) if number else None for number in match.groups())
    return first, end


def _opened(file: Path, newline: str | None = None) -> io.TextIOBase:
    """A file as text, unpacked if its name says that it is packed."""
    if file.suffix in PACKED:
        stream: Any = pa.input_stream(str(file), compression=PACKED[file.suffix])
    else:
        stream = file.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _lines(text: io.TextIOBase, most: int = LONGEST_LINE) -> Iterator[str]:
    """Lines of bounded length."""
    number = 0
    while line := text.readline(most + 1):
        number += 1
        if len(line) > most:
            raise Unreadable(f"line {number} has more than {most:,} characters")
        yield line


def _unknown(file: Path, name: str, columns: Collection[str]) -> Rows:
    raise UserError(f"The data file {name} is of an unknown kind; give one of {', '.join(KINDS)}, also as .gz or .zst.")


def _jsonl(file: Path, name: str, columns: Collection[str]) -> Rows:
    with _opened(file) as text:
        for number, line in enumerate(_lines(text), 1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            try:
                record = parse_json(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is not valid JSON: {error.msg} at column {error.colno}. Mend or delete it."
                ) from None
            except Unreadable as error:
                raise UserError(f"{where} cannot be read: {foreign(error)}.", "Mend or delete it.") from None
            if not isinstance(record, dict):
                holds = foreign(line, 60)
                raise UserError(f'{where} must hold an object such as {{"prompt": ...}}, but it holds {holds!r}.')
            yield where, record


def _json(file: Path, name: str, columns: Collection[str]) -> Rows:
    """A list of objects, or an object a line, as some name their JSON lines."""
    with _opened(file) as text:
        first = text.read(1)
        while first.isspace():
            first = text.read(1)
        lines = first == "{" and _is_json(first + text.readline(LONGEST_LINE))
    if lines:
        yield from _jsonl(file, name, columns)
        return
    with _opened(file) as text:
        whole = text.read(LONGEST_JSON + 1)
    if len(whole) > LONGEST_JSON:
        raise Unreadable(f"it has more than {LONGEST_JSON:,} characters; write an object a line, and name it .jsonl")
    try:
        records = parse_json(whole)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(records, list):
        raise UserError(f"{name} must hold a list of objects; for one object a line, name it .jsonl.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f'{name}, item {number} must be an object such as {{"prompt": ...}}.')
        yield f"{name}, item {number}", record


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except json.JSONDecodeError:
        return False
    except Unreadable:  # for the line to be named
        pass
    return True


def _parquet(file: Path, name: str, columns: Collection[str]) -> Rows:
    with pq.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        _check_once(name, names, columns)
        unread = dict.fromkeys((each for each in names if each not in columns), UNREAD)
        number = 0
        for batch in opened.iter_batches(columns=[each for each in names if each in columns]):
            try:
                records = batch.to_pylist()
            except Exception as error:  # a date of no calendar, an integer of no size, ...
                raise _unread(name, number, batch, error) from error
            for record in records:
                number += 1
                yield f"{name}, row {number}", {**_without_nulls(record), **unread}


def _unread(name: str, before: int, batch: pa.RecordBatch, error: Exception) -> UserError:
    """The value of a batch that Python has nothing for."""
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        for i, value in enumerate(values):
            try:
                value.as_py()
            except Exception as found:
                return UserError(f"{name}, row {before + i + 1}: `{foreign(column, 60)}` cannot be read: {foreign(found)}.")
    return UserError(f"{name}, row {before + 1} or one behind it cannot be read: {foreign(error)}.")


def _check_once(name: str, names: Collection[str], columns: Collection[str]) -> None:
    """See that no column that is read has a name that another one has as well."""
    twice = [each for each, count in Counter(names).items() if count > 1 and each in columns]
    if twice:
        raise UserError(f"{name} has the column {foreign(twice[0], 60)!r} twice.", "Take one away, or give it another name.")


def _csv(file: Path, name: str, columns: Collection[str]) -> Rows:
    with _opened(file, newline="") as handle:
        reader = csv.DictReader(_lines(handle), strict=True)
        try:
            _check_once(name, reader.fieldnames or (), columns)
            yield from _csv_rows(reader, name)
        except csv.Error as error:
            told = str(error)
            remedy = "A quote that is opened must be closed." if "larger" in told or "end of data" in told else ""
            raise UserError(
                f"The data file {name} cannot be read: {foreign(told)}, at line {reader.line_num}.", remedy
            ) from error


def _csv_rows(reader: csv.DictReader[str], name: str) -> Rows:
    for record in reader:
        where = f"{name}, line {reader.line_num}"
        if None in record or None in record.values():
            raise UserError(f"{where} has not as many fields as the header; quote fields that hold commas.")
        # A CSV cell can't be missing: an empty one is taken as no value, except for the prompt, which is then empty.
        yield where, {key: value for key, value in record.items() if value or key == "prompt"}


def _without_nulls(record: Record) -> Record:
    """Arrow gives every message all the fields that any has: those that are null were never there."""
    return {key: _pruned(value) if isinstance(value, list | dict) else value for key, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, str, Collection[str]], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
KINDS = tuple(_READERS)
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS if kind != ".parquet" for packed in PACKED))


def _saved(path: Path, split: str) -> Any:
    """A dataset that `save_to_disk` wrote, with one split or several."""
    import datasets

    try:
        there: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged one makes of it
        raise UserError(f"The dataset in {foreign(path, 200)} cannot be read: {foreign(error)}") from error
    names = list(there) if isinstance(there, dict) else [split.partition("[")[0]]
    lengths = {name: len(there[name]) if isinstance(there, dict) else len(there) for name in names}
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except Exception as error:
        raise UserError(
            f"The dataset in {foreign(path, 200)} has no split {foreign(split, 80)!r} ({foreign(error, 200)}); it has "
            f"{foreign(', '.join(names), 200)}. Set data.split."
        ) from error
    pieces = []
    for span in spans:
        piece = there[span.splitname] if isinstance(there, dict) else there
        pieces.append(piece if span.from_ is None and span.to is None else piece.select(range(span.from_ or 0, span.to)))
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _loaded(source: str, split: str, config: str | None) -> Any:
    here = Path(source).is_dir()  # a copy of a Hub repository, with its files in folders
    if not here and (source.count("/") > 1 or source.startswith((".", "/"))):
        raise UserError(f"There is no data file or directory {foreign(source, 200)}; check data.train and data.eval.")
    import datasets

    try:
        return datasets.load_dataset(source, *([] if config is None else [config]), split=split)
    except Exception as error:
        told, name = foreign(error, 400), foreign(source, 200)
        remedy = "It has several configurations: set data.config to one of them." if "onfig name is missing" in told else ""
        if "Unknown split" in told:
            remedy = "Set data.split to one that it has."
        what = "a dataset" if here else "neither a file here nor a dataset on the Hub"
        if remedy:
            raise UserError(f"{name} cannot be read with split {foreign(split, 80)!r}: {told}", remedy) from error
        raise UserError(f"{name} is {what} with a split {foreign(split, 80)!r}: {foreign(told)}") from error
