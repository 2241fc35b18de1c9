"""What a plan and the start of a run hold against what is free: disk and memory; and what stands in for what was asked."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import npd
import npd.placement
from npd import fits, models, ram
from npd.config import ModelConfig, ScheduleConfig, load_config
from npd.generations.ray_cluster import needs_of, told
from npd.growth import disk_note, disk_row, gib, growth, room_for
from npd.models.layout import Layout, Parts, remember_layout
from npd.observe.display import Display
from npd.placement import EngineHere, engine_beside_training, resolve_placement, unused_gpus
from npd.plan import make_plan, plan_notes, plan_rows
from npd.preflight import DISTILL, EVAL, SFT, prepare
from npd.ram import main_memory
from npd.store import Store, check_writable

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def full(monkeypatch):
    """A disk with a megabyte left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 << 30, 9 << 30, 1 << 20))


def test_a_disk_that_will_not_do_is_a_warning(make_tree, tmp_path, full, monkeypatch):
    """In the plan and at the start of a run; what the run has already is not asked for again."""
    tree = make_tree(training={"max_steps": 1}, checkpoint={"every_steps": 1})
    setup = prepare(load_config(tree), DISTILL)
    plan = make_plan(setup)
    needed = f"needs at most {gib(plan.disk_bytes)} at its peak, 1.00 MiB free at {tree['run_dir']}"
    assert ["disk", needed] in plan_rows(setup, plan)
    assert not any(note.startswith("Warning: the disk") for note in plan_notes(setup, plan))  # a megabyte does
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 << 30, 10 << 30, 1000))
    assert any(note.startswith("Warning: the disk of") for note in plan_notes(setup, plan))
    console = Console(record=True, width=4000)
    npd.distill(tree, display=Display(console))
    assert "Warning: the disk of" in console.export_text(clear=False)
    taken = sum(file.stat().st_size for file in Path(tree["run_dir"]).rglob("*") if file.is_file())
    room = room_for(tree["run_dir"], taken + 1000)
    assert (room.there, room.lacking) == (taken, 0)
    assert room_for(tree["run_dir"], taken + 5000).lacking == 4000
    assert f" ({gib(taken)} are there, at most 0.98 KiB are to come)" in disk_row(tree["run_dir"], room)
    room = room_for(tree["run_dir"], taken + 1e9, left=5000.0)  # most of it came and went
    assert (room.more, room.lacking) == (5000, 4000)
    assert "at most 4.88 KiB more, if" in disk_note(tree["run_dir"], room)


def test_a_disk_of_which_nothing_is_known(tmp_path, monkeypatch):
    def unknown(path):
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    room = room_for(str(tmp_path / "run"), 1e15)
    assert disk_note("run", room) == ""
    assert "not known" in disk_row("run", room)


def test_memory_is_that_of_who_shares_a_device(make_tree, student_dir, monkeypatch):
    """On a CPU all processes; each brings Python. Weights, gradients and moments are those of the plan."""

    def needs(command=DISTILL, **sections):
        setup = prepare(load_config(make_tree(**sections)), command)
        (place,) = fits.places(setup)
        return setup, place

    setup, turns = needs()
    parameters = make_plan(setup).student_parameters
    assert {name: turns.parts[name] for name in ("weights", "gradients", "AdamW")} == {
        "weights": 4 * parameters, "gradients": 4 * parameters, "AdamW": 8 * parameters,
    }  # fmt: skip
    _, beside = needs(schedule={"lead": 1.0})
    assert beside.parts["training: Python and libraries"] == beside.parts["refresh 0: Python and libraries"] == fits.HOST
    teachers = models.parameter_count(setup.tokens.teachers[None].config) * 4
    assert turns.parts["teacher"] == beside.parts["refresh 0: teacher"] == teachers
    _, alone = needs(SFT, data={"references": "teacher"})
    assert alone.parts["references: teacher"] == teachers
    assert not any("refresh" in name for name in alone.parts)
    assert not turns.short
    monkeypatch.setattr(fits, "main_memory", lambda: (1e6, 2e9))
    (place,) = fits.places(setup)
    assert place.short
    ((what, how),) = fits.memory_rows(setup, [place])
    assert what == "memory of cpu"
    assert how.startswith(f"needs about {gib(place.needed)} of 0.95 MiB that are free (1.86 GiB in all)")
    (warning,) = fits.memory_notes([place])
    assert warning.startswith("Warning: cpu needs about")
    assert "Most of it: Python and libraries" in warning


def test_a_teacher_that_evaluates_in_training_is_held_there_too(make_tree, data_file):
    """Beside the one that scores elsewhere, and once where one process does both."""
    evaluated = {"data": {"eval": str(data_file)}}

    def parts(command=DISTILL, **sections):
        (place,) = fits.places(prepare(load_config(make_tree(**sections)), command))
        return place.parts

    beside = parts(**evaluated, schedule={"lead": 1.0})
    assert beside["training: teacher"] == beside["refresh 0: teacher"] > 0
    assert "training: teacher" not in parts(**evaluated, schedule={"lead": 1.0}, evaluation={"kl_prompts": 0})
    assert parts(**evaluated)["teacher"] == beside["training: teacher"]
    wrote = parts(SFT, data={**evaluated["data"], "references": "teacher"})
    assert [name for name in wrote if name.endswith("teacher")] == ["references: teacher"]


def test_on_one_gpu_what_leaves_it_lies_in_main_memory(make_tree, data_file, monkeypatch):
    setup = prepare(load_config(make_tree(data={"eval": str(data_file)})), DISTILL)
    setup.placement = replace(setup.placement, train=["cuda:0"], rollout="cuda:0", teacher="cuda:0")
    monkeypatch.setattr(fits, "_memory", lambda device: (8e9, 8e9))
    gpu, host = fits.places(setup)
    assert (gpu.name, host.name) == ("cuda:0", "cpu")
    away = {name.removeprefix("what leaves the GPU: "): size for name, size in host.parts.items()}
    assert away.keys() == {"Python and libraries", "weights", "AdamW", "teacher"}
    assert gpu.needed >= away["weights"] + away["AdamW"] + away["teacher"]  # while the student is evaluated


@pytest.mark.parametrize(("where", "said", "limit", "used", "cached"), [
    ("", "0::/jobs/7/step", "memory.max", "memory.current", "inactive_file"),
    ("memory", "3:cpu:/a\n4:memory,x:/jobs/7/step", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
])  # fmt: skip
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, where, said, limit, used, cached):
    """Of any group that the process is in, and with what the system can take back of files that were read."""
    monkeypatch.setattr(ram, "GROUPS", tmp_path)
    monkeypatch.setattr(ram, "MINE", tmp_path / "mine")
    machine = main_memory()[1]  # nothing is known of groups
    (tmp_path / "mine").write_text(f"{said}\n")
    job = tmp_path / where / "jobs" / "7"
    job.mkdir(parents=True)
    (job / limit).write_text("max\n" if limit == "memory.max" else f"{(1 << 63) - 4096}\n")
    (job / used).write_text("5000\n")
    assert main_memory()[1] == machine > 0
    (job / limit).write_text("12000\n")
    assert main_memory() == (7000.0, 12000.0)
    (job / "memory.stat").write_text(f"anon 9\n{cached} 4000\n")
    assert main_memory() == (11000.0, 12000.0)
    (job.parent / limit).write_text("11000\n")  # a tighter one above it, full of what stays
    (job.parent / used).write_text("10900\n")
    assert main_memory() == (100.0, 11000.0)


def test_a_run_directory_that_cannot_be_written_is_refused_before_anything_begins(make_tree, tmp_path, monkeypatch):
    """By the dry run as well; a plan for other devices is for another machine's disks."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for run_dir, why in (
        ("file/run", "file is a file; choose a directory"),
        ("link/run", "link is a link to .*gone, which is not there"),
    ):
        config = load_config(make_tree(run_dir))
        for command in (DISTILL, SFT):
            with pytest.raises(npd.UserError, match=f"run_dir .*{run_dir} cannot be written: .*{why}"):
                prepare(config, command)
        prepare(config, DISTILL, on_paper=True)
    check_writable(tmp_path / "a" / "run")
    monkeypatch.setattr(os, "access", lambda place, how: place != tmp_path)
    with pytest.raises(npd.UserError, match="this user may write nothing in"):
        check_writable(tmp_path / "a" / "run")


def test_a_run_that_goes_on_asks_for_what_is_to_come(make_tree, monkeypatch):
    """Of generations and checkpoints, less than at its beginning; what comes before a long evaluation counts."""
    setup = prepare(load_config(make_tree(schedule={"generations": 8, "lead": 0.0})), DISTILL)
    args = (setup, 80, 8, 1e6, 0.0)
    fresh = growth(*args)
    assert fresh.left == fresh.disk
    monkeypatch.setattr(Store, "checkpoints", lambda self: [70, 73])
    monkeypatch.setattr(Store, "resumed_generation", lambda self: 7)
    monkeypatch.setattr(Store, "current", 7)
    late = growth(*args)
    assert late.disk == fresh.disk
    assert 3e6 + 2 * 1e6 < late.left < fresh.disk / 3  # a checkpoint, a snapshot and student/
    once = prepare(load_config(make_tree(checkpoint={"every_steps": 1000})), DISTILL)
    plain = growth(once, 80, 2, 1e6, 0.0)
    monkeypatch.setattr(once, "tasks", [SimpleNamespace(slow=True, files=False)])
    assert growth(once, 80, 2, 1e6, 0.0).disk > plain.disk + 3e6


def test_sizes_are_said_in_a_unit_that_says_something():
    assert [gib(size) for size in (0, 1000, 5000, 3e6, 2e9, 5e12)] == [
        "0 bytes", "0.98 KiB", "4.88 KiB", "2.86 MiB", "1.86 GiB", "4,656.61 GiB",
    ]  # fmt: skip


RAY = {"rollout": "ray"}


@pytest.mark.parametrize(("options", "gpus", "words"), [
    ({}, 0, "1 actor of a Ray cluster of this machine alone, .* each takes 1 CPUs, 0 GPUs, no memory set aside"),
    ({}, 4, "3 actors .* each takes 1 CPUs, 1 GPUs"),
    ({"num_gpus": 0.5}, 2, "2 actors .* 1 CPUs, 0.5 GPUs"),
    ({"actors": 2, "num_cpus": 3, "memory": 3 << 30}, 0, "2 actors .* takes 3 CPUs, 0 GPUs, 3.00 GiB of memory set aside"),
    ({"address": "head:6379", "resources": {"rollout": 1}}, 0,
     "as many actors as there is room for of the Ray cluster at head:6379, .* 1 CPUs, 1 GPU where it has GPUs, 1 rollout"),
])  # fmt: skip
def test_the_plan_says_what_actors_take(make_tree, monkeypatch, options, gpus, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = load_config(make_tree(placement={**RAY, "ray": options}, schedule={"lead": 1.0}))
    placed = resolve_placement(config)
    found = told(config.placement.ray, needs_of(config.placement.ray, placed, local="address" not in options))
    assert re.search(words, found), found


def test_actors_that_this_machine_has_no_gpus_for_are_refused_before_it_begins(make_tree):
    pytest.importorskip("ray")
    tree = make_tree(placement={**RAY, "ray": {"actors": 2, "num_gpus": 1}})
    with pytest.raises(npd.UserError, match="asks for 2 actors of 1 GPUs on this machine, and 0 of its GPUs do not train"):
        prepare(load_config(tree), DISTILL)
    tree = make_tree(placement={**RAY, "ray": {"actors": 2}}, schedule={"lead": 1.0})
    setup = prepare(load_config(tree), DISTILL)
    table = plan_rows(setup, make_plan(setup)) + fits.memory_rows(setup, fits.places(setup))
    rows = {row[0]: row[1] for row in table}
    assert rows["refresh"].startswith("made by 2 actors")
    assert rows["memory of one that generates, on a CPU"].startswith("needs about 0.6")


# -- what stands in for what was asked


def test_another_engine_than_was_asked_for_is_said(make_tree, data_file, monkeypatch, vllm_is_there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    evaluated = {"data": {"eval": str(data_file)}, "evaluation": {"tasks": ["answer"]}}
    there = load_config(make_tree(rollout={"engine": "vllm"}, placement={"rollout": "cuda:1"}, **evaluated))
    here = engine_beside_training(there, resolve_placement(there, take_turns=True), 1, trains=False)
    assert here.name == "transformers"
    monkeypatch.setattr(npd.preflight.models, "use_device", lambda device: None)
    beside = there.model_copy(update={"schedule": ScheduleConfig(lead=1.0)})
    for config, command in ((there, EVAL), (beside, DISTILL)):
        notes = [note for note in prepare(config, command).notes if "not by rollout.engine vllm" in note]
        assert len(notes) == 1
    assert "the first on cuda:1." in here.note(there)
    assert "Give" not in here.note(there)
    plain = load_config(make_tree(**evaluated))
    assert engine_beside_training(plain, resolve_placement(plain), 1) == EngineHere("transformers")
    assert not any("rollout.engine" in note for note in prepare(plain, EVAL).notes)
    quiet = load_config(make_tree(rollout={"engine": "vllm"}, placement={"rollout": "cuda:1"}, schedule={"lead": 1.0}))
    assert not any("rollout.engine" in note for note in prepare(quiet, DISTILL).notes)  # nothing is written here


def test_turns_that_nobody_asked_for_are_said(make_tree, monkeypatch):
    monkeypatch.setattr(npd.placement, "cores", lambda: 1)
    setup = prepare(load_config(make_tree(schedule={"lead": 1.0})), DISTILL)
    assert "schedule.lead 1 is not taken: there is one CPU core, so that they take turns." in setup.notes
    assert not any("schedule.lead" in note for note in prepare(load_config(make_tree()), DISTILL).notes)
    ray = load_config(make_tree(placement=RAY, data={"references": "teacher"}))
    assert any(note.startswith("placement.rollout ray is for generations") for note in prepare(ray, SFT).notes)


def test_gpus_that_pytorch_cannot_use_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(npd.placement, "GPUS_OF_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unused_gpus() == ""
    (tmp_path / "0000:01:00.0").mkdir()
    assert "has 1 NVIDIA GPU, but PyTorch" in unused_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus() == ""


def test_slower_ways_to_read_and_write_are_said(student_dir, monkeypatch):
    config = ModelConfig(model=str(student_dir))
    model = models.load_model(config)
    assert models.reading_note(model, config) == models.writing_note(model) == ""
    remember_layout(model, Layout(Parts("model", None), "one a row", why="its attention has sinks"))
    assert "is read as one sample a row: exact, and slower by the padding (not end" in models.reading_note(model, config)
    assert models.reading_note(model, config.model_copy(update={"attention": "rows"})) == ""
    monkeypatch.setattr(models.writing, "ways_to_write", lambda model: models.Writing(False, False))
    assert models.writing_note(model) == "without a cache, every prefix computed anew and prompts of one length at a time"
