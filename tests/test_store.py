"""The run directory: whole files or none, and damage that is noticed and explained."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_run import step_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npd
import npd.store
from npd.config import load_config
from npd.observe.events import Events, SpanName
from npd.records import Line, Manifest, SelectionSummary
from npd.store import SCHEMA, Store, write_json, write_text, writing
from npd.store.files import HOST
from npd.train.trainer import Trainer

# -- parts


int32s = st.integers(-(2**31), 2**31 - 1)
floats = st.floats(width=32, allow_nan=False)
CELLS = {
    pa.string(): st.text(max_size=8),
    pa.int32(): int32s,
    pa.float32(): floats,
    pa.list_(pa.int32()): st.lists(int32s, max_size=6),
    pa.list_(pa.float32()): st.lists(floats, max_size=6),
    pa.list_(pa.float16()): st.lists(st.floats(width=16, allow_nan=False), max_size=6),
}
ROWS = st.lists(
    st.fixed_dictionaries({field.name: st.none() | CELLS[field.type] for field in SCHEMA}), min_size=1, max_size=5
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, part=st.integers(0, 99_999), generation=st.integers(0, 999))
def test_parts_read_back_as_written(tmp_path, rows, part, generation):
    store = Store(tmp_path)
    store.write_part(generation, part, pa.Table.from_pylist(rows, schema=SCHEMA))
    table = store.read_part(generation, part)
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows
    assert store.read_part(generation, part, ["source", "topk_ids"]).to_pylist() == [
        {"source": row["source"], "topk_ids": row["topk_ids"]} for row in rows
    ]


def finish(store: Store, generation: int, count: int) -> None:
    """Write the manifest of a generation of so many parts."""
    parts = store.part_entries(generation, count)
    store.finish_generation(Manifest(generation, 6 * count, parts, generation, SelectionSummary(0, {}, {})))


def some_table(rows: int = 6) -> pa.Table:
    rng = np.random.default_rng(rows)
    return pa.table(
        {
            "topk_ids": pa.array([rng.integers(0, 99, 40).tolist() for _ in range(rows)], pa.list_(pa.int64())),
            "behavior_logprobs": pa.array([rng.normal(size=10).tolist() for _ in range(rows)], pa.list_(pa.float64())),
            "sample_id": pa.array([f"s{i}" for i in range(rows)]),
            "foreign": pa.array(range(rows)),
        }
    )


def test_a_part_has_the_contracts_columns_whatever_the_stages_added(tmp_path):
    store = Store(tmp_path)
    store.write_part(0, 0, some_table())
    table = pq.read_table(store.part(0, 0))
    assert table.schema.equals(SCHEMA)
    assert table["topk_ids"].to_pylist() == some_table()["topk_ids"].to_pylist()
    assert table["teacher_nll"].null_count == 6


def test_top_k_takes_few_bytes(tmp_path):
    """At most 40 bytes a token at K = 10, of a teacher whose ids and log-probabilities hardly repeat."""
    rng, tokens, k = np.random.default_rng(0), 20_000, 10
    ids = np.minimum(np.exp(rng.uniform(0, np.log(150_000), (tokens, k))), 149_999).astype(np.int32)
    logprobs = np.log(-np.sort(-rng.dirichlet(np.full(k + 1, 0.3), tokens), axis=1)[:, :k] + 1e-12).astype(np.float32)
    table = pa.table({"topk_ids": [ids.ravel()], "topk_logprobs": [logprobs.ravel()]})
    store = Store(tmp_path)
    store.write_part(0, 0, table)
    assert store.part(0, 0).stat().st_size < 40 * tokens
    read = store.read_part(0, 0)
    np.testing.assert_array_equal(read["topk_ids"][0].values.to_numpy(), ids.ravel())
    np.testing.assert_allclose(read["topk_logprobs"][0].values.to_numpy(), logprobs.ravel(), rtol=2**-11)


def test_the_same_table_gives_the_same_bytes(tmp_path):
    store = Store(tmp_path)
    for part in (0, 1):
        store.write_part(0, part, some_table())
    assert store.part(0, 0).read_bytes() == store.part(0, 1).read_bytes()


# -- whole or not at all


def files_in(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


class Stop(BaseException):
    """Neither an error nor an exit: what nobody catches."""


@pytest.mark.parametrize("error", [ValueError("bad"), Stop(), KeyboardInterrupt()])
def test_an_exception_while_writing_leaves_nothing(tmp_path, error):
    target = tmp_path / "sub" / "file.txt"

    def half_a_file() -> None:
        with writing(target) as aside:
            aside.write_text("half")
            assert not target.exists()
            raise error

    def half_a_directory() -> None:
        with writing(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / "one").write_text("half")
            raise error

    for write in (half_a_file, half_a_directory):
        with pytest.raises(type(error)):
            write()
    assert files_in(tmp_path) == set()
    assert list(tmp_path.glob("*")) == [tmp_path / "sub"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def fail() -> None:
        with writing(target) as aside:
            aside.write_text("new, half")
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"
    assert files_in(tmp_path) == {"file.txt"}


def test_what_is_written_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(*args):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    noted("fsync")
    noted("replace")
    with writing(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "a").write_text("a")
        (aside / "b").write_text("b")
    assert calls == ["fsync", "fsync", "replace"]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    for names in (("a", "b"), ("c",)):
        with writing(tmp_path / "model") as aside:
            aside.mkdir()
            for name in names:
                (aside / name).write_text(name)
    assert files_in(tmp_path) == {"model/c"}


# -- opening


NOBODY = 2**22  # the number of no process: Linux's are smaller, whatever its settings


def test_leftovers_of_a_killed_writer_are_removed(tmp_path, make_tree):
    tree = make_tree()
    store = Store(tree["run_dir"])
    store.open(load_config(tree), "distill")
    gone = f"{HOST}.{NOBODY}.tmp"
    half = (f".metrics.jsonl.{gone}", f"generations/g000/.part-00000.parquet.{HOST}.{os.getpid()}.tmp")
    for name in (*half, "logs/refresh-0.progress.json"):
        (store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.path / name).write_text("half")
    for name in (f"policy/.v000001.{gone}", f"checkpoints/.step-000003.{HOST}.trainer.tmp"):
        (store.path / name).mkdir(parents=True)
        (store.path / name / "model.safetensors").write_text("half")
    store.open(load_config(tree), "distill")
    assert files_in(store.path) == {"config.yaml"}
    assert store.policies() == store.checkpoints() == []


def test_what_others_are_writing_stays(make_tree):
    tree = make_tree()
    store = Store(tree["run_dir"])
    store.open(load_config(tree), "distill")
    mine = store.generation(0) / f".part-00000.parquet.{HOST}.{os.getppid()}.tmp"
    theirs, forgotten = (store.generation(0) / f".part-0000{n}.parquet.elsewhere.{NOBODY}.tmp" for n in (1, 2))
    for file in (mine, theirs, forgotten):
        write_text(file, "half")
    os.utime(forgotten, (0, 0))
    store.open(load_config(tree), "distill")
    assert mine.exists()  # of a process that lives
    assert theirs.exists()  # of a machine that cannot be asked
    assert not forgotten.exists()


def test_a_writer_killed_before_its_first_file_does_not_block_the_directory(make_tree):
    tree = make_tree()
    run_dir = Path(tree["run_dir"])
    run_dir.mkdir()
    (run_dir / f".config.yaml.{HOST}.{NOBODY}.tmp").write_text("run_d")
    Store(run_dir).open(load_config(tree), "distill")
    assert files_in(run_dir) == {"config.yaml"}


def test_a_foreign_directory_is_refused_and_untouched(make_tree):
    tree = make_tree()
    run_dir = Path(tree["run_dir"])
    run_dir.mkdir()
    (run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(npd.UserError, match="is not empty and holds no run of npd; choose another run_dir"):
        npd.distill(tree)
    assert files_in(run_dir) == {"thesis.tex"}


def test_another_configuration_is_refused_with_the_keys_that_differ(make_tree):
    store = Store(make_tree()["run_dir"])
    store.open(load_config(make_tree()), "distill")
    was = (store.path / "config.yaml").read_text()
    changed = make_tree(loss={"kd_weight": 0.5}, rollout={"temperature": 0.7}) | {"seed": 9}
    with pytest.raises(npd.UserError) as caught:
        store.open(load_config(changed), "distill")
    text = str(caught.value)
    assert "made by another configuration" in text
    for line in ("loss.kd_weight: 0.9 -> 0.5", "rollout.temperature: 1.0 -> 0.7", "seed: 0 -> 9"):
        assert line in text
    assert text.count("->") == 3
    assert "Choose another run_dir" in text
    with pytest.raises(npd.UserError, match="holds a run of `npd distill`; choose another run_dir for `npd sft`"):
        store.open(load_config(make_tree()), "sft")
    assert (store.path / "config.yaml").read_text() == was
    # Where a run lies, how often it saves and who watches are free.
    store.open(load_config(make_tree(checkpoint={"every_steps": 77}, training={"micro_batch_rows": 4})), "distill")


@pytest.mark.parametrize("text", ["{", "just words", "- a\n- list\n", ""])
def test_a_damaged_config_is_explained(make_tree, text):
    store = Store(make_tree()["run_dir"])
    store.open(load_config(make_tree()), "distill")
    (store.path / "config.yaml").write_text(text)
    with pytest.raises(npd.UserError, match=r"config\.yaml is damaged"):
        store.open(load_config(make_tree()), "distill")


# -- snapshots and checkpoints


def save_stub(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * 9)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_tidying_keeps_the_first_snapshot_and_the_newest_of_each(tmp_path, keep):
    store = Store(tmp_path)
    for version in range(6):
        store.publish(version, save_stub, step=version)
        assert (tmp_path / "policy/LATEST").read_text() == f"v{version:06d}\n"
        for part in (0, 1):
            store.write_part(version, part, some_table())
        finish(store, version, 2)
        for _ in range(2):  # the second time changes nothing
            store.tidy(version, keep)
            newest = set(range(max(0, version - keep + 1), version + 1))
            assert store.policies() == sorted({0} | newest)
            assert {g for g in range(6) if store.parts(g)} == newest
    assert store.check_model(store.policy(5))["policy_version"] == 5
    for generation in range(6):
        manifest = store.manifest(generation)
        assert manifest is not None
        assert manifest.removed == (generation <= 5 - keep)
        assert len(manifest.parts) == 2  # what was there is still known


def test_tidying_spares_what_an_older_checkpoint_leads_back_to(tmp_path):
    store = Store(tmp_path)
    for version in range(5):
        store.publish(version, save_stub, step=version)
        store.write_part(version, 0, some_table())
    store.tidy(2, keep=1)
    assert store.policies() == [0, 2, 3, 4]
    assert [g for g in range(5) if store.parts(g)] == [2, 3, 4]


@pytest.mark.parametrize("crash", range(6))
def test_tidying_goes_on_where_a_crash_stopped_it(tmp_path, monkeypatch, crash):
    store = Store(tmp_path)
    for generation in range(4):
        for part in (0, 1):
            store.write_part(generation, part, some_table())
        finish(store, generation, 2)
    real, left = Path.unlink, [crash]

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-"):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Stop):
            store.tidy(3, keep=1)
    store.tidy(3, keep=1)
    assert [len(store.parts(g)) for g in range(4)] == [0, 0, 0, 2]
    assert [manifest.removed for g in range(4) if (manifest := store.manifest(g))] == [True, True, True, False]


def test_publishing_again_finishes_what_a_crash_left(tmp_path):
    store = Store(tmp_path)
    for version in range(3):
        store.publish(version, save_stub, step=version)
    (tmp_path / "policy/LATEST").write_text("v000001\n")  # killed after the rename of v2

    def never(path: Path) -> None:
        raise AssertionError("a finished snapshot is never made twice")

    store.publish(2, never, step=2)
    assert (tmp_path / "policy/LATEST").read_text() == "v000002\n"
    shutil.rmtree(store.policy(1))
    store.publish(1, save_stub, step=1)  # trained again from an older checkpoint
    assert store.policies() == [0, 1, 2]
    assert (tmp_path / "policy/LATEST").read_text() == "v000002\n"


def save_checkpoint(store: Store, step: int, keep: int) -> None:
    store.save_checkpoint(step, save_stub, {"step": step}, keep, main=True, wait=lambda: None)


def test_checkpoints_keep_the_newest(tmp_path):
    store = Store(tmp_path)
    for step in (3, 6, 9, 12):
        save_checkpoint(store, step, keep=2)
    assert store.checkpoints() == [9, 12]
    assert (tmp_path / "checkpoints/LATEST").read_text() == "step-000012\n"


def flip(part: Path, column: str) -> None:
    """One bit of a column's values. What lies between columns tells nothing, and has no checksum but the manifest's."""
    content = bytearray(part.read_bytes())
    content[pq.read_metadata(part).row_group(0).column(SCHEMA.names.index(column)).data_page_offset + 60] ^= 1
    part.write_bytes(content)


def damage(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_snapshot_is_named(make_tree, how):
    tree = make_tree()
    npd.refresh(tree)
    weights = Path(tree["run_dir"]) / "policy/v000000/model.safetensors"
    if how == "flip":
        damage(weights)
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
    with pytest.raises(
        npd.UserError, match=r"snapshot .*v000000 is damaged: model.safetensors is (not what|missing)"
    ) as caught:
        npd.refresh(tree)  # the second generation would be sampled from it
    assert "Restore it" in str(caught.value)


def stop_at_step(monkeypatch, stop: int):
    """Before the step after step `stop`."""
    real = Trainer.step

    def step(self, *args):
        if args[3] > stop:  # the step's number
            raise Stop
        return real(self, *args)

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "npd.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(make_tree, monkeypatch, name):
    whole = npd.distill(make_tree("whole", checkpoint={"every_steps": 1}))
    tree = make_tree(checkpoint={"every_steps": 1})
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        with pytest.raises(Stop):
            npd.distill(tree)
    store = Store(tree["run_dir"])
    newest = store.checkpoint(store.checkpoints()[-1])
    assert len(store.checkpoints()) == 2
    file = newest / name
    good = file.read_bytes()
    middle = len(good) // 2
    for bad in (good[:middle], good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]):
        file.write_bytes(bad)
        with pytest.raises(npd.UserError, match=rf"{newest.name}.* is damaged.*Delete it and run the same command"):
            npd.distill(tree)
    shutil.rmtree(newest)
    again = npd.distill(tree)
    assert (again.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


# -- damaged generations


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1))
def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path, at):
    store = Store(tmp_path)
    store.write_part(0, 0, some_table())
    finish(store, 0, 1)
    store.check_generation(0)
    damage(store.part(0, 0), at)
    with pytest.raises(npd.UserError, match=r"part-00000.parquet is damaged.*Delete it and run the same command again"):
        store.check_generation(0)


def test_page_checksums_are_verified_where_no_manifest_is_yet(tmp_path):
    store = Store(tmp_path)
    store.write_part(0, 0, some_table(200))
    good = store.part(0, 0).read_bytes()
    flip(store.part(0, 0), "topk_ids")
    with pytest.raises(npd.UserError, match=r"part-00000.parquet is damaged"):
        store.read_part(0, 0)
    store.part(0, 0).write_bytes(good[: len(good) // 2])
    with pytest.raises(npd.UserError, match=r"part-00000.parquet is damaged"):
        store.read_part(0, 0, ["sample_id"])


@pytest.mark.parametrize("how", ["damaged", "deleted"])
def test_a_lost_part_is_made_again_identical(make_tree, how):
    tree = make_tree()
    npd.refresh(tree)
    store = Store(tree["run_dir"])
    before = {path.name: path.read_bytes() for path in store.generation(0).iterdir()}
    for part in (0, 2):
        if how == "damaged":
            damage(store.part(0, part))
        else:
            store.part(0, part).unlink()
    npd.distill(tree)
    assert {path.name: path.read_bytes() for path in store.generation(0).iterdir()} == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_part_damaged_while_the_run_is_under_way_is_made_again(make_tree, monkeypatch, finished):
    """Found when the trainer takes it, if its generation has no manifest to compare with."""
    whole = npd.distill(make_tree("whole"))
    tree = make_tree()
    store = Store(tree["run_dir"])
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        with pytest.raises(Stop):
            npd.distill(tree)
    was = store.part(0, 1).read_bytes()
    flip(store.part(0, 1), "topk_ids")
    if not finished:
        (store.generation(0) / "manifest.json").unlink()
    again = npd.distill(tree)
    assert store.part(0, 1).read_bytes() == was
    assert (again.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def test_a_damaged_part_whose_snapshot_is_gone_is_named(make_tree, monkeypatch):
    tree = make_tree()
    store = Store(tree["run_dir"])
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)  # later than the first checkpoint, or the start would be published again
        with pytest.raises(Stop):
            npd.distill(tree)
    shutil.rmtree(store.policy(0))
    damage(store.part(0, 1))
    with pytest.raises(npd.UserError, match=r"must be made again, but the snapshot .*v000000 .* is no longer kept"):
        npd.distill(tree)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"parts": []}'])
def test_a_damaged_manifest_is_named_and_made_again(make_tree, text):
    tree = make_tree()
    npd.refresh(tree)
    manifest = Store(tree["run_dir"]).generation(0) / "manifest.json"
    was = manifest.read_bytes()
    manifest.write_text(text)
    with pytest.raises(npd.UserError, match=r"manifest.json is damaged.*Delete it and run the same command again"):
        npd.distill(tree)
    manifest.unlink()
    npd.distill(tree)
    assert manifest.read_bytes() == was


# -- a full disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def arrow_full_disk(*args, **kwargs):
    raise pa.ArrowException("IOError: [Errno 28] Error writing bytes to file. Detail: No space left on device")


PLACES = [
    pytest.param(os, "replace", full_disk, id="replace"),
    pytest.param(os, "fsync", full_disk, id="fsync"),
    pytest.param(pq, "write_table", full_disk, id="part"),
    pytest.param(pq, "write_table", arrow_full_disk, id="part, arrow's error"),
    pytest.param(torch, "save", full_disk, id="checkpoint"),
    pytest.param(Path, "write_text", full_disk, id="text"),
]


@pytest.mark.parametrize("allowed", [0, 1, 4])
@pytest.mark.parametrize(("owner", "name", "failure"), PLACES)
def test_a_full_disk_is_one_paragraph_and_the_run_goes_on(make_tree, tmp_path, monkeypatch, owner, name, failure, allowed):
    """The disk fills up at the first such call, or after some that still went well."""
    tree = make_tree("full", checkpoint={"every_steps": 1})
    real, left = getattr(owner, name), [allowed]

    def limited(*args, **kwargs):
        left[0] -= 1
        return real(*args, **kwargs) if left[0] >= 0 else failure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        with pytest.raises(npd.RunError, match=r"The disk is full: .* could not be written") as caught:
            npd.distill(tree)
    assert left[0] < 0
    assert "free some space and run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(Path(tree["run_dir"]).rglob(".*.tmp"))
    assert npd.distill(tree).student.is_dir()


def test_lines_explain_a_full_disk_too(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr("npd.store.files.opened", lambda path, mode="a": Path("/dev/full").open(mode))  # noqa: SIM115
    with pytest.raises(npd.RunError, match=r"The disk is full: .*metrics.jsonl"):
        Store(tmp_path).append_metrics(Line(1))
    with (
        pytest.raises(npd.RunError, match=r"The disk is full: .*events.jsonl"),
        Events(tmp_path / "events.jsonl").span(SpanName.TRAIN),
    ):
        pass


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied")


# -- lines


def test_metrics_survive_a_torn_line_and_a_rewind(tmp_path):
    store = Store(tmp_path)
    assert store.read_metrics() == []
    for step in range(1, 6):
        store.append_metrics(step_line(step, loss=1 / step))
    with store.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line.step for line in store.read_metrics()] == [1, 2, 3, 4, 5]
    store.rewind_metrics(3)
    store.append_metrics(step_line(4, loss=0.0))
    lines = [json.loads(line) for line in store.metrics.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.0)]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "deep/er/file.json", {"a": [1, "ä"]})
    assert json.loads((tmp_path / "deep/er/file.json").read_text()) == {"a": [1, "ä"]}


def test_a_file_never_takes_the_place_of_a_directory(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("x")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "file"]
