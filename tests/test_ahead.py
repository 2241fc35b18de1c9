"""What the first evaluation says of a teacher that is not ahead, and of references that are."""

from __future__ import annotations

import io
import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import npd
from npd.evaluation.ahead import notes, references_right, surely_above
from npd.intervals import wilson_interval
from npd.observe.display import Display
from npd.prompts import SCHEMA, Prompts


def share(right: int, of: int) -> tuple[float, float, float]:
    return right / of, *wilson_interval(right / of, of)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(200, 400))
def test_a_difference_is_sure_by_newcombes_interval(one, other, of):
    def ends(p: float) -> tuple[float, float]:  # roots of |x - p| = z sqrt(x (1 - x) / n)
        z = 1.959963984540054
        a, b, c = 1 + z * z / of, -(2 * p + z * z / of), p * p
        root = math.sqrt(max(0.0, b * b - 4 * a * c))
        return (-b - root) / (2 * a), (-b + root) / (2 * a)

    p, q = one / of, other / of
    low = p - q - math.sqrt((p - ends(p)[0]) ** 2 + (ends(q)[1] - q) ** 2)
    if abs(low) > 1e-9:
        assert surely_above(share(one, of), share(other, of)) == (low > 0)
    assert not (surely_above(share(one, of), share(other, of)) and surely_above(share(other, of), share(one, of)))


def figures(who: str, right: int, of: int = 200, task: str = "answer") -> dict[str, float]:
    return dict(
        zip(
            (f"{who}/{task}/accuracy", f"{who}/{task}/accuracy_low", f"{who}/{task}/accuracy_high"),
            share(right, of),
            strict=True,
        )
    )


def test_a_teacher_that_is_far_ahead_is_not_mentioned():
    assert notes(figures("eval", 60), figures("teacher", 160), None) == []
    assert notes(figures("eval", 60), figures("teacher", 160), share(160, 200)) == []
    assert notes(figures("eval", 60) | {"eval/kl_to_teacher": 0.1}, {}, None) == []


def test_a_teacher_that_is_not_ahead_or_behind_the_references_is():
    (note,) = notes(figures("eval", 110), figures("teacher", 118), share(118, 200))
    assert "59.0%" in note
    assert "55.0%" in note
    (note,) = notes(figures("eval", 60), figures("teacher", 160), share(200, 200))
    assert "100.0%" in note
    assert "schedule.references" in note
    assert len(notes(figures("eval", 160), figures("teacher", 142), share(200, 200))) == 2
    # references are judged by `answer` alone
    assert notes(figures("eval", 60, task="gcd"), figures("teacher", 160, task="gcd"), share(200, 200)) == []


def test_references_are_judged_where_a_row_has_both(tokenizer):
    def row(completion: str | None, answer: str | None) -> dict:
        ids = None if completion is None else tokenizer(completion, add_special_tokens=False)["input_ids"]
        return {"prompt_id": "p", "source": "", "prompt_ids": [1], "completion_ids": ids, "answer": answer}

    rows = [row("1 # 2", "2"), row("1 # 3", "2"), row("5", "4\x1f5"), row(None, "2"), row("2", None)]
    found = references_right(Prompts(pa.Table.from_pylist(rows, schema=SCHEMA), 5), tokenizer)
    assert found is not None
    assert found[0] == pytest.approx(2 / 3)
    assert references_right(Prompts(pa.Table.from_pylist(rows[3:], schema=SCHEMA), 2), tokenizer) is None


@pytest.mark.parametrize("kd_weight", [0.9, 0.0])
def test_a_run_says_so_once_where_it_learns_from_the_teacher(make_tree, data_file, kd_weight):
    said = io.StringIO()
    npd.distill(
        make_tree(
            data={"eval": str(data_file)},
            evaluation={"tasks": ["answer"], "teacher": True, "kl_prompts": 0},
            loss={"kd_weight": kd_weight},
        ),
        display=Display(Console(file=said, width=10_000)),
    )
    assert said.getvalue().count("it is not ahead by more than chance explains") == (kd_weight > 0)
