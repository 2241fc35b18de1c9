from __future__ import annotations

import math
from statistics import quantiles

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.config import SelectionConfig
from npd.errors import RunError
from npd.selection import Select, Summary, bands, check_some_kept, delta_ifd, instruction_following_difficulty, wants_free

NLL = st.floats(0.01, 20)
ROWS = st.lists(st.tuples(NLL, NLL, NLL, NLL), min_size=1, max_size=20)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


@given(ROWS)
def test_loss_ratio(rows):
    expected = [t / t_free - s / s_free for s, s_free, t, t_free in rows]
    assert delta_ifd(*columns(rows)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert delta_ifd(*columns(rows), ifd="loss_ratio") == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(ROWS)
def test_perplexity_ratio(rows):
    expected = [math.exp(t - t_free) - math.exp(s - s_free) for s, s_free, t, t_free in rows]
    assert delta_ifd(*columns(rows), ifd="perplexity_ratio") == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_one_response_by_hand():
    # The prompt halves the student's loss and takes a quarter off the teacher's: IFD 0.5 and 0.75.
    assert delta_ifd([1.0], [2.0], [1.5], [2.0]) == pytest.approx([0.25])
    assert delta_ifd([1.0], [2.0], [1.5], [2.0], ifd="perplexity_ratio") == pytest.approx([math.exp(-0.5) - math.exp(-1)])


@given(ROWS)
def test_changes_sign_with_the_roles(rows):
    s, s_free, t, t_free = columns(rows)
    assert delta_ifd(s, s_free, t, t_free) == pytest.approx(-delta_ifd(t, t_free, s, s_free))


@pytest.mark.filterwarnings("error")
def test_certain_responses_divide_as_ieee_has_it():
    """A response that a model is sure of without its prompt has no loss to compare with."""
    assert np.isnan(instruction_following_difficulty([0.0], [0.0]))[0]
    assert instruction_following_difficulty([1.0], [0.0])[0] == math.inf
    assert delta_ifd([1.0], [0.0], [1.0], [1.0])[0] == -math.inf
    assert delta_ifd([1.0], [1.0], [1.0], [0.0])[0] == math.inf
    assert np.isnan(delta_ifd([1.0], [0.0], [1.0], [0.0])[0])
    assert delta_ifd([0.0], [0.0], [0.0], [0.0], ifd="perplexity_ratio")[0] == 0


def test_arrays_of_any_kind():
    expected = delta_ifd([1.0, 2.0], [2.0, 2.0], [1.5, 1.0], [2.0, 4.0])
    for kind in (np.array, lambda x: np.array(x, np.float32), lambda x: pa.array(x).to_numpy()):
        got = delta_ifd(*(kind(x) for x in ([1.0, 2.0], [2.0, 2.0], [1.5, 1.0], [2.0, 4.0])))
        assert got.dtype == np.float64
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("delta", "verdict"),
    [
        (0.0, "proximal"),
        (-0.0, "proximal"),
        (0.8, "proximal"),
        (0.4, "proximal"),
        (math.nextafter(0.0, -1), "degenerate"),
        (math.nextafter(0.8, 1), "disconnect"),
        (-math.inf, "degenerate"),
        (math.inf, "disconnect"),
        (math.nan, "undefined"),
    ],
)
def test_bands(delta, verdict):
    assert bands([delta], 0.0, 0.8).tolist() == [verdict]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.floats(-5, 5), st.floats(0, 5), st.data())
def test_bands_part_the_line(deltas, lower, width, data):
    upper = lower + width
    deltas += data.draw(st.lists(st.sampled_from([lower, upper])))
    for delta, verdict in zip(deltas, bands(deltas, lower, upper), strict=True):
        if math.isnan(delta):
            assert verdict == "undefined"
        elif delta < lower:
            assert verdict == "degenerate"
        elif delta > upper:
            assert verdict == "disconnect"
        else:
            assert verdict == "proximal"


def scored(rows):
    names = ("student_nll", "student_nll_free", "teacher_nll", "teacher_nll_free")
    table = {name: pa.array(column, pa.float32()) for name, column in zip(names, columns(rows), strict=True)}
    return pa.table({"sample_id": [f"s{i}" for i in range(len(rows))], "source": [""] * len(rows), **table})


MIXED = [
    (1.0, 2.0, 1.5, 2.0),  # 0.25
    (1.5, 2.0, 1.0, 2.0),  # -0.25
    (0.5, 2.0, 4.0, 2.0),  # 1.75
    (1.0, 0.0, 1.0, 0.0),  # nan
    (1.0, 1.0, 2.0, 2.0),  # 0
]


def test_select_adds_columns():
    table = scored(MIXED)
    out = Select(SelectionConfig())(table)
    assert out.column_names == [*table.column_names, "ifd_student", "ifd_teacher", "delta_ifd", "verdict"]
    assert out.select(table.column_names).equals(table)
    assert [str(out.schema.field(name).type) for name in out.column_names[-4:]] == ["float", "float", "float", "string"]
    assert out["ifd_student"].to_pylist()[:3] == [0.5, 0.75, 0.25]
    assert out["ifd_teacher"].to_pylist()[:3] == [0.75, 0.5, 2.0]
    assert out["delta_ifd"].to_pylist()[:3] == [0.25, -0.25, 1.75]
    assert out["verdict"].to_pylist() == ["proximal", "degenerate", "disconnect", "undefined", "proximal"]


def test_select_by_perplexity():
    out = Select(SelectionConfig(ifd="perplexity_ratio", lower=-10, upper=1))(scored(MIXED))
    assert out["delta_ifd"][2].as_py() == pytest.approx(math.exp(2) - math.exp(-1.5), rel=1e-6)
    assert out["verdict"].to_pylist() == ["proximal", "proximal", "disconnect", "proximal", "proximal"]


def test_what_was_not_read_without_its_prompt_has_no_delta():
    for table in (scored(MIXED).drop_columns("student_nll_free"), with_null(scored(MIXED), "teacher_nll_free")):
        out = Select(SelectionConfig(rule="none"))(table)
        assert out["verdict"].to_pylist() == ["proximal"] * 5
        assert all(out[name].null_count == 5 for name in ("ifd_student", "ifd_teacher", "delta_ifd"))
        summary = Summary(SelectionConfig(rule="none"))
        summary.add(out)
        assert (summary.result().kept, summary.result().delta_ifd_quantiles) == (5, {})


def with_null(table: pa.Table, name: str) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.nulls(len(table), pa.float32()))


@pytest.mark.parametrize("rule", ["none", "delta_ifd", "adaptive"])
def test_free_passes_are_made_for_rules_that_read_them(rule):
    assert wants_free(SelectionConfig(rule=rule), "needed") is (rule != "none")
    assert wants_free(SelectionConfig(rule=rule), "always")


def test_rule_none_keeps_all_and_still_measures():
    out = Select(SelectionConfig(rule="none"))(scored(MIXED))
    assert out["verdict"].to_pylist() == ["proximal"] * 5
    assert out["delta_ifd"].to_pylist()[:3] == [0.25, -0.25, 1.75]


@given(ROWS, st.floats(-2, 2), st.floats(0, 2))
def test_verdicts_follow_from_the_stored_column(rows, lower, width):
    out = Select(SelectionConfig(lower=lower, upper=lower + width))(scored(rows))
    again = bands(out["delta_ifd"].to_numpy(), lower, lower + width)
    assert out["verdict"].to_pylist() == again.tolist()


def test_select_takes_an_empty_table():
    out = Select(SelectionConfig())(scored(MIXED).slice(0, 0))
    assert len(out) == 0
    assert "verdict" in out.column_names


def summarize(verdicts, sources, deltas, parts=1):
    """The summary of a generation of so many parts."""
    table = pa.table({"verdict": verdicts, "source": sources, "delta_ifd": pa.array(deltas, pa.float32())})
    summary, size = Summary(SelectionConfig()), -(-len(table) // parts)
    for start in range(0, len(table), size):
        summary.add(table.slice(start, size))
    return summary.result()


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_summary(parts):
    deltas = np.array([0.1, 0.2, 0.3, -0.5, np.nan, np.inf])
    verdicts = ["proximal"] * 3 + ["degenerate", "undefined", "disconnect"]
    summary = summarize(verdicts, ["a", "b", "a", "b", "a", "b"], deltas, parts)
    assert summary.rows == 6
    assert summary.verdicts == {"proximal": 3, "degenerate": 1, "undefined": 1, "disconnect": 1}
    assert list(summary.sources) == ["a", "b"]
    assert summary.sources["a"].rows == 3
    assert summary.sources["a"].verdicts == {"proximal": 2, "undefined": 1}
    assert summary.sources["b"].verdicts == {"proximal": 1, "degenerate": 1, "disconnect": 1}
    # Quantiles of the finite ones alone: -0.5, 0.1, 0.2, 0.3.
    assert summary.delta_ifd_quantiles["0.5"] == pytest.approx(0.15)
    assert summary.delta_ifd_quantiles["0.25"] == pytest.approx(-0.05)
    assert summary.sources["a"].delta_ifd_quantiles["0.5"] == pytest.approx(0.2)
    assert list(summary.delta_ifd_quantiles) == ["0.05", "0.25", "0.5", "0.75", "0.95"]


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=40), st.integers(1, 5))
def test_quantiles_and_counts_add_up(deltas, parts):
    sources = [str(i % 3) for i in range(len(deltas))]
    verdicts = bands(deltas, 0.0, 0.8).tolist()
    summary = summarize(verdicts, sources, np.array(deltas), parts)
    assert sum(summary.verdicts.values()) == summary.rows == len(deltas)
    for verdict, count in summary.verdicts.items():
        assert count == sum(s.verdicts.get(verdict, 0) for s in summary.sources.values())
    expected = quantiles(deltas, n=4, method="inclusive")
    assert [summary.delta_ifd_quantiles[q] for q in ("0.25", "0.5", "0.75")] == pytest.approx(expected, abs=1e-6)


def test_summary_of_undefined_deltas_has_no_quantiles():
    summary = summarize(["undefined"], [""], np.array([np.nan]))
    assert summary.delta_ifd_quantiles == {}


@pytest.mark.parametrize(
    ("deltas", "message", "unsaid"),
    [
        ([-1.0, -0.5], r"all 2 responses.*: 2 below selection.lower 0.0 \(degenerate\)", "upper"),
        ([1.0, 0.9, 3.0], r"all 3 responses.*: 3 above selection.upper 0.8 \(disconnect\)", "selection.lower"),
        ([-1.0, 2.0, 3.0], r"1 below selection.lower 0.0 \(degenerate\), 2 above selection.upper 0.8 \(disconnect\)", "NaN"),
        ([math.nan], r"1 with an undefined delta.*Quantiles of delta: none", "selection.upper"),
    ],
)
def test_all_dropped_names_the_bound(deltas, message, unsaid):
    config = SelectionConfig()
    verdicts = bands(deltas, config.lower, config.upper).tolist()
    summary = summarize(verdicts, ["x"] * len(deltas), np.array(deltas))
    with pytest.raises(RunError, match=message) as caught:
        check_some_kept(summary, config)
    assert unsaid not in str(caught.value)
    assert "selection.rule none" in str(caught.value)
    assert caught.value.exit_status == 1


def test_all_dropped_shows_where_the_deltas_lie():
    summary = summarize(["disconnect"] * 3, [""] * 3, np.array([1.0, 1.5, 2.0]))
    with pytest.raises(RunError, match=r"Quantiles of delta: 5%: 1\.050, 25%: 1\.250, 50%: 1\.500"):
        check_some_kept(summary, SelectionConfig())


@pytest.mark.parametrize("verdict", ["proximal", "reference"])
def test_one_kept_is_enough(verdict):
    summary = summarize(["degenerate", verdict], ["", ""], np.array([-1.0, 0.1]))
    check_some_kept(summary, SelectionConfig())
