"""What the checks at the start let through runs; `python tests/fuzz/combinations.py` walks over all pairs of choices."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.combinations import CHOICES, Bench, attempt, bench

PLAIN = {name: next(iter(choices)) for name, choices in CHOICES.items()}


@pytest.fixture(scope="module")
def place() -> Iterator[Bench]:
    with bench() as place:
        yield place


@settings(max_examples=7, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(picked=st.fixed_dictionaries({name: st.sampled_from(list(choices)) for name, choices in CHOICES.items()}))
def test_what_is_let_through_runs(place, picked):
    outcome = attempt(place, picked)
    assert not outcome.startswith("failed"), outcome


@pytest.mark.parametrize(("choices", "outcome"), [
    ({"teacher": "its snapshots", "references": "teacher's", "command": "sft"}, "ran"),
    ({"teacher": "itself", "student": "merged", "engine": "files", "evaluation": "teacher's", "command": "sft"},
     "refused: The teacher .* is to write, but rollout.engine files needs a directory .* has an adapter beside it"),
    ({"teacher": "adapter", "engine": "files", "references": "teacher's"},
     "refused: The teacher .* is to write, but rollout.engine files needs"),
    ({"teacher": "only reads", "references": "teacher's"},
     "refused: data.references: teacher has the teacher .* write, which a teacher of its kind .OnlyReads. does not do"),
    ({"teacher": "only reads", "evaluation": "harness, teacher"}, "refused: evaluation.teacher has the teacher .* write"),
    ({"teacher": "aligned", "evaluation": "harness, teacher"}, "refused: evaluation.teacher asks .*evaluation.teacher: f"),
    ({"teacher": "aligned", "evaluation": "harness"}, "ran"),
    ({"teacher": "here", "evaluation": "harness, teacher"}, "ran"),
    ({"student": "continued", "engine": "files", "evaluation": "task", "command": "eval"},
     "refused: The model .* is to write, but rollout.engine files needs a directory"),
    ({"student": "continued", "engine": "files", "evaluation": "harness", "command": "eval"}, "ran"),
])  # fmt: skip
def test_who_must_write_is_looked_at_before_it_begins(place, choices, outcome):
    found = attempt(place, PLAIN | choices)
    assert re.match(outcome, found), found
