"""A part's values are looked at where they are read back: what can stand there passes, all else is damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench import VOCABULARY, Bench
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npd.errors import UserError
from npd.store.answers import LEAST, ROUNDING, wrong_ids, wrong_logprobs, wrong_part, wrong_top
from npd.store.schema import SCHEMA
from npd.train.samples import Samples


@given(
    hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 6), elements={"allow_subnormal": True}),
    st.booleans(),
)
def test_log_probabilities_are_judged_one_by_one(values, finite):
    """The fast test against the plain one."""
    floats = values.astype(np.float64)
    limit = float(np.float16(ROUNDING)) if values.dtype == np.float16 else ROUNDING
    right = [x <= limit and (x >= LEAST if finite else not np.isnan(x)) for x in floats.tolist()]
    assert (wrong_logprobs(values, finite=finite) is None) == all(right)


@given(st.sampled_from([np.float16, np.float32]), st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 0.5, 0.0, -0.0, -70000]))
def test_special_values_are_told_apart(dtype, value):
    with np.errstate(over="ignore"):
        values = np.array([-1, value, -2]).astype(dtype)
    assert (wrong_logprobs(values) is None) == (value == 0)
    below = bool(value < 0) and np.isneginf(values[1].astype(np.float64))
    assert (wrong_logprobs(values, finite=False) is None) == (value == 0 or below or (value == -70000))


def test_ids_and_tops():
    assert wrong_ids(np.array([0, 19]), 20) is None
    assert wrong_ids(np.array([0, 20]), 20) == "token 20 of a vocabulary of 20"
    assert "token -1" in (wrong_ids(np.array([-1]), None) or "")
    ids, values = np.array([[1, 2], [2, 3]]), np.log([[0.5, 0.5], [0.9, 0.1]])
    assert wrong_top(ids, values) is None
    assert "token 2 more than once at position 1" in (wrong_top(np.array([[1, 2], [2, 2]]), values) or "")
    assert "1.8 in sum at position 1" in (wrong_top(ids, np.log([[0.5, 0.5], [0.9, 0.9]])) or "")


@pytest.fixture
def bench(tmp_path) -> Bench:
    bench = Bench(tmp_path / "run")
    bench.store.vocabulary_size = VOCABULARY
    return bench


def edit(path: Path, name: str, row: int, change: Any) -> None:
    """Another value, as somebody writes it who knows the format: every checksum is right."""
    table = pq.read_table(path)
    values = table[name].to_pylist()
    values[row] = change(values[row])
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array(values, SCHEMA.field(name).type)), path, write_page_checksum=True)


def first(value: Any) -> Any:
    return lambda values: [value, *values[1:]]


EDITS: list[tuple[str, Any]] = [
    ("response_ids", first(VOCABULARY)),
    ("response_ids", first(-1)),
    ("response_ids", first(None)),
    ("response_ids", lambda values: []),
    ("response_ids", lambda values: None),
    ("response_ids", lambda values: [*values, 3]),
    ("prompt_ids", first(1 << 30)),
    ("prompt_ids", lambda values: []),
    ("behavior_logprobs", first(0.5)),
    ("behavior_logprobs", first(float("nan"))),
    ("behavior_logprobs", first(float("-inf"))),
    ("behavior_logprobs", lambda values: [*values[1:], -1.0, -1.0]),
    ("topk_ids", first(VOCABULARY)),
    ("topk_ids", first(-7)),
    ("topk_ids", lambda values: values[1:]),
    ("topk_logprobs", first(5.0)),
    ("topk_logprobs", first(float("nan"))),
    ("topk_logprobs", lambda values: values[1:]),
    ("topk_logprobs", first(None)),
    ("verdict", lambda value: None),
    ("finish_reason", lambda value: "\x1b[2Jwhatever"),
    ("policy_version", lambda value: -5),
    ("teacher_nll", lambda value: -3.0),
    ("student_nll", lambda value: float("nan")),
]


@pytest.mark.parametrize(("name", "change"), EDITS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EDITS)])
def test_an_edited_part_is_damaged(bench, name, change):
    """Found by whoever mends an unfinished generation, and by whoever reads it for training."""
    path = bench.write(0, 1)
    assert wrong_part(bench.store.read_part(0, 1), VOCABULARY) is None
    edit(path, name, 1, change)
    bench.store.read_part(0, 1)  # it is whole, and a report may show it
    with pytest.raises(UserError, match=rf"part-00001.parquet is damaged \(({name}|row 1) .*Delete it") as caught:
        bench.store.read_part(0, 1, check=True)
    assert str(caught.value).isprintable()
    if name in ("response_ids", "prompt_ids", "behavior_logprobs", "topk_ids", "topk_logprobs", "verdict"):
        with pytest.raises(UserError, match="is damaged"):
            Samples(bench.store).fetch(0, 1)
    bench.books.mend(0)
    assert not path.exists()
    assert "was damaged; it is made again" in bench.said.getvalue()


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_a_part_of_other_rows_is_damaged(bench, rows):
    path = bench.write(0, 1)
    table = pq.read_table(path)
    assert len(table) == 3
    pq.write_table(pa.concat_tables([table, table]).slice(0, rows), path)
    assert bench.books.begun_by(0) == (0 if rows else None)
    bench.books.mend(0)
    assert not path.exists()


def test_columns_of_other_types_are_damage(bench):
    path = bench.write(0, 0)
    table = pq.read_table(path)
    for name, type_ in (("topk_ids", pa.list_(pa.float32())), ("topk_logprobs", pa.list_(pa.int32()))):
        at, column = table.column_names.index(name), table[name].cast(pa.list_(pa.float32())).cast(type_, safe=False)
        pq.write_table(table.set_column(at, name, column), path)
        with pytest.raises(UserError, match=f"{name} holds values of type"):
            bench.store.read_part(0, 0, check=True)


def test_what_is_damaged_while_the_books_are_closed_is_found_by_the_manifest(bench, monkeypatch):
    """A part is hashed before it is read: another content is not what the manifest says."""
    for part in range(3):
        bench.write(0, part)
    real = bench.store.read_part

    def meanwhile(generation: int, part: int, columns: Any = None, **options: Any) -> pa.Table:
        table = real(generation, part, columns, **options)
        if part == 1:
            edit(bench.store.part(0, 1), "topk_ids", 0, first(3))
        return table

    monkeypatch.setattr(bench.store, "read_part", meanwhile)
    bench.books.finish(0)
    with pytest.raises(UserError, match=r"part-00001.parquet is damaged"):
        bench.store.check_generation(0)
    bench.books.mend(0)
    assert bench.books.missing(0) == [1]
