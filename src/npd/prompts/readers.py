"""Files and datasets as rows, each with its place in words.

Files are read here and not by `datasets`, whose errors name neither file nor line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from npd.errors import UserError

Record = dict[str, Any]
Rows = Iterator[tuple[str, Record]]

PACKED = {".gz": "gzip", ".zst": "zstd"}
csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than one long conversation


class Source:
    """Rows of a file, a directory of files, a directory that `save_to_disk` wrote, or a dataset on the Hub.

    Args:
        split: of a dataset, also with a slice (`train[:1%]`); of files a slice by row numbers alone.
        config: the configuration of a Hub dataset that has several.

    Raises:
        UserError: there is no such thing, or it cannot be read; also while `rows` goes on, with file and line.
    """

    def __init__(self, source: str, split: str = "train", config: str | None = None) -> None:
        self.name, self.split = source, split
        self.files: list[Path] = []
        self.dataset: Any = None
        path = Path(source)
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            self.dataset = _saved(path, split)
        elif path.is_dir():
            self.files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
            if not self.files and not any(_suffix(file) in SUFFIXES for file in path.rglob("*")):
                raise UserError(f"The directory {path} holds no {', '.join(KINDS)} file.")
        elif _suffix(path) in SUFFIXES or path.exists():
            self.files = [path]
        if not self.files and self.dataset is None:
            self.dataset = _loaded(source, split, config)
        if self.files and config is not None:
            raise UserError(f"data.config is {config!r}, but {source} is a file here and has none; take data.config away.")

    def rows(self) -> Rows:
        """(place in words, row) one by one."""
        if self.dataset is not None:
            for number, record in enumerate(self.dataset, 1):
                yield f"{self.name} ({self.split}), row {number}", _without_nulls(record)
            return
        rows = itertools.chain.from_iterable(map(self._file, self.files))
        yield from itertools.islice(rows, *_slice(self.split))

    def digest(self) -> list[str]:
        """What the raw data is: of each file size and SHA-256, of a dataset its fingerprint."""
        if self.dataset is not None:
            return [str(self.dataset._fingerprint)]
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(f"{path.stat().st_size}:{hashlib.file_digest(file, 'sha256').hexdigest()}")
        return digests

    def _file(self, file: Path) -> Rows:
        try:
            yield from _READERS.get(_suffix(file).removesuffix(file.suffix if file.suffix in PACKED else ""), _unknown)(file)
        except FileNotFoundError:
            raise UserError(f"There is no data file {file}; check data.train and data.eval.") from None
        except (OSError, UnicodeDecodeError, pa.ArrowException, csv.Error) as error:
            raise UserError(f"The data file {file} cannot be read: {error}") from error


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
            f"data.split is {split!r}; of a file it can be a slice by row numbers alone, such as train[:1000] or "
            "train[1000:2000]."
        )
    first, end = (int(number) if number else None for number in match.groups())
    return first, end


def _opened(file: Path, newline: str | None = None) -> io.TextIOBase:
    """A file as text, unpacked if its name says that it is packed."""
    if file.suffix in PACKED:
        stream: Any = pa.input_stream(str(file), compression=PACKED[file.suffix])
    else:
        stream = file.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _unknown(file: Path) -> Rows:
    raise UserError(f"The data file {file} is of an unknown kind; give one of {', '.join(KINDS)}, also as .gz or .zst.")


def _jsonl(file: Path) -> Rows:
    with _opened(file) as lines:
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


def _json(file: Path) -> Rows:
    """A list of objects, or an object a line, as some name their JSON lines."""
    with _opened(file) as text:
        first = text.read(1)
        while first.isspace():
            first = text.read(1)
        lines = first == "{" and _is_json(first + text.readline())
    if lines:
        yield from _jsonl(file)
        return
    with _opened(file) as text:
        try:
            records = json.loads(text.read())
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(records, list):
        raise UserError(f"{file} must hold a list of objects; for one object a line, name it .jsonl.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f'{file}, item {number} must be an object such as {{"prompt": ...}}.')
        yield f"{file}, item {number}", record


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _parquet(file: Path) -> Rows:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", _without_nulls(record)


def _csv(file: Path) -> Rows:
    with _opened(file, newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        for record in reader:
            where = f"{file}, line {reader.line_num}"
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


_READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
KINDS = tuple(_READERS)
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS if kind != ".parquet" for packed in PACKED))


def _saved(path: Path, split: str) -> Any:
    """A dataset that `save_to_disk` wrote, with one split or several."""
    import datasets

    try:
        there: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged one makes of it
        raise UserError(f"The dataset in {path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    names = list(there) if isinstance(there, dict) else [split.partition("[")[0]]
    lengths = {name: len(there[name]) if isinstance(there, dict) else len(there) for name in names}
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except Exception as error:
        raise UserError(
            f"The dataset in {path} has no split {split!r} ({' '.join(str(error).split())[:200]}); it has "
            f"{', '.join(names)}. Set data.split."
        ) from error
    pieces = []
    for span in spans:
        piece = there[span.splitname] if isinstance(there, dict) else there
        pieces.append(piece if span.from_ is None and span.to is None else piece.select(range(span.from_ or 0, span.to)))
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _loaded(source: str, split: str, config: str | None) -> Any:
    here = Path(source).is_dir()  # a copy of a Hub repository, with its files in folders
    if not here and (source.count("/") > 1 or source.startswith((".", "/"))):
        raise UserError(f"There is no data file or directory {source}; check data.train and data.eval.")
    import datasets

    try:
        return datasets.load_dataset(source, *([] if config is None else [config]), split=split)
    except Exception as error:
        told = " ".join(str(error).split())
        remedy = "It has several configurations: set data.config to one of them." if "onfig name is missing" in told else ""
        if "Unknown split" in told:
            remedy = "Set data.split to one that it has."
        what = "a dataset" if here else "neither a file here nor a dataset on the Hub"
        if remedy:
            raise UserError(f"{source} cannot be read with split {split!r}: {told[:400]}", remedy) from error
        raise UserError(f"{source} is {what} with a split {split!r}: {told[:300]}") from error
