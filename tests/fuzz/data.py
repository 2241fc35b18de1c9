"""Data files that are none, of every format."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .hostile import DICTIONARY, LONG, TEXTS, deep, mutated
from .world import Case, World

COUNT = 1000
SLOW = 12.0
COLUMNS = ("prompt", "completion", "messages", "answer", "source", "tools", "reasoning_gym", "unused")
MESSAGES = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def rows(rng: random.Random) -> list[dict[Any, Any]]:
    """Sound rows, of which one or two have a cell that nobody should write."""
    out: list[dict[Any, Any]] = [
        {"prompt": f"{n}+1=", "completion": str(n + 1), "answer": str(n + 1), "source": "ab"[n % 2]} for n in range(1, 7)
    ]
    if rng.random() < 0.3:
        out = [{"messages": MESSAGES} for _ in out]
    for _ in range(rng.randint(1, 2)):
        row = rng.choice(out)
        name = rng.choice(COLUMNS)
        value = rng.choice(DICTIONARY)
        if name in ("messages", "tools", "prompt") and rng.random() < 0.5:
            role = rng.choice(("user", "system", "tool", "", None, 5, "\x1b[31m", LONG[:500]))
            value = [{rng.choice(("role", "rôle")): role, rng.choice(("content", "tool_calls", "name")): value}]
        if rng.random() < 0.15:
            row.clear()
        row[rng.choice((name, name, name, "x", "", "\0", "\x1b[31m"))] = value
    return out


def as_jsonl(table: list[dict[Any, Any]]) -> bytes:
    return "".join(json.dumps(row, default=str) + "\n" for row in table).encode("utf-8", "surrogatepass")


def as_raw_jsonl(table: list[dict[Any, Any]]) -> bytes:
    return "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in table).encode("utf-8", "surrogatepass")


def as_json(table: list[dict[Any, Any]]) -> bytes:
    return json.dumps(table, default=str).encode()


def as_csv(table: list[dict[Any, Any]]) -> bytes:
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in table for name in row))
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(table: list[dict[Any, Any]]) -> bytes:
    names = list(dict.fromkeys(str(name) for row in table for name in row))
    columns = {}
    for name in names:
        cells = [row.get(name) for row in table]
        try:
            columns[name] = pa.array(cells)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            columns[name] = pa.array(
                [None if cell is None else str(cell)[:50_000].encode("utf-8", "replace").decode() for cell in cells]
            )
    out = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), out)
    except pa.ArrowException:  # a struct without a field
        out = io.BytesIO()
        pq.write_table(pa.table({name: pa.array([str(cell) for cell in column]) for name, column in columns.items()}), out)
    return out.getvalue()


def packed(write: Callable[[list[dict[Any, Any]]], bytes]) -> Callable[[list[dict[Any, Any]]], bytes]:
    return lambda table: gzip.compress(write(table))


def zstd(table: list[dict[Any, Any]]) -> bytes:
    return bytes(pa.compress(as_jsonl(table), codec="zstd", asbytes=True))


FORMATS: dict[str, Callable[[list[dict[Any, Any]]], bytes]] = {
    "a.jsonl": as_jsonl,
    "b.jsonl": as_raw_jsonl,
    "c.json": as_json,
    "d.csv": as_csv,
    "e.parquet": as_parquet,
    "f.jsonl.gz": packed(as_jsonl),
    "g.csv.gz": packed(as_csv),
    "h.jsonl.zst": zstd,
}


def whole(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def table(**columns: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pq.write_table(
            pa.table(
                {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
            ),
            folder / "x.parquet",
        )
        return folder / "x.parquet"

    return make


def linked(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jsonl")
    return folder / "pipe.jsonl"


def directory(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def twice(folder: Path) -> Path:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["1="]), pa.array(["2="])], names=["prompt", "prompt"]), folder / "x.parquet"
    )
    return folder / "x.parquet"


def saved(damage: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import datasets

        datasets.disable_progress_bars()
        place = folder / "saved"
        datasets.Dataset.from_list([{"prompt": f"{n}="} for n in range(5)]).save_to_disk(str(place))
        rng = random.Random(damage)
        for file in sorted(place.iterdir()):
            if damage in file.name:
                file.write_bytes(mutated(file.read_bytes(), rng))
        return place

    return make


ODD: list[Callable[[Path], Path]] = [
    *(
        whole(f"x{suffix}", b"")
        for suffix in (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".jsonl.zst", ".txt", "")
    ),
    whole("x.jsonl", b'{"prompt": ' + deep(1000).encode() + b"}\n"),
    whole("x.jsonl", b'{"prompt": "1=", "unused": ' + deep(100_000).encode() + b"}\n"),
    whole("x.json", deep(100_000).encode()),
    whole("x.json", b'[{"prompt": ' + b'{"a": ' * 3000 + b"1" + b"}" * 3001 + b"]"),
    whole("x.jsonl", b'{"prompt": "1=", "unused": ' + b"9" * 5000 + b"}\n"),
    whole("x.json", b'[{"prompt": ' + b"9" * 5000 + b"}]"),
    whole("x.jsonl", b'{"prompt": "1=", "unused": NaN, "answer": Infinity}\n'),
    whole("x.jsonl", b'{"prompt": "\\ud800"}\n'),
    whole("x.jsonl", b'{"prompt": "1=", "unused": "\\ud800", "answer": "\\udfff", "source": "\\ud800"}\n'),
    whole("x.jsonl", b'{"prompt": "1=", "completion": "\\ud800"}\n'),
    whole("x.jsonl", b'{"messages": [{"role": "\\ud800", "content": "x"}]}\n'),
    whole("x.jsonl", b'{"prompt": "' + b"1" * 30_000_000 + b'"}\n'),
    whole("x.jsonl", b"\n" * 1_000_000),
    whole("x.jsonl", b"{}\n" * 10_000),
    whole("x.jsonl", b"\xff\xfe{\x00}\x00"),
    whole("x.jsonl", b'\xef\xbb\xbf{"prompt": "1="}\n'),
    whole("x.jsonl", b'{"prompt": "1=", "prompt": "2="}\n'),
    whole("x.jsonl", b'{"\x1b]0;x\x07": 1}\n'),
    whole("x.jsonl", b'{"prompt": "1="}\r{"prompt": "2="}\x00\n'),
    whole("x\x1b[31m.jsonl", b'{"prompt": "1="\n'),
    whole("\udcff.jsonl", b'{"prompt": "1="\n'),
    whole("x.csv", b'prompt\n"1='),
    whole("x.csv", b"prompt\n\x00\n"),
    whole("x.csv", b"prompt,prompt\n1=,2=\n"),
    whole("x.csv", b"\n\n\n"),
    whole("x.csv", b"prompt\n" + b"1" * 20_000_000 + b"\n"),
    whole("x.csv", b",,,\n1,2,3,4\n"),
    whole("x.jsonl.gz", gzip.compress(b'{"prompt": "' + b" " * 200_000_000 + b'"}\n')),
    whole("x.jsonl.gz", gzip.compress(b'{"prompt": "1="}\n')[:-9]),
    whole("x.jsonl.gz", gzip.compress(b'{"prompt": "1="}\n') + b"junk after"),
    whole("x.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 40),
    whole("x.parquet", b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1"),
    whole("x.parquet", b"PAR1\0\0\0\0PAR1"),
    table(prompt=["1=", None, "3="], unused=pa.array([datetime.date(1, 1, 1), None, None])),
    table(prompt=["1="], unused=pa.array([2**62], pa.timestamp("ms"))),
    table(prompt=["1="], unused=pa.array([2**31 - 1], pa.date32())),
    table(prompt=["1="], unused=pa.array([2**62], pa.date64())),
    table(prompt=["1="], unused=pa.array([2**62], pa.duration("s"))),
    table(prompt=["1="], unused=pa.array([2**63 - 1], pa.time64("ns"))),
    table(prompt=["1="], unused=pa.array([0], pa.timestamp("ns", "No/Where"))),
    table(prompt=["1="], unused=pa.array([decimal.Decimal("1e30")], pa.decimal256(70, 3))),
    table(prompt=pa.array([2**62], pa.timestamp("ms"))),
    table(prompt=pa.array([b"\xff\xfe"], pa.binary())),
    table(prompt=pa.array([b"\xff\xfe"], pa.binary()).view(pa.utf8()) if hasattr(pa.Array, "view") else ["1="]),
    table(prompt=pa.nulls(3)),
    table(prompt=pa.array([["1="], []])),
    table(messages=pa.array([[{"role": "user", "content": None}], []])),
    table(messages=pa.array([[{"role": "user", "content": [{"type": "image", "text": None}]}]])),
    table(messages=pa.array([[("role", "user")]], pa.map_(pa.utf8(), pa.utf8()))),
    table(prompt=pa.array(["1="]).dictionary_encode(), tools=pa.array([[{"x": 1}]])),
    table(prompt=pa.array([], pa.utf8())),
    twice,
    linked("x.jsonl", "/dev/zero"),
    linked("x.jsonl", "/dev/full"),
    linked("x.jsonl", "x.jsonl"),
    linked("x.jsonl", "/nonexistent"),
    linked("x.parquet", "/dev/null"),
    linked("x.jsonl", "/proc/self/mem"),
    linked("x.jsonl", "/etc"),
    pipe,
    directory("x.jsonl"),
    directory("empty"),
    saved("state"),
    saved("dataset_info"),
    saved("data-"),
    saved("nothing"),
]


def attack(case: Case, world: World) -> None:
    scene = world.scene(case)
    rng = scene.rng
    folder = scene.path / "data"
    folder.mkdir()
    names = list(FORMATS)
    if case.number % 5 == 4:
        at = (case.number // 5) % len(ODD)
        file = ODD[at](folder)
        case.told = f"odd file {at}, {file.name!r}"
    else:
        name = names[case.number % len(names)]
        content = FORMATS[name](rows(rng))
        broken = case.number % 5 >= 2
        if broken:
            if name.endswith(".gz") and rng.random() < 0.7:
                content = gzip.compress(mutated(gzip.decompress(content), rng))
            else:
                content = mutated(content, rng)
        file = whole(name, content)(folder)
        case.told = f"{name} with {'damaged bytes' if broken else 'hostile cells'}"
        if rng.random() < 0.1:
            file = folder
    options: dict[str, Any] = {"train": str(file)}
    if rng.random() < 0.2:
        options["columns"] = {rng.choice(COLUMNS[:-1]): rng.choice(("prompt", "unused", "x", rng.choice(TEXTS)[:50]))}
    if rng.random() < 0.2:
        options |= {"train": str(world.data), "eval": str(file)}
    command = rng.choice(
        (
            ("data",),
            ("data", "--row=1"),
            ("distill", "--dry-run"),
            ("distill", "--dry-run"),
            ("sft", "--dry-run"),
            ("distill",),
        )
    )
    case.told += f", {' '.join(command)}"
    sections: dict[str, Any] = {"data": options}
    if "eval" in options:
        sections["evaluation"] = {"tasks": ["answer"], "kl_prompts": 2}
    if command == ("distill",):
        sections["training"] = {"max_steps": 2}
    config = scene.write_config(world.tree(scene.run, sections))
    name, *flags = command
    scene.npd(name, str(config), *flags, slow=SLOW)
    scene.finish()
    scene.check_finished()
