"""Another selection for a finished generation, on parts made by hand; test_workers has it among processes that are killed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_run import make_run, step_line
from rich.console import Console

from npd.config import Config, SelectionConfig, load_config
from npd.errors import RunError, UserError
from npd.generations.reselect import JUDGED, reselect
from npd.observe.display import Display
from npd.records import GenerationEnd
from npd.selection import Select
from npd.store import SCHEMA, Store

OLD: dict[str, Any] = {"rule": "none"}
END = GenerationEnd(3, generation=0, reason="kl_budget", passes=0.5, near_policy_kl_smoothed=0.2)
NEW: dict[str, Any] = {"rule": "delta_ifd", "lower": -0.2, "upper": 0.4}


def config_of(run_dir: Path, selection: dict[str, Any] = NEW, **others: Any) -> Config:
    tree = {"run_dir": str(run_dir), "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    return load_config(tree | {"selection": selection} | others)


@pytest.fixture
def run(tmp_path) -> Path:
    """A generation of two parts that nobody has trained on."""
    path = make_run(tmp_path / "run", generations=1, steps=1, finished=False, selection=OLD)
    (path / "metrics.jsonl").write_text("")
    return path


def files(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def quiet() -> Display:
    return Display(Console(file=io.StringIO(), width=100))


def test_a_rule_that_needs_what_was_not_read_is_refused(run):
    store = Store(run)
    for part in range(2):
        table = store.read_part(0, part)
        for name in ("student_nll_free", "teacher_nll_free", "ifd_student", "ifd_teacher", "delta_ifd"):
            nulls = pa.nulls(len(table), pa.float32())
            table = table.set_column(table.column_names.index(name), name, nulls)
        store.write_part(0, part, table, keep_manifest=True)
    before = files(run)
    with pytest.raises(UserError, match="neither was asked") as refused:
        reselect(config_of(run), store, 0, quiet())
    assert "scoring.free: always" in str(refused.value)
    assert files(run) == before
    reselect(config_of(run, {"rule": "none", "upper": 0.7}), store, 0, quiet())


def test_verdicts_are_those_of_the_new_selection_and_nothing_else_changes(run):
    store = Store(run)
    before = [store.read_part(0, part) for part in range(2)]
    generation = reselect(config_of(run), store, 0, quiet())
    assert (generation.index, generation.path, generation.policy_version) == (0, store.generation(0), 0)
    verdicts: list[str] = []
    for part, old in enumerate(before):
        new = store.read_part(0, part)
        assert new.column_names == SCHEMA.names
        for name in set(SCHEMA.names) - set(JUDGED):
            assert new[name].equals(old[name]), name
        # By hand, from the columns that the models gave.
        s, s_free, t, t_free = (
            np.array(old[name].to_pylist(), np.float64)
            for name in ("student_nll", "student_nll_free", "teacher_nll", "teacher_nll_free")
        )
        delta = (t / t_free - s / s_free).astype(np.float32)
        np.testing.assert_array_equal(new["delta_ifd"].to_numpy(), delta)
        expected = np.where(
            delta < np.float32(-0.2), "degenerate", np.where(delta > np.float32(0.4), "disconnect", "proximal")
        )
        assert new["verdict"].to_pylist() == expected.tolist()
        verdicts += expected.tolist()
    assert len(set(verdicts)) == 3
    manifest = store.check_generation(0)
    assert manifest.to_json() == generation.manifest
    assert manifest.selection.verdicts == {name: verdicts.count(name) for name in sorted(set(verdicts))}
    assert manifest.selection.kept == verdicts.count("proximal")


def test_it_is_what_that_selection_would_have_made_at_once(run, tmp_path):
    straight = make_run(tmp_path / "straight", generations=1, steps=1, finished=False, selection=NEW)
    reselect(config_of(run), Store(run), 0, quiet())
    for name in ("part-00000.parquet", "part-00001.parquet", "manifest.json"):
        assert (run / "generations/g000" / name).read_bytes() == (straight / "generations/g000" / name).read_bytes()


def test_the_configuration_has_the_new_selection_alone(run):
    before = yaml.safe_load((run / "config.yaml").read_text())
    reselect(config_of(run), Store(run), 0, quiet())
    after = yaml.safe_load((run / "config.yaml").read_text())
    assert {name for name in after if after[name] != before[name]} == {"selection"}
    assert {name: after["selection"][name] for name in NEW} == NEW
    assert Store(run).selection() == SelectionConfig(**NEW)
    Store(run).check(config_of(run), "distill")  # so that the run goes on with it
    with pytest.raises(UserError, match="made by another configuration: selection"):
        Store(run).check(config_of(run, OLD), "distill")


def test_back_and_forth_is_where_it_was(run):
    before = files(run)
    reselect(config_of(run), Store(run), 0, quiet())
    assert files(run) != before
    reselect(config_of(run, OLD), Store(run), 0, quiet())
    assert files(run) == before


def refused(run: Path, config: Config, kind: type[Exception], match: str) -> None:
    before = files(run)
    with pytest.raises(kind, match=match):
        reselect(config, Store(run), 0, quiet())
    assert files(run) == before


def test_nothing_else_may_differ(run):
    match = r"changes selection\.\* alone, but .* differs in scoring\.top_k: 10 -> 4"
    refused(run, config_of(run, scoring={"top_k": 4}), UserError, match)


def test_a_selection_that_keeps_nothing_changes_nothing(run):
    empty = config_of(run, {"rule": "delta_ifd", "lower": 50.0, "upper": 60.0})
    refused(run, empty, RunError, "Selection dropped all 40 responses")


@pytest.mark.parametrize("line", [step_line(3), END])
def test_a_generation_that_is_trained_on_keeps_its_verdicts(run, line):
    Store(run).append_metrics(line)
    refused(run, config_of(run), UserError, r"is trained on since step 3; .* Copy the directory without metrics\.jsonl")


def test_a_generation_made_with_the_old_selection_is_finished_first(run):
    store = Store(run)
    store.write_part(1, 0, Select(SelectionConfig(**OLD))(store.read_part(0, 0).drop_columns(JUDGED)))
    refused(run, config_of(run), UserError, "Generation 1 .* is being made with the old selection")


def test_a_damaged_part_is_named_before_anything_is_written(run):
    file = Store(run).part(0, 1)
    file.write_bytes(file.read_bytes()[:-7])
    refused(run, config_of(run), UserError, r"part-00001\.parquet is damaged")
    file.unlink()
    refused(run, config_of(run), UserError, r"lacks 1 of its 2 parts\. Make them again with `npd refresh` first")


def test_adaptive_bounds_are_of_the_parts(run):
    """A rule that draws its own bounds puts them in the manifest."""
    config = config_of(run, {"rule": "adaptive"})
    reselect(config, Store(run), 0, quiet())
    manifest = Store(run).manifest(0)
    assert manifest is not None
    assert manifest.selection.bounds is not None
    lower, upper = manifest.selection.bounds
    table = pa.concat_tables([pq.read_table(Store(run).part(0, part)) for part in range(2)])
    kept = [d for d, v in zip(table["delta_ifd"].to_pylist(), table["verdict"].to_pylist(), strict=True) if v == "proximal"]
    assert lower <= min(kept) <= max(kept) <= upper
