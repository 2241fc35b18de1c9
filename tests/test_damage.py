"""What may befall the files of a run: it goes on to the same end, or one paragraph tells why not."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import save_model, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import npd
from npd import run
from npd.config import load_config
from npd.demo.task import make_problems
from npd.errors import NpdError
from npd.generations.follower import follow
from npd.models import load_model, load_tokenizer
from npd.models import save_model as save_student
from npd.observe.display import Display
from npd.report.page import write_report
from npd.signals import end_in_order
from npd.store import Store
from npd.store.disk import UNSAID, disk_error, explanation
from npd.store.names import CHECKPOINT, GENERATION, LOG, PART, SNAPSHOT
from npd.train.trainer import Trainer

QUIET = Display(quiet=True)
KINDS = (SNAPSHOT, CHECKPOINT, GENERATION, PART, LOG)


class Stop(BaseException):
    """Neither an error nor an exit: what nobody catches."""


class Runs:
    """One tiny run, unfinished and finished, to be copied and damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = root / "run"
        rows = [{"prompt": p.prompt, "completion": p.completion} for p in make_problems(6, seed=7)]
        self.tree: dict[str, Any] = {
            "run_dir": str(self.run_dir),
            "student": {"model": str(save_model(root / "student", seed=2, layers=1))},
            "teacher": {"model": str(save_model(root / "teacher", seed=1, layers=1))},
            "data": {"train": str(write_jsonl(root / "train.jsonl", rows)), "max_prompt_tokens": 32},
            "schedule": {"generations": 2, "passes": 1, "lead": 0.0},
            "rollout": {"max_new_tokens": 6, "batch_size": 4, "part_size": 3},
            "scoring": {"top_k": 3, "batch_tokens": 128},
            "selection": {"rule": "none"},
            "packing": {"length": 64},
            "training": {"batch_tokens": 64, "learning_rate": 1e-3},
            "checkpoint": {"every_steps": 1},
            "tracking": {"trackers": [], "report": False},
        }
        real = Trainer.step
        with pytest.MonkeyPatch.context() as patch:

            def step(trainer: Trainer, *args: Any) -> Any:
                if args[3] > 2:
                    raise Stop
                return real(trainer, *args)

            patch.setattr(Trainer, "step", step)
            with suppress(Stop):
                npd.distill(self.tree)
        shutil.copytree(self.run_dir, root / "unfinished")
        self.weights = (npd.distill(self.tree).student / "model.safetensors").read_bytes()
        shutil.copytree(self.run_dir, root / "finished")

    def take(self, state: str) -> Path:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.root / state, self.run_dir)
        return self.run_dir

    def goes_on(self) -> None:
        """To the same end."""
        assert (npd.distill(self.tree).student / "model.safetensors").read_bytes() == self.weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("damage"))


def one_paragraph(error: NpdError) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 2000
    return text


def outcome(work: Callable[[], object]) -> str | None:
    """None, or the paragraph; any other exception fails the test."""
    try:
        work()
    except NpdError as error:
        return one_paragraph(error)
    return None


# -- damage


JSON = [b"null", b"true", b"-1", b"[]", b"{}", b'"x"', b'{"generation": "x", "sha256": 3}', b"[" * 5000, b"9" * 5000]


def damages() -> st.SearchStrategy[Callable[[Path], None]]:
    """What may be done to a file."""

    def flip(at: float, bit: int) -> Callable[[Path], None]:
        def act(file: Path) -> None:
            content = bytearray(file.read_bytes())
            if content:
                content[int(at * (len(content) - 1))] ^= 1 << bit
                file.write_bytes(content)

        return act

    def cut(at: float) -> Callable[[Path], None]:
        def act(file: Path) -> None:
            file.write_bytes(file.read_bytes()[: int(at * file.stat().st_size)])

        return act

    def become(content: bytes) -> Callable[[Path], None]:
        def act(file: Path) -> None:
            file.write_bytes(content)

        return act

    def insert(at: float, content: bytes) -> Callable[[Path], None]:
        def act(file: Path) -> None:
            was = file.read_bytes()
            middle = int(at * len(was))
            file.write_bytes(was[:middle] + content + was[middle:])

        return act

    def directory(file: Path) -> None:
        file.unlink()
        (file / "inside").mkdir(parents=True)

    def link(file: Path) -> None:
        file.rename(file.with_name("was"))
        file.symlink_to(file.with_name("was"))

    def pipe(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    places = st.floats(0, 1)
    return st.one_of(
        st.builds(flip, places, st.integers(0, 7)),
        st.builds(cut, places),
        st.builds(become, st.sampled_from([b"", b"\xff\xfe\x00", b"a: [\n", *JSON])),
        st.builds(insert, places, st.sampled_from([b"\n{\n", b"\xff\xff\n", b"\x00" * 64, b'{"step": {}}\n'])),
        st.sampled_from([Path.unlink, directory, link, pipe]),
    )


def files_of(run_dir: Path, seed: int) -> Path:
    """One of a run's files."""
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    return files[seed % len(files)]


def follows(runs: Runs) -> None:
    follow(runs.run_dir, None, 0, 1, QUIET, 0.01)


@settings(max_examples=24)
@given(which=st.integers(0, 10**6), damage=damages())
def test_a_damaged_run_goes_on_or_says_what_is_wrong(runs, which, damage):
    file = files_of(runs.take("unfinished"), which)
    damage(file)
    said = outcome(runs.goes_on)
    if said is not None:
        assert str(runs.run_dir) in said


@settings(max_examples=24)
@given(which=st.integers(0, 10**6), damage=damages(), state=st.sampled_from(["unfinished", "finished"]))
def test_whoever_only_looks_says_what_is_wrong(runs, which, damage, state):
    run_dir = runs.take(state)
    damage(files_of(run_dir, which))
    outcome(lambda: write_report(run_dir))
    outcome(lambda: run.reselect(runs.tree))
    outcome(lambda: Store(run_dir).check(load_config(runs.tree), "distill"))
    if state == "finished":
        outcome(lambda: npd.distill(runs.tree))
        outcome(lambda: follows(runs))


FACTS = ["config.yaml", "generations/CURRENT", "generations/g000/manifest.json", "student/npd.json"]


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("content", [*JSON[:7], b"", b"\xff"])
def test_facts_of_another_type_are_named(runs, name, content):
    """All of them, without a run: what reads them is called by itself."""
    run_dir = runs.take("finished")
    (run_dir / name).write_bytes(content)
    store = Store(run_dir)
    reads: dict[str, Callable[[], object]] = {
        "config.yaml": lambda: store.check(load_config(runs.tree), "distill"),
        "generations/CURRENT": lambda: store.current,
        "generations/g000/manifest.json": lambda: store.manifest(0),
        "student/npd.json": lambda: store.check_model(store.student),
    }
    said = outcome(reads[name])
    assert said is not None
    assert str(run_dir / Path(name).parent) in said
    assert "damaged" in said


def test_a_pointer_is_mended_and_that_is_said(runs, capsys):
    for name in ("policy/LATEST", "checkpoints/LATEST"):
        runs.take("unfinished")
        good = (runs.run_dir / name).read_text()
        (runs.run_dir / name).write_bytes(b"\xff\xfe")
        npd.distill(runs.tree, display=Display())
        if name.startswith("checkpoints"):
            assert "LATEST was damaged; it names step-000002 again" in capsys.readouterr().out.replace("\n", " ")
        assert (runs.run_dir / name).read_text() >= good


@pytest.mark.parametrize("key", ["generation", "step", "parts", "share"])
@pytest.mark.parametrize("value", [-1, 99, "x", None, {}])
def test_a_checkpoint_of_an_older_version_stands_somewhere(runs, key, value):
    """Its npd.json has no checksum of its own."""
    if value == 99 and key != "generation":
        pytest.skip("a place that may be")
    if key == "share" and value == -1:
        pytest.skip("a number")
    runs.take("unfinished")
    file = runs.run_dir / "checkpoints/step-000002/npd.json"
    tree = json.loads(file.read_text())
    del tree["seal"]
    file.write_text(json.dumps(tree))
    assert Store(runs.run_dir).resumed_generation() == tree["generation"]
    file.write_text(json.dumps(tree | {key: value}))
    said = outcome(lambda: npd.distill(runs.tree))
    assert said is not None
    assert "step-000002 is damaged" in said
    assert "Delete it" in said


def test_a_changed_fact_of_a_checkpoint_is_noticed(runs):
    runs.take("unfinished")
    file = runs.run_dir / "checkpoints/step-000002/npd.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 1'))
    assert "its checksum is another one" in (outcome(lambda: npd.distill(runs.tree)) or "")
    shutil.rmtree(file.parent)
    runs.goes_on()


def test_a_damaged_student_is_made_again(runs):
    run_dir = runs.take("finished")
    (run_dir / "student/npd.json").write_text("[]")
    said = outcome(lambda: npd.distill(runs.tree))
    assert said is not None
    assert "Delete that directory and run the same command again" in said
    shutil.rmtree(run_dir / "student")
    runs.goes_on()


def test_the_version_that_made_a_run_is_named(runs):
    run_dir = runs.take("unfinished")
    file = run_dir / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace(f"npd: {npd.__version__}", "npd: 9.9.9").replace("seed: 0", "seed: 0\nnovelty: 3"))
    assert "made by npd 9.9.9" in (outcome(lambda: npd.distill(runs.tree)) or "")
    assert "written by npd 9.9.9" in (outcome(lambda: load_config(file)) or "")
    file.write_text(text[: text.index("provenance")] + "provenance: null\n")
    assert "does not say which command" in (outcome(lambda: npd.distill(runs.tree)) or "")


# -- names


@given(st.text(max_size=14), st.sampled_from(KINDS), st.integers(0, 10**9 - 1))
def test_a_name_stands_for_a_number_or_for_none(text, kind, number):
    assert kind.number(kind.name(number)) == number
    for name in (text, kind.prefix + text + kind.suffix, kind.name(number) + text, text + kind.name(number)):
        found = kind.number(name)
        assert found is None or kind.name(found) == name


STRANGE = [
    *("checkpoints/step-000004.bak/x", "checkpoints/step-0000²/x", "policy/v000000-copy/x", "policy/v00000９/x"),
    *("generations/g000.old/part-00000.parquet", "generations/g00x/x", "generations/g000/part-00000.bak.parquet"),
    *("generations/g000/part-1.parquet", "generations/g000/.part-00000.parquet.swp", "generations/.nfs0000001", ".DS_Store"),
    *("logs/refresh-x.log", "logs/notes.txt", "events.jsonl~", "policy/.DS_Store", "student/.nfs01"),
    *("checkpoints/step-99999999999999999999/x", ".x.tmp", ".a.b.tmp", ".a.b.\u0661.tmp"),
]


def test_strange_names_are_left_alone(runs):
    run_dir = runs.take("unfinished")
    for name in STRANGE:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("mine")
    shutil.rmtree(run_dir / "student")  # where the new one is put as a whole
    runs.goes_on()
    write_report(run_dir)
    assert [name for name in STRANGE if not name.startswith("student") and not (run_dir / name).exists()] == []


# -- links


PLACES = [
    *("student", "policy", "generations", "checkpoints", "cache", "logs", "trackers", "policy/v000000", "generations/g000"),
    *("checkpoints/step-000002", ".lock", "events.jsonl", "metrics.jsonl", "config.yaml", "prompts.arrow", "policy/LATEST"),
    *("generations/CURRENT", "generations/g000/part-00000.parquet", "generations/g000/manifest.json", "logs/refresh-0.log"),
]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("what", ["link", "dangling", "other"])
def test_nothing_is_written_through_a_link_or_over_a_strange_thing(runs, tmp_path, name, what):
    run_dir = runs.take("unfinished")
    place, outside = run_dir / name, tmp_path / "outside"
    directory = place.is_dir() or ("." not in place.name and place.name.islower())
    if place.exists():
        shutil.move(place, outside)
    elif what == "link":
        outside.mkdir() if directory else outside.write_text("theirs")
    place.parent.mkdir(exist_ok=True)
    if what == "other":
        place.write_text("") if directory else place.mkdir()
    else:
        place.symlink_to(outside if what == "link" else tmp_path / "nowhere")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, outside, *outside.rglob("*")] if path.exists()}
    said = outcome(lambda: npd.distill(runs.tree))
    assert said is not None
    assert str(place) in said
    assert ("symbolic link" in said) == (what != "other")
    assert outcome(lambda: follows(runs)) is not None
    assert outcome(lambda: run.reselect(runs.tree)) is not None
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (tmp_path / "nowhere").exists()


def test_a_run_directory_may_be_a_link(runs, tmp_path):
    shutil.move(runs.take("unfinished"), tmp_path / "elsewhere")
    runs.run_dir.symlink_to(tmp_path / "elsewhere")
    try:
        runs.goes_on()
    finally:
        runs.run_dir.unlink()


# -- disks


SAID = [
    (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), UNSAID),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), UNSAID),
    (RuntimeError("basic_ios::clear: iostream error"), UNSAID),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    (pa.ArrowException("IOError: [Errno 27] Error writing bytes to file. Detail: File too large"), errno.EFBIG),
    (RuntimeError("Read-only file system (os error 30)"), errno.EROFS),
    (ValueError("a text of No space left on device"), None),
    (FileNotFoundError(errno.ENOENT, "No such file"), None),
    (RuntimeError("a bug"), None),
]


@pytest.mark.parametrize(("error", "number"), SAID)
def test_an_error_of_a_disk_is_known_in_whatever_words(tmp_path, error, number):
    assert disk_error(error) == number
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert disk_error(wrapped) == number
    explained = explanation(wrapped, tmp_path / "model.safetensors")
    assert (explained is None) == (number is None)
    if explained is not None:
        assert "model.safetensors could not be written" in one_paragraph(explained)
        assert "run the same command again" in explained.remedy


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1500, 9000, 20000, 30000])
def test_files_that_may_not_grow(runs, size):
    """From config.yaml to the checkpoints, whichever library writes; nothing half-written stays."""
    shutil.rmtree(runs.run_dir, ignore_errors=True)
    with files_no_larger_than(size):
        said = outcome(lambda: npd.distill(runs.tree))
    assert said is not None
    assert "could not be written" in said
    assert not list(runs.run_dir.rglob(".*.tmp"))
    runs.goes_on()


def test_a_run_directory_that_goes_away_is_missed_and_not_made_anew(runs, monkeypatch):
    runs.take("unfinished")
    real = Trainer.step

    def step(trainer: Trainer, *args: Any) -> Any:
        shutil.rmtree(runs.run_dir, ignore_errors=True)
        return real(trainer, *args)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(npd.RunError, match="was removed or renamed while the run went on"):
        npd.distill(runs.tree)
    assert not runs.run_dir.exists()


def test_a_finished_run_that_cannot_be_written_says_that_it_is_finished(runs, monkeypatch, capsys):
    run_dir = runs.take("finished")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **_: False if Path(path) == run_dir else real(path, mode))
    result = npd.distill(runs.tree, display=Display())
    assert (result.student / "model.safetensors").read_bytes() == runs.weights
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_saved_may_be_read_as_the_umask_has_it(runs, tmp_path, mask):
    config = load_config(runs.tree)
    before = os.umask(mask)
    try:
        model, tokenizer = load_model(config.student), load_tokenizer(config.student)
        Store(tmp_path).save_model(tmp_path / "model", lambda path: save_student(model, tokenizer, path), {})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


# -- signals


STARTING = """import sys, time, importlib.abc
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "click":
            print("here", flush=True)
            time.sleep(10**6)
sys.meta_path.insert(0, Slow())
from npd.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_is_imported_is_one_line(number):
    command = [sys.executable, "-c", STARTING, "distill", "x.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.startswith("npd: stopped")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_first_signal_ends_in_order_and_the_second_at_once(number, error):
    end_in_order()
    with pytest.raises(error):
        os.kill(os.getpid(), number)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
