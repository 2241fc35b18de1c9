"""What a generation is: every prompt of a window once, in parts that know nothing of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bench import config_of, prompts_of
from hypothesis import given
from hypothesis import strategies as st

from npd.config import config_tree, differing_keys
from npd.generations.generation import Generations, ReferenceGenerations, tuning, usable_references
from npd.store import REFERENCE

COUNTS, PART_SIZES = st.integers(1, 30), st.integers(1, 12)
WINDOWS = st.one_of(st.just("all"), st.integers(1, 40))


def generations_of(count: int, part_size: int, window: str | int = "all", samples: int = 1, seed: int = 0) -> Generations:
    rollout = {"part_size": part_size, "samples_per_prompt": samples}
    return Generations(config_of(seed=seed, schedule={"prompts": window}, rollout=rollout), prompts_of(count))


def asked(generations: Generations, generation: int) -> list[str]:
    """Prompts of a generation, part after part."""
    parts = range(len(generations.parts(generation)))
    return [name for part in parts for name in generations.table(generation, part)["prompt_id"].to_pylist()]


@given(COUNTS, PART_SIZES, WINDOWS, st.integers(1, 4), st.integers(0, 9))
def test_parts_share_a_generations_prompts_out(count, part_size, window, samples, generation):
    generations = generations_of(count, part_size, window, samples)
    size = count if window == "all" else window
    parts = generations.parts(generation)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= part_size
    assert max(lengths) - min(lengths) <= 1
    assert len(parts) == math.ceil(size / part_size)
    assert [len(generations.table(generation, part)) for part in range(len(parts))] == lengths
    assert generations.size(generation) == size
    assert generations.per_prompt(generation) == samples
    assert generations.responses(generation) == size * samples


@given(COUNTS, PART_SIZES, WINDOWS, st.integers(0, 3))
def test_windows_follow_each_other_through_shuffles_of_all_prompts(count, part_size, window, seed):
    """However windows and parts cut it, each next `count` of what is asked are all the prompts, once each."""
    generations = generations_of(count, part_size, window, seed=seed)
    size = generations.size(0)
    stream = [name for generation in range(math.ceil(3 * count / size)) for name in asked(generations, generation)]
    everything = sorted(f"p{i}" for i in range(count))
    laps = [stream[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(lap) == everything for lap in laps)
    if count > 8:  # by chance once in 9! cases
        assert laps[0] != laps[1]
        assert laps[0] != [f"p{i}" for i in range(count)]


@given(COUNTS, PART_SIZES, PART_SIZES, WINDOWS, st.integers(0, 9), st.data())
def test_a_part_does_not_depend_on_others(count, part_size, other_size, window, generation, data):
    """Neither on which were asked for before, nor on how large parts are."""
    one = generations_of(count, part_size, window)
    part = data.draw(st.integers(0, len(one.parts(generation)) - 1))
    table = one.table(generation, part)
    after_others = generations_of(count, part_size, window)
    order = data.draw(st.permutations(range(len(one.parts(generation)))))
    assert {n: after_others.table(generation, n) for n in order}[part].equals(table)
    rows = one.parts(generation)[part]
    assert asked(generations_of(count, other_size, window), generation)[rows] == table["prompt_id"].to_pylist()


def test_a_part_has_whole_rows_of_the_prompts():
    generations = generations_of(9, 4)
    rows = {row["prompt_id"]: row for row in generations.prompts.table.to_pylist()}
    for row in generations.table(1, 1).to_pylist():
        assert row == rows[row["prompt_id"]]


def test_the_seed_decides_the_order():
    assert asked(generations_of(20, 5, seed=1), 0) == asked(generations_of(20, 5, seed=1), 0)
    assert asked(generations_of(20, 5, seed=1), 0) != asked(generations_of(20, 5, seed=2), 0)


LENGTHS = st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=30).filter(any)


@given(LENGTHS, st.integers(1, 9))
def test_references_that_are_given_must_fit(lengths, longest):
    config = config_of(rollout={"max_new_tokens": longest})
    usable = usable_references(config, prompts_of(len(lengths), lengths))
    assert usable.tolist() == [i for i, length in enumerate(lengths) if length is not None and length <= longest]
    by_teacher = config_of(data={"references": "teacher"}, rollout={"max_new_tokens": longest})
    assert usable_references(by_teacher, prompts_of(len(lengths), lengths)).tolist() == list(range(len(lengths)))


@given(LENGTHS, st.sampled_from([0.05, 0.3, 0.9]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), PART_SIZES)
def test_references_are_as_many_as_the_run_can_use(lengths, share, samples, passes, count, part_size):
    """Of like lengths, a pass of n responses has n·r/(1-r) references beside it; a tenth more, as they may be shorter."""
    rollout = {"max_new_tokens": 9, "samples_per_prompt": samples, "part_size": part_size}
    schedule = {"references": share, "passes": passes, "generations": count, "lead": 0.0, "prompts": 2}
    config = config_of(schedule=schedule, rollout=rollout)
    generations = Generations(config, prompts_of(len(lengths), lengths))
    usable = {f"p{i}" for i, length in enumerate(lengths) if length}
    mixed = asked(generations, REFERENCE)
    assert len(set(mixed)) == len(mixed) == generations.size(REFERENCE) == generations.responses(REFERENCE)
    assert set(mixed) <= usable
    needed = share / (1 - share) * 2 * samples * passes * count
    assert len(mixed) == len(usable) or needed <= len(mixed) <= 1.1 * needed + 1
    assert generations.per_prompt(REFERENCE) == 1
    assert generations.mixed
    assert generations.is_reference(REFERENCE)
    assert not generations.is_reference(0)
    assert generations.by_student


@given(COUNTS, PART_SIZES, st.integers(1, 3))
def test_fine_tuning_has_one_generation_of_every_prompt_once(count, part_size, samples):
    config = config_of(
        rollout={"part_size": part_size, "samples_per_prompt": samples},
        schedule={"prompts": 3, "references": 0.5, "generations": 4},
    )
    generations = ReferenceGenerations(tuning(config), prompts_of(count))
    assert sorted(asked(generations, 0)) == sorted(f"p{i}" for i in range(count))
    assert generations.responses(0) == generations.size(0) == count
    assert generations.is_reference(0)
    assert not generations.by_student
    assert not generations.mixed


OTHERS = {
    "schedule": {"generations": 3, "prompts": 5, "lead": 2.0, "references": 0.2, "passes": 3},
    "loss": {"kd_weight": 0.5, "top_k_mass": "tail"},
    "training": {"learning_rate": 0.5},
}


def test_tuning_changes_what_fine_tuning_is_and_nothing_else():
    config = config_of(**OTHERS)
    tuned = tuning(config)
    changed = {line.partition(":")[0].split()[0] for line in differing_keys(config_tree(config), config_tree(tuned))}
    assert changed == {"schedule.generations", "schedule.prompts", "schedule.lead", "schedule.references", "loss.kd_weight"}
    schedule = tuned.schedule
    assert (schedule.generations, schedule.prompts, schedule.lead, schedule.references) == (1, "all", 0.0, 0.0)
    assert tuned.loss.kd_weight == 0.0
    assert config == config_of(**OTHERS)
    assert tuning(tuned) == tuned


@pytest.mark.parametrize(
    ("rollout", "expected"), [("external", "auto"), ("cpu", "cpu"), (["cuda:1"], ["cuda:1"]), ("turns", "turns")]
)
def test_nobody_elsewhere_makes_references(rollout, expected):
    """A name that is no producer elsewhere, nor a device, is left to be refused."""
    config = config_of(placement={"rollout": rollout, "teacher": "cpu"})
    assert tuning(config).placement.rollout == expected
    assert tuning(config).placement.teacher == "cpu"


def test_references_are_drawn_at_random():
    config = config_of(schedule={"references": 0.5, "prompts": 2, "generations": 2, "passes": 2}, rollout={"part_size": 50})
    mixed = asked(Generations(config, prompts_of(200, [2] * 200)), REFERENCE)
    numbers = np.array([int(name[1:]) for name in mixed])
    assert len(numbers) == 9
    assert numbers.tolist() != sorted(numbers.tolist())
    assert numbers.max() > 50
