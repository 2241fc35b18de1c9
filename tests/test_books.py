"""What is there of a generation, what is missing or damaged, and a manifest that counts what is there; no models."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bench import Bench, damage, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npd.config import SelectionConfig
from npd.errors import RunError, UserError
from npd.generations.books import Books
from npd.generations.generation import ReferenceGenerations
from npd.observe.events import SpanName, read_events
from npd.registry import ENGINES
from npd.rollout.transformers import TransformersEngine
from npd.selection import QUANTILES
from npd.store import REFERENCE, SCHEMA, Store
from npd.store.schema import NO_POLICY


@pytest.fixture
def bench(tmp_path) -> Bench:
    """Ten prompts in three parts."""
    return Bench(tmp_path / "run")


def finished(bench: Bench, generation: int = 0, version: int | None = None) -> None:
    for part in range(len(bench.generations.parts(generation))):
        bench.write(generation, part, version)
    bench.books.finish(generation)


# -- what is there


def test_missing_parts_are_those_that_are_not_there(bench):
    assert bench.books.missing(0) == [0, 1, 2]
    bench.write(0, 1)
    bench.write(1, 0)
    assert bench.books.missing(0) == [0, 2]
    assert bench.books.missing(1) == [1, 2]
    (bench.store.generation(0) / ".part-00002.parquet.host.1.tmp").write_bytes(b"half")
    assert bench.books.missing(0) == [0, 2]


def test_begun_by_is_the_snapshot_that_wrote_what_there_is(bench):
    assert bench.books.begun_by(2) is None
    first, second = bench.write(2, 1, version=1), bench.write(2, 2, version=1)
    assert bench.books.begun_by(2) == 1
    first.write_bytes(b"no parquet")  # damaged, it will be made again; it says nothing
    assert bench.books.begun_by(2) == 1
    second.write_bytes(b"no parquet")
    assert bench.books.begun_by(2) is None


def test_begun_by_is_known_from_the_manifest_where_parts_are_gone(bench):
    finished(bench, 2, version=1)
    for part in range(3):
        bench.store.part(2, part).unlink()
    assert bench.books.begun_by(2) == 1
    assert bench.books.missing(2) == [0, 1, 2]


def test_references_are_begun_by_nobody(tmp_path):
    bench = Bench(tmp_path / "run", prompts_of(6, [2] * 6), ReferenceGenerations)
    bench.write(0, 0, version=NO_POLICY)
    assert bench.books.begun_by(0) == NO_POLICY


# -- what is damaged


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "with a manifest"])
@pytest.mark.parametrize(
    "how", [damage, lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.write_text("")]
)
def test_mend_deletes_what_is_damaged_and_names_it(bench, whole, how):
    finished(bench)
    if not whole:
        (bench.store.generation(0) / "manifest.json").unlink()
    kept = {part: bench.store.part(0, part).read_bytes() for part in (0, 2)}
    how(bench.store.part(0, 1))
    bench.books.mend(0)
    assert bench.books.missing(0) == [1]
    assert {part: bench.store.part(0, part).read_bytes() for part in (0, 2)} == kept
    assert bench.said.getvalue() == f"{bench.store.part(0, 1)} was damaged; it is made again.\n"
    bench.write(0, 1)  # the same bytes, so that the manifest stays
    assert (bench.store.manifest(0) is not None) == whole
    bench.books.mend(0)
    assert bench.books.missing(0) == []


def test_mend_compares_with_the_manifest_not_with_what_can_be_read(bench):
    finished(bench)
    whole = bench.store.part(0, 1).read_bytes()
    pq.write_table(pq.read_table(bench.store.part(0, 2)), bench.store.part(0, 1))
    bench.books.mend(0)
    assert bench.books.missing(0) == [1]
    bench.write(0, 1)
    assert bench.store.part(0, 1).read_bytes() == whole


def test_mend_leaves_what_is_whole(bench):
    bench.write(0, 2)
    bench.books.mend(0)
    finished(bench, 1)
    bench.books.mend(1)
    assert (bench.books.missing(0), bench.books.missing(1)) == ([0, 1], [])
    assert bench.said.getvalue() == ""


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=st.booleans(), data=st.data())
def test_whichever_byte_is_changed(tmp_path_factory, whole, data):
    """A part that is not its manifest's goes; one that no manifest knows goes, or can be read and has every column."""
    bench = Bench(tmp_path_factory.mktemp("damage") / "run", 3)
    file = bench.write(0, 0)
    if whole:
        bench.books.finish(0)
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    bench.books.mend(0)
    assert not (whole and file.exists())
    if file.exists():
        assert bench.store.read_part(0, 0).column_names == SCHEMA.names


def test_a_column_of_another_name_is_damage(bench):
    """The part's last bytes, which name its columns, have no checksum of their own."""
    file = bench.write(0, 0)
    whole = file.read_bytes()
    for name in (b"verdicu", b"verdic\xe9"):
        file.write_bytes(whole.replace(b"verdict", name))
        for columns in (None, ["sample_id", "verdict"]):
            with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
                bench.store.read_part(0, 0, columns)
    bench.books.mend(0)
    assert bench.books.missing(0) == [0, 1, 2]


def test_drop_if_damaged(bench):
    bench.books.drop_if_damaged(0, 0)  # it is not there: nothing to drop
    file = bench.write(0, 0)
    bench.books.drop_if_damaged(0, 0)
    assert file.exists()
    damage(file)
    bench.books.drop_if_damaged(0, 0)
    assert not file.exists()
    assert "was damaged; it is made again." in bench.said.getvalue()


# -- the manifest


def rows_of(store: Store, generation: int) -> list[dict]:
    return [
        row for part in sorted(store.parts(generation)) for row in pq.read_table(store.part(generation, part)).to_pylist()
    ]


@pytest.mark.parametrize("rule", ["none", "delta_ifd"])
def test_the_manifest_counts_what_is_there(tmp_path, rule):
    bench = Bench(tmp_path / "run", 30, selection={"rule": rule, "upper": 0.5})
    for part in range(len(bench.generations.parts(3))):
        bench.write(3, part, version=2)
    manifest = bench.books.finish(3)
    assert manifest == bench.store.manifest(3)
    rows = rows_of(bench.store, 3)
    assert (manifest.generation, manifest.rows, manifest.policy_version) == (3, len(rows), 2)
    assert len(rows) == 30
    for part, entry in enumerate(manifest.parts):
        content = bench.store.part(3, part).read_bytes()
        assert (entry.file, entry.bytes) == (f"part-{part:05d}.parquet", len(content))
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        assert entry.rows == sum(row["sample_id"].startswith(f"g003-p{part:05d}-") for row in rows)
    assert manifest.response_tokens == sum(len(row["response_ids"]) for row in rows)
    assert manifest.length_stops == sum(row["finish_reason"] == "length" for row in rows) > 0
    assert manifest.prompts == {"read": 30, "used": 30, "left_out": []}
    assert manifest.engine is None  # transformers is what others are compared with
    assert manifest.teachers == {}
    judged = {"": (manifest.selection, rows)}
    for source in "ab":
        judged[source] = manifest.selection.sources[source], [row for row in rows if row["source"] == source]
    for summary, mine in judged.values():
        assert summary.rows == len(mine)
        assert summary.verdicts == dict(Counter(row["verdict"] for row in mine))
        delta = np.array([row["delta_ifd"] for row in mine])
        expected = np.quantile(delta[np.isfinite(delta)], QUANTILES)
        np.testing.assert_allclose(list(summary.delta_ifd_quantiles.values()), expected, rtol=1e-6)
    assert (len(manifest.selection.verdicts) > 1) == (rule == "delta_ifd")


def test_rows_by_teacher(tmp_path):
    teachers = {"a": {"model": "ta"}, "c": {"model": "tc"}}
    bench = Bench(tmp_path / "run", prompts_of(10, sources=("a", "b", "c", "d")), teachers=teachers)
    finished(bench)
    counts = Counter(row["source"] for row in rows_of(bench.store, 0))
    manifest = bench.store.manifest(0)
    assert manifest is not None
    assert manifest.teachers == {
        "teacher": counts["b"] + counts["d"],
        "teachers.a": counts["a"],
        "teachers.c": counts["c"],
    }


class Rough(TransformersEngine):
    """An engine that is compared with transformers."""

    exact = False


def test_the_worst_check_of_an_engine_is_kept(tmp_path):
    ENGINES.register("rough", Rough)
    bench = Bench(tmp_path / "run", rollout={"engine": "rough"})
    figures = {"samples": 2, "tokens": 9, "mean_difference": -0.001}
    for generation, difference in ((0, 0.01), (0, 0.3), (0, 0.02), (1, 0.9)):
        bench.events.mark(SpanName.ENGINE, generation=generation, mean_abs_difference=difference, **figures)
    finished(bench)
    finished(bench, 2)
    first, third = bench.store.manifest(0), bench.store.manifest(2)
    assert first is not None
    assert first.engine is not None
    assert first.engine.mean_abs_difference == 0.3
    assert third is not None
    assert third.engine is None


def test_a_generation_is_not_finished_without_all_its_parts_whole(bench):
    for part in (0, 2):
        bench.write(0, part)
    with pytest.raises(FileNotFoundError):
        bench.books.finish(0)
    assert bench.store.manifest(0) is None
    bench.write(0, 1).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        bench.books.finish(0)
    assert bench.store.manifest(0) is None
    bench.write(0, 1)
    bench.books.finish(0)
    assert bench.store.manifest(0) is not None
    assert [span.facts["generation"] for span in read_events(bench.events.path, SpanName.FINISH)] == [0, 0, 0]


def test_references_have_no_snapshot(tmp_path):
    prompts = prompts_of(6, [2] * 6)
    schedule = {"references": 0.5, "prompts": 2, "generations": 1, "passes": 1, "lead": 0.0}
    bench = Bench(tmp_path / "run", prompts, schedule=schedule)
    finished(bench, REFERENCE, version=NO_POLICY)
    manifest = bench.store.manifest(REFERENCE)
    assert manifest is not None
    assert manifest.policy_version == NO_POLICY
    assert manifest.rows == bench.generations.size(REFERENCE)


def test_the_selection_is_asked_for_when_it_is_needed(bench):
    """`npd refresh --reselect` may have changed it since a follower began."""
    now = {"selection": SelectionConfig(rule="none")}
    books = Books(bench.config, bench.store, bench.generations, bench.display, bench.events, lambda: now["selection"])
    for part in range(3):
        bench.write(0, part)
    books.finish(0)
    books.check_some_kept(0)
    books.check_some_kept(1)  # it is not finished: nothing to say yet
    table = {part: bench.store.read_part(0, part) for part in range(3)}
    for part, rows in table.items():
        verdicts = ["disconnect"] * len(rows)
        at = rows.column_names.index("verdict")
        bench.store.write_part(0, part, rows.set_column(at, "verdict", [verdicts]))
    assert bench.store.manifest(0) is None
    now["selection"] = SelectionConfig(rule="delta_ifd", lower=-9.0, upper=-8.0)
    books.finish(0)
    with pytest.raises(RunError, match=r"dropped all 10 responses of this generation: 10 above selection\.upper -8"):
        books.check_some_kept(0)


def test_a_damaged_manifest_is_named(bench: Bench):
    finished(bench)
    file: Path = bench.store.generation(0) / "manifest.json"
    file.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged .* Delete it"):
        bench.books.mend(0)
