"""Arms of several runs, what figures cost, and how right selection was, against counting."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import make_run
from hypothesis import given
from hypothesis import strategies as st
from test_report import read

from npd.intervals import t_interval, t_quantile, wilson_interval
from npd.observe.events import Events, SpanName
from npd.records import EvaluationLine, Span
from npd.report.arms import Mean, arm_table, arms_of, paired, told
from npd.report.cost import cost_figures, seconds_at, tokens_at
from npd.report.facts import RunFacts, Status, gather
from npd.report.page import write_comparison, write_report
from npd.report.rightness import difference, judged, right_comparison, right_table
from npd.store import Store

T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}  # of any table


@pytest.mark.parametrize(("degrees", "quantile"), T.items())
def test_quantiles_of_students_distribution(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_an_interval_over_few_seeds_holds_the_mean_as_often_as_it_says():
    values = np.random.default_rng(0).normal(3.0, 2.0, (3000, 3)).tolist()
    held = [low <= 3.0 <= high for low, high in map(t_interval, values)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(-50, 50), st.floats(0.1, 10))
def test_an_interval_moves_with_its_values(values, shift, scale):
    low, high = t_interval(values)
    moved = t_interval([scale * value + shift for value in values])
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-6)
    assert low <= statistics.fmean(values) + 1e-9
    assert statistics.fmean(values) <= high + 1e-9


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="two values"):
        t_interval([1.0])


FIGURES = {  # arm -> seed -> accuracy before and after
    "plain": {0: (0.10, 0.30), 1: (0.12, 0.35), 2: (0.08, 0.28)},
    "ours": {0: (0.10, 0.42), 1: (0.12, 0.45), 2: (0.08, 0.44)},
}
STEPS = 30


def accuracy(value: float, n: int = 200) -> dict[str, float]:
    low, high = wilson_interval(value, n)
    return {"eval/sums/accuracy": value, "eval/sums/accuracy_low": low, "eval/sums/accuracy_high": high}


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory) -> list[Path]:
    """Two arms of three seeds, whose student lies beside each run."""
    folder = tmp_path_factory.mktemp("arms")
    paths = []
    for arm, seeds in FIGURES.items():
        for seed, (before, after) in seeds.items():
            beside = folder / f"s{seed}"
            path = make_run(
                beside / arm,
                seed=seed,
                student={"model": str(beside / "start/student")},
                loss={"kd_weight": 0.5 if arm == "ours" else 0.9},
            )
            events = Events(path / "events.jsonl")
            for step, value, start, end in ((0, before, 1000.0, 1002.0), (STEPS, after, 1096.0 + seed, 1100.0)):
                Store(path).append_metrics(EvaluationLine(step, accuracy(value) | {"eval/harness/h/acc": value}))
                events.write(SpanName.EVALUATE, start, end, step=step)
            paths.append(path)
    return paths


def test_runs_that_differ_in_their_seed_are_one_arm(run_dirs):
    runs = [gather(path) for path in run_dirs]
    arms = arms_of(runs)
    assert [(arm.name, arm.runs) for arm in arms] == [("plain", [0, 1, 2]), ("ours", [3, 4, 5])]
    runs[1].config["loss"]["kd_weight"] = 0.1
    assert [arm.runs for arm in arms_of(runs)] == [[0, 2], [1], [3, 4, 5]]
    runs[4].versions["torch"] = "0.0"
    assert len(arms_of(runs)) == 4
    nameless = [gather(path) for path in run_dirs[:2]]
    for run in nameless:
        run.config = {}  # a damaged config.yaml: nothing says that they are alike
    assert [arm.runs for arm in arms_of(nameless)] == [[0], [1]]


@pytest.mark.parametrize(
    ("names", "arm"),
    [
        (("npd-seed0", "npd-seed1"), "npd"),
        (("npd-s10", "npd-s11"), "npd"),
        (("steps-0", "steps-1"), "steps"),
        (("steps0", "steps1"), "steps"),
        (("0", "1"), "0"),
    ],
)
def test_an_arm_is_named_by_what_its_runs_names_share(tmp_path, names, arm):
    runs = [RunFacts(tmp_path / name, Status("finished", ""), {"seed": i, "x": 1}) for i, name in enumerate(names)]
    assert [one.name for one in arms_of(runs)] == [arm]


def test_arms_have_means_and_differences_with_t_intervals(run_dirs):
    runs = [gather(path) for path in run_dirs]
    table = arm_table(runs, arms_of(runs))
    assert table is not None
    cells = {tuple(row[:2]): row for row in table.rows}
    ends = {arm: [after for _, after in seeds.values()] for arm, seeds in FIGURES.items()}

    def by_hand(values: list[float]) -> tuple[float, float, float]:
        mean = sum(values) / 3
        half = T[2] * statistics.stdev(values) / math.sqrt(3)
        return mean, mean - half, mean + half

    for arm, values in ends.items():
        mean, low, high = by_hand(values)
        row = cells["sums/accuracy", arm]
        assert row[2:4] == ["3", f"{100 * mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"]
        assert row[4] == f"{100 * min(values):.1f}% to {100 * max(values):.1f}%"
    mean, low, high = by_hand([b - a for a, b in zip(ends["plain"], ends["ours"], strict=True)])
    assert cells["sums/accuracy", "ours"][5:] == [f"+{100 * mean:.1f} [+{100 * low:.1f}, +{100 * high:.1f}]", "3 pairs"]
    assert cells["sums/accuracy", "plain"][5:] == ["–", "–"]
    assert arm_table(runs[2:4], arms_of(runs[2:4])) is None  # each a single run


def test_differences_are_paired_by_seed_where_both_have_it():
    mean = paired({"0": 1.0, "1": 2.0, "7": 9.0}, {"1": 1.5, "0": 0.0, "8": 4.0})
    assert mean == Mean.of([1.0, 0.5])
    assert paired({"0": 1.0}, {"1": 1.0}) is None
    assert told(Mean.of([0.25]), share=True) == "25.0%"  # one seed says nothing of others
    assert told(Mean.of([0.25]), share=True, signed=True) == "+25.0"


def test_a_comparison_shows_arms_costs_and_both_kinds_of_error(run_dirs, tmp_path):
    text, data = read(write_comparison(run_dirs, tmp_path / "compare.html"))
    for said in ("Arms, seconds and tokens", "95% t intervals of the mean over seeds", "sums/accuracy against seconds"):
        assert said in text.said
    figure = next(f for id, f in data["figures"].items() if id.startswith("seconds-"))
    thick = {trace["name"]: trace for trace in figure["traces"] if trace["showlegend"]}
    assert set(thick) == set(FIGURES)
    assert thick["ours"]["x"] == pytest.approx([0, statistics.fmean(94 + seed for seed in range(3))])
    assert thick["ours"]["y"] == pytest.approx([0.1, statistics.fmean((0.42, 0.45, 0.44))], rel=1e-4)
    assert sum(not trace["showlegend"] for trace in figure["traces"]) == 6
    points = next(f for id, f in data["figures"].items() if id.startswith("arms-"))
    assert points["traces"][1]["y"] == list(FIGURES)
    assert sorted(points["traces"][0]["x"]) == sorted(after for seeds in FIGURES.values() for _, after in seeds.values())


def test_tokens_are_those_that_models_wrote_for_what_was_trained_on(run_dirs):
    run = gather(run_dirs[0])
    manifests = [json.loads(file.read_text()) for file in sorted(run_dirs[0].glob("generations/g*/manifest.json"))]
    both = sum(manifest["response_tokens"] for manifest in manifests)
    assert tokens_at(run) == {0: 0, STEPS: both}
    run.evaluations = [EvaluationLine(1, {}), EvaluationLine(STEPS - 1, {})]
    first = next(line.step for line in run.steps if line.generation == 1)
    assert first > 1
    assert tokens_at(run) == {1: manifests[0]["response_tokens"], STEPS - 1: both}


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=5)), max_size=4))
def test_seconds_are_those_in_which_the_trainer_worked_and_did_not_evaluate(tmp_path_factory, processes):
    """Counted second by second, over processes with pauses between them."""
    events, clock, wanted, worked = [], 100, {}, 0
    for number, (pause, spans) in enumerate(processes):
        clock += pause
        events.append(Span(SpanName.STARTED, clock, clock, "trainer", number, "MainThread"))
        for evaluates, seconds in spans:
            name = SpanName.EVALUATE if evaluates else SpanName.TRAIN
            events.append(
                Span(name, clock, clock + seconds, "trainer", number, "MainThread", {"step": clock} if evaluates else {})
            )
            if evaluates:
                wanted[clock] = worked
            else:
                worked += seconds
            clock += seconds
        events.append(Span(SpanName.TRAIN, 100, 500, "refresh-0", 99, "MainThread"))
    run = RunFacts(Path("x"), Status("finished", ""), events=events)
    assert seconds_at(run) == pytest.approx(wanted)


def with_rewards(path: Path, rewards: Any) -> list[dict[str, Any]]:
    """Give the parts of a run a column of rewards; its rows."""
    rows = []
    for file in sorted(path.glob("generations/g*/part-*.parquet")):
        table = pq.read_table(file)
        table = table.append_column("reward", pa.array(rewards(table), pa.float32()))
        pq.write_table(table, file, write_page_checksum=True)
        rows += table.to_pylist()
    return rows


def test_how_right_what_was_kept_was_is_counted(tmp_path):
    rng = np.random.default_rng(3)
    path = make_run(tmp_path / "run")
    rows = with_rewards(path, lambda table: [None if i % 7 == 0 else float(rng.random() < 0.5) for i in range(len(table))])
    rows = [row for row in rows if row["reward"] is not None]
    table = right_table(gather(path))
    assert table is not None
    cells = {row[0]: row for row in table.rows}
    kept = [row["reward"] for row in rows if row["verdict"] == "proximal"]
    dropped = [row["reward"] for row in rows if row["verdict"] != "proximal"]
    for name, values in (("kept", kept), ("dropped", dropped), ("all", kept + dropped)):
        low, high = wilson_interval(statistics.fmean(values), len(values))
        share = f"{100 * len(values) / len(rows):.1f}%"
        right = f"{100 * statistics.fmean(values):.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
        assert cells[name][1:4] == [f"{len(values)}", share, right]
    of_source = [row["reward"] for row in rows if row["verdict"] == "proximal" and row["source"] == "a"]
    assert cells["a: kept"][1] == str(len(of_source))
    comparison = right_comparison([gather(path)])
    assert comparison is not None
    assert comparison.rows[0][3:6] == [cells[name][3] for name in ("all", "kept", "dropped")]
    text, data = read(write_report(path))
    assert "What was kept, and how right it was" in text.said
    drawn = data["figures"]["right-by-delta"]["traces"][0]
    assert statistics.fmean(drawn["y"]) == pytest.approx(statistics.fmean(kept + dropped), abs=0.05)
    assert drawn["x"] == sorted(drawn["x"])


def test_newcombes_interval_of_a_difference(tmp_path):
    """The example of his paper's table II: 56 of 70 and 48 of 80, method 10: 0.0524 to 0.3339."""
    path = make_run(tmp_path / "run")
    run = gather(path)
    n = 70 + 80
    rewards = [1.0] * 56 + [0.0] * 14 + [1.0] * 48 + [0.0] * 32
    some = judged_of(run, rewards, ["proximal"] * 70 + ["disconnect"] * 80, n)
    assert difference(some) == "+20.0 [+5.2, +33.4]"


def judged_of(run: RunFacts, rewards: list[float], verdicts: list[str], n: int) -> Any:
    run.responses = pa.table(
        {
            "reward": pa.array(rewards, pa.float32()),
            "verdict": verdicts,
            "delta_ifd": pa.array([0.0] * n, pa.float32()),
            "source": ["a"] * n,
            "tokens": pa.array([1] * n, pa.int32()),
            "generation": pa.array([0] * n, pa.int32()),
        }
    )
    run._arrays.clear()
    return judged(run)


def test_without_rewards_nothing_is_said_of_right(tmp_path):
    path = make_run(tmp_path / "run")
    assert judged(gather(path)) is None
    assert "how right" not in read(write_report(path))[0].said
    with_rewards(path, lambda table: [None] * len(table))
    assert judged(gather(path)) is None
    with_rewards(make_run(tmp_path / "other"), lambda table: [3.5] * len(table))  # no share of being right
    assert judged(gather(tmp_path / "other")) is None


def test_figures_measured_once_are_not_drawn_against_their_cost(run_dirs):
    runs = [gather(path) for path in run_dirs[:2]]
    for run in runs:
        run.evaluations = run.evaluations[-1:]
    assert cost_figures(runs, arms_of(runs)) == []


def test_a_steps_last_evaluation_holds_all(tmp_path):
    """Slow benchmarks are measured at the end alone, in a second line of the last step."""
    path = make_run(tmp_path / "run")
    store, slow = Store(path), {"eval/harness/h/acc": 0.5, "eval/harness/h/acc_stderr": 0.125}
    store.append_metrics(EvaluationLine(0, accuracy(0.1)))
    store.append_metrics(EvaluationLine(STEPS, accuracy(0.25)))
    ends = {"eval/harness/h/acc_low": 0.255, "eval/harness/h/acc_high": 0.745}
    store.append_metrics(EvaluationLine(STEPS, accuracy(0.25) | slow | ends))
    run = gather(path)
    assert [line.step for line in run.evaluations] == [0, STEPS]
    text = read(write_report(path))[0].said
    assert "harness/h/acc – 0.5 ± 0.12" in text
    assert "Behind ±: lm-eval's standard errors." in text
    assert "1.96 standard errors" in text
    assert "Wilson" in text
