"""Rules as `Select` and `Summary` see them, with one that a plug-in brings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npd
from npd.config import SelectionConfig, load_config
from npd.errors import RunError, UserError
from npd.records import SelectionSummary
from npd.registry import RULES, load_plugins
from npd.selection import Bounds, Rule, Select, Summary, check_some_kept
from npd.store import Store

PLUGIN = Path(__file__).parent / "plugins/rules.py"
TREE = {"run_dir": "runs/x", "student": {"model": "m"}, "data": {"train": "p.jsonl"}}

load_plugins([str(PLUGIN)])

UPPER_HALF = SelectionConfig(rule="upper_half")


def scored(deltas, sources):
    """A scored part whose Δ is that: the free NLLs are 1, the student's NLL is half of it."""
    ones = np.ones(len(deltas), np.float32)
    return pa.table(
        {
            "source": pa.array(sources, pa.string()),
            "response_ids": pa.array([[3] * 20] * len(deltas), pa.list_(pa.int32())),
            "student_nll": ones / 2,
            "student_nll_free": ones,
            "teacher_nll": (0.5 + np.asarray(deltas)).astype(np.float32),
            "teacher_nll_free": ones,
        }
    )


def summary_of(config, *parts):
    summary = Summary(config)
    for part in parts:
        summary.add(part)
    return summary.result()


DELTAS = st.lists(
    st.tuples(st.one_of(st.floats(-3, 3, width=32), st.sampled_from([math.nan, math.inf])), st.sampled_from("ab")),
    min_size=1,
    max_size=30,
)


@given(st.lists(DELTAS, min_size=1, max_size=3))
def test_a_rule_of_ones_own(parts):
    judged = [Select(UPPER_HALF)(scored(*zip(*part, strict=True))) for part in parts]
    bounds: dict[str, list[tuple[float, float]]] = {}
    for part in judged:
        for source in set(part["source"].to_pylist()):
            rows = [row for row in part.select(["source", "delta_ifd", "verdict"]).to_pylist() if row["source"] == source]
            finite = sorted(row["delta_ifd"] for row in rows if math.isfinite(row["delta_ifd"]))
            kept = sorted(row["delta_ifd"] for row in rows if row["verdict"] == "proximal")
            assert kept == [d for d in finite if d >= np.median(finite)]
            bounds.setdefault(source, []).append((np.median(finite), finite[-1]) if finite else (0, 0))
    result = summary_of(UPPER_HALF, *judged)
    for source, of_parts in bounds.items():
        lowers, uppers = zip(*of_parts, strict=True)
        assert result.sources[source].bounds == (min(lowers), max(uppers))
    every = [bounds for of_parts in bounds.values() for bounds in of_parts]
    assert result.bounds == (min(lower for lower, _ in every), max(upper for _, upper in every))
    assert SelectionSummary.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_its_options_are_checked_with_the_configuration():
    tree = TREE | {"plugins": [str(PLUGIN)], "selection": {"rule": "upper_half", "lower": 0.1}}
    with pytest.raises(UserError, match="not a valid configuration: selection: upper_half draws its own lower bound"):
        load_config(tree)
    assert load_config(tree, {"selection.lower": 0.0}).selection.rule == "upper_half"


def test_its_bounds_are_named_where_nothing_is_left():
    part = Select(UPPER_HALF)(scored([math.inf, 0.5, -math.inf], ["a"] * 3))
    part = part.filter(pa.array([True, False, True]))
    result = replace(summary_of(UPPER_HALF, part), bounds=(0.5, 0.75))
    with pytest.raises(RunError) as caught:
        check_some_kept(result, UPPER_HALF)
    assert "1 below the upper half's lower bound (0.500 at the lowest) (degenerate)" in str(caught.value)
    assert "1 above the upper half's upper bound (0.750 at the highest) (disconnect)" in str(caught.value)


def test_a_verdict_of_a_rules_own_is_named_too():
    summary = SelectionSummary(3, {"degenerate": 1, "too long": 2}, {})
    with pytest.raises(RunError, match=r"1 below the upper half's lower bound \(degenerate\), 2 too long\. Quantiles"):
        check_some_kept(summary, UPPER_HALF)


def test_a_run_keeps_what_the_rule_says(make_tree):
    tree = make_tree(selection={"rule": "upper_half"}, training={"max_steps": 2}, rollout={"part_size": 12})
    run_dir = Path(npd.distill(tree | {"plugins": [str(PLUGIN)]}).run_dir)
    manifest, part = Store(run_dir).manifest(0), Store(run_dir).read_part(0, 0)
    assert manifest is not None
    lower, upper = zip(*(RULES["upper_half"]()(part, UPPER_HALF).bounds.values()), strict=True)
    assert manifest.selection.bounds == (min(lower), max(upper))
    assert manifest.selection.verdicts["proximal"] == 6


@given(st.floats(-2, 2), st.floats(0, 2), DELTAS)
def test_the_fixed_bands_bounds_are_those_of_the_configuration(lower, width, rows):
    config = SelectionConfig(lower=lower, upper=lower + width)
    result = summary_of(config, Select(config)(scored(*zip(*rows, strict=True))))
    assert result.bounds == (lower, lower + width)
    assert all(one.bounds == (lower, lower + width) for one in result.sources.values())


def test_no_bounds_without_a_band():
    config = SelectionConfig(rule="none")
    result = summary_of(config, Select(config)(scored([0.1, math.nan], ["a", "b"])))
    assert result.verdicts == {"proximal": 2}
    assert result.bounds is None
    assert not any(one.bounds for one in result.sources.values())


@pytest.mark.parametrize("rule", ["delta_ifd", "adaptive", "none"])  # not those of other tests
def test_references_are_counted_unjudged(rule):
    """What teachers or people wrote has no Δ."""
    part = Select(SelectionConfig())(scored([0.1, 0.2], ["a", "b"])).drop_columns(["delta_ifd", "verdict"])
    part = part.append_column("delta_ifd", pa.nulls(2, pa.float32())).append_column("verdict", pa.array(["reference"] * 2))
    result = summary_of(SelectionConfig(rule=rule), part)
    assert result.verdicts == {"reference": 2}
    assert result.bounds is None
    assert result.delta_ifd_quantiles == {}


@pytest.mark.parametrize("rule", ["delta_ifd", "adaptive", "none"])  # not those of other tests
def test_every_rule_takes_an_empty_part(rule):
    config = SelectionConfig(rule=rule)
    part = Select(config)(scored([0.1], ["a"]).slice(0, 0))
    assert part["verdict"].to_pylist() == []
    assert summary_of(config, part).rows == 0


def test_a_rule_must_judge():
    with pytest.raises(TypeError, match="abstract"):
        type("Nothing", (Rule,), {})()
    assert RULES["upper_half"]().name_bounds(UPPER_HALF, Bounds(0.0, 1.0)) != RULES["delta_ifd"]().name_bounds(
        UPPER_HALF, None
    )


@pytest.mark.parametrize("name", ["divergences", "rules"])
def test_the_documentation_shows_the_plugins_as_they_are(name):
    code = (PLUGIN.parent / f"{name}.py").read_text()
    assert f"```python\n{code}```" in (PLUGIN.parents[2] / "docs/extending.md").read_text()
    assert len(code.splitlines()) < 40
