"""Runs that are kept a second time in a store: whenever copying stops, the run goes on elsewhere to the same end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from click.testing import CliRunner
from conftest import save_model, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import npd
import npd.mirror.arriving
import npd.mirror.copying
import npd.mirror.keeping
import npd.mirror.place
import npd.run
from npd import cli
from npd.config import load_config
from npd.demo.task import make_problems
from npd.errors import RunError, UserError
from npd.mirror import Mirror, Place, arrive
from npd.mirror.contents import needed, old_checkpoints, old_snapshots
from npd.observe.display import Display
from npd.observe.events import Events, SpanName, read_events
from npd.store import Store
from npd.store.sealed import SEAL, check_sealed

WEIGHTS = Path("student/model.safetensors")
TIMED = ("tokens_per_second", "publish_seconds")
OF_ONE_MACHINE = {".lock", "mirror.json"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Looks often, and does not wait long for a store that fails."""
    monkeypatch.setattr(npd.mirror.keeping, "LOOK", 0.01)
    monkeypatch.setattr(npd.mirror.keeping, "EVERY", 0.05)
    monkeypatch.setattr(npd.mirror.keeping, "PATIENCE", 0.0)
    monkeypatch.setattr(npd.mirror.place, "FIRST_PAUSE", 0.001)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def saying() -> tuple[Display, StringIO]:
    said = StringIO()
    display = Display()
    display.console = Console(file=said, width=1000)
    return display, said


def mirrored(tree: dict[str, Any], uri: str) -> dict[str, Any]:
    return tree | {"checkpoint": tree["checkpoint"] | {"mirror": uri}}


# -- at whatever moment copying stops


@dataclass
class Recorded:
    """A run, how it ended, and all that was done in its mirror, one thing after another."""

    tree: dict[str, Any]
    end: Path
    done: list[tuple[str, bytes | None]]
    """Names with what was written, or None: deleted."""

    def state(self, count: int, folder: Path) -> Path:
        """The mirror as it was after so many of them."""
        for name, data in self.done[:count]:
            path = folder / name
            if data is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        return folder


class RecordingPlace(Place):
    """Keeps what is done, a file of a directory that is deleted at a time, in an order that is not the one of names."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.done: list[tuple[str, bytes | None]] = []

    def put(self, name: str, file: Path) -> int:
        size = super().put(name, file)
        self.done.append((name, (Path(self.base) / name).read_bytes()))
        return size

    def put_bytes(self, name: str, data: bytes) -> int:
        if name == "mirror.json":  # all others come by `put`
            self.done.append((name, data))
        return super().put_bytes(name, data)

    def delete(self, name: str) -> None:
        super().delete(name)
        self.done.append((name, None))

    def delete_folder(self, name: str) -> None:
        inside = [file.relative_to(self.base).as_posix() for file in (Path(self.base) / name).rglob("*") if file.is_file()]
        self.done += [(file, None) for file in sorted(inside, reverse=True)]
        super().delete_folder(name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    base = tmp_path_factory.mktemp("recorded")
    teacher, student = save_model(base / "teacher", seed=1, layers=3), save_model(base / "student", seed=2)
    rows = [{"prompt": p.prompt, "completion": p.completion} for p in make_problems(12, seed=7)]
    tree: dict[str, Any] = {
        "run_dir": str(base / "run"),
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "data": {"train": str(write_jsonl(base / "train.jsonl", rows)), "max_prompt_tokens": 32},
        "schedule": {"generations": 4, "passes": 2, "prompts": 6, "lead": 0.0},
        "rollout": {"max_new_tokens": 12, "batch_size": 4, "part_size": 3},
        "scoring": {"top_k": 4, "batch_tokens": 128},
        "selection": {"rule": "none"},
        "packing": {"length": 64},
        "training": {"batch_tokens": 64, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 2, "keep": 1, "mirror": f"file://{base}/mirror"},
        "tracking": {"trackers": [], "report": False},
    }
    places: list[RecordingPlace] = []

    def place(uri: str) -> RecordingPlace:
        places.append(RecordingPlace(uri))
        return places[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npd.mirror.keeping, "LOOK", 0.002)
        patch.setattr(npd.mirror.keeping, "EVERY", 0.01)
        patch.setattr(npd.mirror.copying, "Place", place)
        npd.distill(tree)
    done = [operation for each in places for operation in each.done]
    mine, there = files_of(base / "run"), files_of(base / "mirror")
    assert mine.keys() - there.keys() == {".lock"}
    assert there.keys() <= mine.keys()
    assert {name for name in there if there[name] != mine[name]} <= {"events.jsonl"}  # the last copy is on record after it
    assert sum(data is None for _, data in done) > 20, "nothing was deleted"
    assert len({data for name, data in done if name == "checkpoints/LATEST"}) > 2, "copied at the end alone"
    never_change = [name for name, data in done if data is not None and name.startswith(("policy/v", "checkpoints/step"))]
    assert len(never_change) == len({*never_change}), "copied twice"
    return Recorded(tree, base / "run", done)


def state(recorded: Recorded, count: int, tmp: Path) -> tuple[dict[str, Any], Path]:
    for folder in ("mirror", "fresh"):
        shutil.rmtree(tmp / folder, ignore_errors=True)
    there = recorded.state(count, tmp / "mirror")
    return mirrored(recorded.tree | {"run_dir": str(tmp / "fresh")}, f"file://{there}"), tmp / "fresh"


@settings(max_examples=20)
@given(st.data())
def test_every_moment_of_a_mirror_is_a_run_that_can_go_on(recorded, tmp_path_factory, data):
    count = data.draw(st.integers(0, len(recorded.done)), "things done in the mirror")
    tree, run_dir = state(recorded, count, tmp_path_factory.getbasetemp())
    display, said = saying()
    arrive(load_config(tree), "distill", display)
    if not said.getvalue():  # before there is a run
        assert "config.yaml" not in {name for name, _ in recorded.done[:count]}
        assert not run_dir.exists()
        return
    store = Store(run_dir)
    store.check(load_config(tree), "distill")
    assert store.prompts() is not None
    assert not list(run_dir.rglob("*.tmp"))
    assert "damaged" not in said.getvalue()
    if store.finished:
        store.check_model(store.student)
        assert files_of(store.student) == files_of(recorded.end / "student")
        assert metrics_of(run_dir) == metrics_of(recorded.end)
        assert not store.checkpoints()  # which nobody needs
        return
    for version in store.policies():
        assert store.check_model(store.policy(version))["policy_version"] == version
    steps = store.checkpoints()
    assert len(steps) <= 1
    if not steps:
        return
    assert f"at step {steps[0]}" in said.getvalue()
    facts = check_sealed(store.checkpoint(steps[0]), "checkpoint", "")
    generation = facts["generation"]
    assert store.part(generation, 0).exists() or generation in store.policies()
    assert facts["parts"] == sorted(store.parts(generation) & {*facts["parts"]})  # what it was trained on is there
    assert 0 in store.policies()
    assert facts["published"] in store.policies() or store.manifest(facts["published"]) is not None
    trained = [line["step"] for line in metrics_of(run_dir) if "loss" in line]
    assert trained[: steps[0]] == list(range(1, steps[0] + 1))
    for g in range(generation):
        manifest = store.manifest(g)
        assert manifest is not None
        assert manifest.removed or store.parts(g)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_it_ends_as_the_undisturbed_run_did(recorded, tmp_path, share):
    tree, run_dir = state(recorded, round(share * len(recorded.done)), tmp_path)
    npd.distill(tree)
    assert (run_dir / WEIGHTS).read_bytes() == (recorded.end / WEIGHTS).read_bytes()
    assert metrics_of(run_dir) == metrics_of(recorded.end)
    mine, there = files_of(run_dir), files_of(tmp_path / "mirror")  # and the mirror is that run again
    assert {name for name in there if mine.get(name) != there[name]} <= {"events.jsonl"}
    assert mine.keys() - there.keys() == {".lock"}


@pytest.mark.parametrize("name", ["policy/v000000/../../../out", "student/./x", "logs//x", "policy/v000000/..\\x"])
def test_no_name_in_a_mirror_leads_out_of_the_run(tmp_path, monkeypatch, name):
    """A store of keys takes any name; nothing is written where such a one leads."""
    whole = npd.mirror.place.Place._all
    monkeypatch.setattr(npd.mirror.place.Place, "_all", lambda self: whole(self) | {name: 1})
    monkeypatch.setattr(npd.mirror.place.Place, "fetch", lambda *_: pytest.fail("it was fetched"))
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with pytest.raises(UserError, match="no name of a file below it"):
        npd.mirror.arriving.bring_down(Place(str(mirror)), tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_what_was_half_brought_down_is_brought_down_again(recorded, tmp_path, monkeypatch):
    tree, run_dir = state(recorded, len(recorded.done) * 3 // 5, tmp_path)
    real, left = Place.fetch, 12

    def fetch(self: Place, name: str, to: Path) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, name, to)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "fetch", fetch)
        with pytest.raises(KeyboardInterrupt):
            npd.distill(tree)
    assert run_dir.exists()
    assert not (run_dir / "config.yaml").exists()
    npd.distill(tree)
    assert (run_dir / WEIGHTS).read_bytes() == (recorded.end / WEIGHTS).read_bytes()


def test_what_is_damaged_in_the_mirror_is_not_gone_on_from(recorded, tmp_path):
    """A part is made again; of two checkpoints the one before is taken."""
    tree, run_dir = state(recorded, len(recorded.done) * 3 // 5, tmp_path)
    there = tmp_path / "mirror"
    newest = sorted((there / "checkpoints").glob(f"step-*/{SEAL}"))[-1].parent  # one that was still being copied is none
    part = sorted(there.glob("generations/g*/part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-9] + b"\0" * 9)
    weights = newest / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    display, said = saying()
    npd.distill(tree, display=display)
    assert "not what was written. The one before is taken." in said.getvalue()
    assert (run_dir / WEIGHTS).read_bytes() == (recorded.end / WEIGHTS).read_bytes()


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["checkpoints/step-", "policy/v"]), st.integers(0, 9), st.sampled_from(["npd.json", "x", "y/z"])
    ),
    max_size=40,
).map(lambda found: {f"{folder}{number:06d}/{file}" for folder, number, file in found})


@given(NAMES, st.integers(0, 9), st.integers(1, 3))
def test_what_is_kept_is_what_a_run_would_keep(names, generation, keep):
    whole = sorted({int(n[17:23]) for n in names if n.startswith("checkpoints") and n.endswith("npd.json")})
    some = {int(n[17:23]) for n in names if n.startswith("checkpoints")}
    old = old_checkpoints(names, keep)
    assert not {*old} & {*whole[-keep:]}
    assert {*some} - {*old} == {*whole[-keep:]} | {step for step in some if not whole or step > whole[-1]}
    snapshots = sorted({int(n[8:14]) for n in names if n.startswith("policy") and n.endswith("npd.json")})
    gone = old_snapshots(names, generation, keep)
    assert 0 not in gone
    assert max(gone, default=0) <= generation
    assert {*snapshots} - {*gone} >= {v for v in snapshots if v > generation} | {
        *[v for v in snapshots if v <= generation][-keep:]
    }
    brought = [*needed(names, None, generation, keep)]
    assert {int(n[8:14]) for n in brought} == {*snapshots} - {*gone}


# -- a store that fails


class Failing(Place):
    """Fails to take files, so many times, or while `dead` is set."""

    failures, dead, why = 0, False, "AWS Error NETWORK_CONNECTION during PutObject: connection reset"
    tried: ClassVar[Counter[str]]
    counting = threading.Lock()  # several files are copied at a time

    def _write(self, name: str, size: int, write: Any) -> int:
        cls = type(self)
        with cls.counting:
            fails = name != "mirror.json" and (cls.dead or cls.failures > 0)
            if fails:
                cls.failures -= 1
                cls.tried[name] += 1
        if fails:
            raise OSError(cls.why)
        return super()._write(name, size, write)


@pytest.fixture
def failing(monkeypatch):
    class Mine(Failing):
        tried: ClassVar[Counter[str]] = Counter()

    monkeypatch.setattr(npd.mirror.copying, "Place", Mine)
    return Mine


def test_uploads_that_fail_are_tried_again(make_tree, tmp_path, failing):
    failing.failures = 3
    display, said = saying()
    npd.distill(mirrored(make_tree(), f"file://{tmp_path}/mirror"), display=display)
    assert "falls behind" not in said.getvalue()
    assert "has all of it" in said.getvalue()
    assert files_of(tmp_path / "mirror").keys() == files_of(tmp_path / "run").keys() - {".lock"}


@pytest.mark.parametrize(
    ("why", "tries"),
    [
        ("No space left", 5),
        ("AWS Error ACCESS_DENIED during PutObject", 1),
    ],
)
def test_a_store_that_is_dead_loses_no_run(make_tree, tmp_path, failing, monkeypatch, why, tries):
    """Full, denied or away: the run ends, one paragraph says what is not mirrored, and the same command copies it later."""
    failing.dead, failing.why = True, why
    finish = Mirror.finish

    def last(self: Mirror) -> None:
        failing.tried.clear()  # the run's end may have cut the tries of a copy beside it short
        finish(self)

    monkeypatch.setattr(Mirror, "finish", last)
    display, said = saying()
    tree = mirrored(make_tree(), f"file://{tmp_path}/mirror")
    with pytest.raises(RunError, match="is whole, but its mirror is not") as raised:
        npd.distill(tree, display=display)
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert why in message
    assert "MB, of student, checkpoints, policy, generations) is missing there" in message
    assert said.getvalue().count("Warning: The mirror falls behind") == 1
    assert [e.facts["about"] for e in read_events(tmp_path / "run/events.jsonl", SpanName.WARNING)] == ["mirror"]
    store = Store(tmp_path / "run")
    assert store.finished
    assert {*failing.tried.values()} == {tries}  # each file that was tried
    failing.dead = False
    npd.distill(tree)
    assert files_of(tmp_path / "mirror")[str(WEIGHTS)] == (store.student / "model.safetensors").read_bytes()


def test_training_waits_for_no_store(make_tree, tmp_path, monkeypatch):
    """One that takes a minute for a file has none when the run has ended: it is waited for then."""
    training = threading.Event()
    waits: list[str] = []
    real = Place._write

    def write(self: Place, name: str, size: int, put: Any) -> int:
        if name.startswith("policy"):
            waits.append(name)
            assert training.wait(60)
        return real(self, name, size, put)

    monkeypatch.setattr(Place, "_write", write)
    ended = npd.run.Run._save_adapter

    def save(self: npd.run.Run, *arguments: Any) -> None:
        assert {Path(name).parent for name in waits} == {Path("policy/v000000")}, (
            "training is over, and these are on their way"
        )
        assert "policy/v000000/npd.json" not in waits
        training.set()
        ended(self, *arguments)

    monkeypatch.setattr(npd.run.Run, "_save_adapter", save)
    npd.distill(mirrored(make_tree(), f"file://{tmp_path}/mirror"))
    assert (tmp_path / "mirror" / WEIGHTS).exists()
    spans = [*read_events(tmp_path / "run/events.jsonl", SpanName.MIRROR)]
    assert sum(span.facts["files"] for span in spans) >= len(files_of(tmp_path / "mirror")) - 1
    assert max(span.facts["lag"] for span in spans) > 0


def test_a_run_that_fails_says_what_is_not_mirrored(make_tree, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(npd.mirror.keeping, "GRACE", 0.1)
    failing.dead = True
    display, said = saying()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(npd.run.Run, "_save_adapter", fail)
    with pytest.raises(KeyboardInterrupt):
        npd.distill(mirrored(make_tree(), f"file://{tmp_path}/mirror"), display=display)
    assert "Not in the mirror" in said.getvalue()
    assert "The same command, run again here, copies it" in said.getvalue()


@pytest.mark.parametrize("cut", [0, 5])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, cut):
    place = Place(f"file://{tmp_path}/there")
    place.put_bytes("a/b", b"before")

    def broken(target: Any) -> None:
        target.write(b"x" * cut)
        raise OSError("the cable was pulled")

    with pytest.raises(OSError, match="cable"):
        place._write("a/b", 10, broken)
    with pytest.raises(OSError, match="bytes of 10"):
        place._write("a/b", 10, lambda target: target.write(b"short"))
    assert place.files() == {"a/b": 6}
    assert place.read("a/b") == b"before"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_here_is_not_the_stores_fault(recorded, tmp_path, monkeypatch):
    tree, run_dir = state(recorded, len(recorded.done) // 2, tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(npd.mirror.place, "_write_all", full)
        with pytest.raises(RunError, match="The disk is full"):
            npd.distill(tree)
    assert not (run_dir / "config.yaml").exists()


# -- whose it is


def test_two_runs_do_not_share_a_mirror(make_tree, tmp_path):
    uri = f"file://{tmp_path}/mirror"
    short: dict[str, Any] = {"training": {"max_steps": 1}, "schedule": {"generations": 1}}
    npd.distill(mirrored(make_tree("one", **short), uri))
    with pytest.raises(UserError, match="another configuration made: seed: 0 -> 1"):
        npd.distill(mirrored(make_tree("two", **short) | {"seed": 1}, uri))
    assert not (tmp_path / "two").exists()
    with pytest.raises(UserError, match="holds a run of `npd distill`"):
        npd.sft(mirrored(make_tree("two", **short), uri))
    npd.distill(make_tree("three", **short))
    with pytest.raises(UserError, match="is the mirror of another run"):
        npd.distill(mirrored(make_tree("three", **short), uri))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and no mirror of a run \(it holds thesis.tex"):
        npd.distill(mirrored(make_tree("three", **short), f"file://{tmp_path}/other"))
    assert files_of(tmp_path / "other") == {"thesis.tex": b"mine"}
    npd.distill(mirrored(make_tree("three", **short), f"file://{tmp_path}/new"))  # a run may get a mirror later
    assert (tmp_path / "new" / WEIGHTS).exists()


def test_a_copy_that_was_continued_elsewhere_is_refused(make_tree, tmp_path):
    uri, short = f"file://{tmp_path}/mirror", {"training": {"max_steps": 1}, "schedule": {"generations": 1}}
    npd.distill(mirrored(make_tree("one", **short), uri))
    npd.distill(mirrored(make_tree("one", **short), uri))
    npd.distill(mirrored(make_tree("two", **short), uri))  # another machine takes it from there
    with pytest.raises(UserError, match="was continued elsewhere"):
        npd.distill(mirrored(make_tree("one", **short), uri))
    npd.distill(mirrored(make_tree("two", **short), uri))


def test_a_mirror_that_is_taken_over_is_left_alone(make_tree, tmp_path):
    """The first of two that run at once hears of the second at its next copy, and writes nothing more."""
    tree = mirrored(make_tree("one"), f"file://{tmp_path}/mirror")
    npd.distill(tree | {"training": tree["training"] | {"max_steps": 1}})
    config = load_config(tree)
    display, _ = saying()
    first = Mirror(config, display, Events(tmp_path / "one/events.jsonl"))
    first.copies.claim()
    first.finish()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    second = Mirror(load_config(tree | {"run_dir": str(tmp_path / "two")}), display, Events(tmp_path / "two/events.jsonl"))
    second.copies.claim()
    before = files_of(tmp_path / "mirror")
    (tmp_path / "one/report.html").write_text("x")
    with pytest.raises(RunError, match=r"no longer this process's: it was taken over by .*which began"):
        first.close(None)
    assert files_of(tmp_path / "mirror") == before


def test_what_an_earlier_process_copied_is_not_copied_again(make_tree, tmp_path):
    tree = mirrored(make_tree(), f"file://{tmp_path}/mirror")
    npd.distill(tree)
    display, _ = saying()
    mirror = Mirror(load_config(tree), display, Events(tmp_path / "run/events.jsonl"))
    mirror.copies.claim()
    mirror.finish()
    left = {"config.yaml", "prompts.arrow", "metrics.jsonl", "events.jsonl"}
    assert mirror.copies.total.files <= len(left) + 3  # and LATEST, LATEST, CURRENT
    part = next(tmp_path.glob("run/generations/g001/part-*"))
    part.write_bytes(part.read_bytes() + b"0")  # another one
    mirror.finish()
    assert files_of(tmp_path / "mirror")[part.relative_to(tmp_path / "run").as_posix()] == part.read_bytes()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://me:secret@bucket/x", "a user's name or password"),
        ("s3://bucket/x?secret_key=abc", "a key or a password in a URL"),
        ("s3://bucket/x?region=a&session_token=abc", "a key or a password in a URL"),
        ("bucket/x", "must be a URI"),
        ("://x", "must be a URI"),
    ],
)
def test_uris_that_are_refused(make_tree, uri, message):
    with pytest.raises(UserError, match=message) as raised:
        load_config(mirrored(make_tree(), uri))
    assert "abc" not in str(raised.value)


@pytest.mark.parametrize("inner", ["", "/mirror"])
def test_a_mirror_within_the_run_is_refused(make_tree, tmp_path, inner):
    with pytest.raises(UserError, match="lie in each other"):
        npd.distill(mirrored(make_tree(), f"{tmp_path}/run{inner}"))
    assert not list(tmp_path.glob("run/generations/*"))


def test_an_unknown_store_is_one_paragraph(make_tree, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.mirror ftp://x/y cannot be used"):
        npd.distill(mirrored(make_tree(), "ftp://x/y"))
    assert not (tmp_path / "run").exists()


def test_the_dry_run_says_where_and_how_much(make_tree, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(mirrored(make_tree(), f"file://{tmp_path}/mirror")))
    said = CliRunner().invoke(cli.main, ["distill", str(config), "--dry-run"], catch_exceptions=False, env={"COLUMNS": "300"})
    assert "which holds no run yet" in said.output
    assert "iB copied" in said.output
    assert not (tmp_path / "mirror").exists()
    npd.distill(config)
    shutil.rmtree(tmp_path / "run")
    said = CliRunner().invoke(cli.main, ["distill", str(config), "--dry-run"], catch_exceptions=False, env={"COLUMNS": "300"})
    assert "whose run (finished) is brought down" in said.output
    assert not (tmp_path / "run").exists()


def test_by_hand_both_ways(make_tree, tmp_path):
    npd.distill(make_tree(training={"max_steps": 4}, tracking={"report": True}))
    uri = f"file://{tmp_path}/there"

    def sync(*arguments: object) -> str:
        return CliRunner().invoke(cli.main, ["sync", *map(str, arguments)], catch_exceptions=False).output

    assert "has all of it" in sync(tmp_path / "run", uri)
    assert "the run is finished" in sync(uri, tmp_path / "back")
    assert files_of(tmp_path / "back")[str(WEIGHTS)] == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert npd.distill(make_tree("back", training={"max_steps": 4})).steps == 4
    for wrong, why in [
        ((uri, uri), "one must be"),
        ((uri, tmp_path / "run"), "not empty"),
        ((uri + "x", tmp_path / "b"), "no run"),
    ]:
        with pytest.raises(UserError, match=why):
            sync(*wrong)


def test_the_report_counts_what_was_copied(make_tree, tmp_path):
    from npd.report.facts import gather
    from npd.report.mirrored import mirror_table

    npd.distill(mirrored(make_tree(), f"file://{tmp_path}/mirror"))
    facts = gather(tmp_path / "run")
    assert facts.status.kind == "finished"
    table = mirror_table(facts)
    assert table is not None
    spans = [*read_events(tmp_path / "run/events.jsonl", SpanName.MIRROR)]
    assert table.rows[0][0] == f"{len(spans):,}"
    assert table.rows[0][1] == f"{sum(span.facts['files'] for span in spans):,}"
    npd.distill(make_tree("plain", training={"max_steps": 1}))
    assert mirror_table(gather(tmp_path / "plain")) is None
    assert not (tmp_path / "plain/mirror.json").exists()


# -- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's server, with a bucket; its address."""
    server = pytest.importorskip("moto.server", reason="moto speaks S3").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    address = f"127.0.0.1:{server.get_host_and_port()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(f"AWS_{name}", value)
        _ask(f"http://{address}/bucket", "PUT")
        yield address
    server.stop()


def _ask(url: str, method: str, data: bytes = b"") -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)):
        pass


def test_over_s3(make_tree, tmp_path, s3):
    """A whole run, killed where its third checkpoint is in the mirror, goes on on another machine to the same end."""
    uri = f"s3://bucket/runs/x?endpoint_override={s3}&scheme=http&region=us-east-1"
    tree = mirrored(make_tree(checkpoint={"every_steps": 2}), uri)
    config = load_config(tree)
    undisturbed = npd.distill(tree)
    there = Place(uri)
    mine = files_of(tmp_path / "run")
    assert there.files().keys() == mine.keys() - {".lock"}
    assert all(there.read(name) == mine[name] for name in there.files() if name != "events.jsonl")
    for name in [n for n in there.files() if n.startswith("student")]:  # as it was before its end
        there.delete(name)
    steps = sorted(n for n in there.files() if n.startswith("checkpoints/step-") and n.endswith("npd.json"))
    assert len(steps) == config.checkpoint.keep
    there.delete(steps[-1])
    again = npd.distill(tree | {"run_dir": str(tmp_path / "again")})
    assert (again.student / "model.safetensors").read_bytes() == (undisturbed.student / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "run")
    assert "student/npd.json" in Place(uri).files()


def test_large_files_over_s3(tmp_path, s3, monkeypatch):
    """In pieces; what fails on the way is not there at all."""
    monkeypatch.setattr(npd.mirror.place, "SMALL", 1)
    place = Place(f"s3://bucket/large?endpoint_override={s3}&scheme=http&region=us-east-1")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(13 << 20))
    assert place.put("a/large", large) == 13 << 20
    assert place.fetch("a/large", tmp_path / "back") == 13 << 20
    assert (tmp_path / "back").read_bytes() == large.read_bytes()

    def broken(target: Any) -> None:
        target.write(b"x" * (11 << 20))
        raise OSError("the disk is broken")

    with pytest.raises(OSError, match="disk is broken"):
        place._write("a/broken", 20 << 20, broken)
    assert place.files() == {"a/large": 13 << 20}
    place.delete_folder("a")
    assert place.files() == {}


@pytest.mark.parametrize(
    ("where", "why"), [("s3://nobucket/x?", "NO_SUCH_BUCKET"), ("s3://bucket/denied?", "ACCESS_DENIED|INVALID_ACCESS_KEY_ID")]
)
def test_what_is_wrong_with_a_store_is_said_at_the_start(make_tree, tmp_path, s3, where, why):
    if "denied" in where:
        _ask(f"http://{s3}/moto-api/reset-auth", "POST", b"0")
    try:
        began = time.monotonic()
        with pytest.raises(UserError, match=why) as raised:
            npd.distill(mirrored(make_tree(), f"{where}endpoint_override={s3}&scheme=http&region=us-east-1"))
        assert time.monotonic() - began < 20
        assert "Credentials come from the environment" in str(raised.value)
        assert str(raised.value).isprintable()
        assert not list(tmp_path.glob("run/generations/*"))
    finally:
        _ask(f"http://{s3}/moto-api/reset-auth", "POST", b"1000000000")
