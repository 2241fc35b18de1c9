from __future__ import annotations

import base64
import errno
import gzip
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from conftest import HANG
from fake_run import HOSTILE, make_run

import npd
from npd.cli import main
from npd.errors import RunError, UserError
from npd.intervals import wilson_interval
from npd.observe.display import Display
from npd.observe.events import Events, SpanName, read_events, seconds_by_role
from npd.records import EngineCheck, EvaluationLine, Failure, TeacherLine
from npd.report import keeper
from npd.report.facts import gather, ranges, tail
from npd.report.figures import label
from npd.report.page import comparison_page, render, run_page, write_comparison, write_report
from npd.report.pictures import delta_overlay, lengths
from npd.report.samples import Browser, IdsOnly, find_decoder
from npd.report.tables import duration, generation_table, tiles
from npd.store import Store


class Text(HTMLParser):
    """What a page says, and the tags it says it with."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._inside or self._inside[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def island_of(page: str) -> dict[str, Any]:
    packed = re.search(r'id="island-data">([^<]*)<', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def read(path: Path) -> tuple[Text, dict[str, Any]]:
    page = path.read_text(encoding="utf-8")
    return Text(page), island_of(page)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    files = sorted(run_dir.glob("generations/g*/part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("fake") / "run", schedule={"kl_budget": 0.03})
    store = Store(path)
    for step, right in ((0, 30), (30, 60)):
        low, high = wilson_interval(right / 100, 100)
        accuracy = {"eval/sums/accuracy": right / 100, "eval/sums/accuracy_low": low, "eval/sums/accuracy_high": high}
        store.append_metrics(EvaluationLine(step, accuracy | {"eval/kl_to_teacher": 0.5 - step / 100}))
    store.append_metrics(TeacherLine(0, {"teacher/sums/accuracy": 0.9}))
    write_report(path)
    return path


def test_numbers_are_those_of_the_files(fake):
    text, data = read(fake / "report.html")
    rows = rows_of(fake)
    verdicts = [row["verdict"] for row in rows]
    for verdict in ("proximal", "degenerate", "disconnect"):
        n = verdicts.count(verdict)
        assert f"{verdict} {n} ({100 * n / len(rows):.1f}%)" in text.said
        tokens = sum(len(row["response_ids"]) for row in rows if row["verdict"] == verdict)
        total = sum(len(row["response_ids"]) for row in rows)
        assert f"{verdict} {tokens} ({100 * tokens / total:.1f}%)" in text.said
    kept = verdicts.count("proximal") / len(rows)
    assert f"Kept responses {100 * kept:.1f}%" in text.said
    deltas = [row["delta_ifd"] for row in rows]
    # Every bar of the histogram, counted anew.
    for trace in data["figures"]["delta"]["traces"]:
        for centre, count in zip(trace["x"], trace["y"], strict=True):
            low, high = centre - trace["width"] / 2, centre + trace["width"] / 2
            edge = 1e-4 * trace["width"]  # drawn to five digits
            sure = [d for d, v in zip(deltas, verdicts, strict=True) if v == trace["name"] and low + edge < d < high - edge]
            near = [d for d, v in zip(deltas, verdicts, strict=True) if v == trace["name"] and low - edge <= d <= high + edge]
            assert len(sure) <= count <= len(near)
    points = sum(len(trace["x"]) for trace in data["figures"]["scatter"]["traces"])
    assert points == len(rows)
    lengths = data["figures"]["lengths"]["traces"]
    assert sum(sum(trace["y"]) for trace in lengths) == len(rows)
    assert f"Cut off: {sum(row['finish_reason'] == 'length' for row in rows)}" in text.said
    middle = statistics.median(len(row["response_ids"]) for row in rows if row["sample_id"].startswith("g000"))
    assert f"g0 40 {100 * verdicts[:40].count('proximal') / 40:.1f}%" in text.said
    assert f" {middle:g} " in text.said


def test_curves_are_the_metrics(fake):
    _, data = read(fake / "report.html")
    lines = [json.loads(line) for line in (fake / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    traces = {trace["name"]: trace for trace in data["figures"]["loss"]["traces"]}
    for name, key in (("loss", "loss"), ("CE", "ce"), ("KD", "kd")):
        assert traces[name]["x"] == [line["step"] for line in steps]
        assert traces[name]["y"] == pytest.approx([line[key] for line in steps], rel=1e-4)
    shapes = data["figures"]["near-policy"]["layout"]["shapes"]
    assert 0.03 in [shape["y0"] for shape in shapes]  # the budget
    border = next(line["step"] for line in steps if line["generation"] == 1)
    assert border - 0.5 in [shape.get("x0") for shape in shapes]


def test_headline_and_ceiling(fake):
    text, _ = read(fake / "report.html")
    low, high = wilson_interval(0.6, 100)
    assert "sums accuracy 30.0% → 60.0%" in text.said
    assert f"after 60.0% [{100 * low:.1f}, {100 * high:.1f}]; teacher 90.0%" in text.said
    assert "KL to the teacher 0.5 → 0.2" in text.said
    # 100 s of wall-clock, of which 80 trained and 20 waited; 3,000 tokens.
    assert "Speed 30 tokens/s" in text.said
    assert "train 80.0 s (80.0%)" in text.said
    assert "wait 20.0 s (20.0%)" in text.said


def test_the_page_asks_nothing_of_the_network(fake):
    page = (fake / "report.html").read_text(encoding="utf-8")
    text = Text(page)
    policy = next(a["content"] for tag, a in text.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    for tag, attributes in text.tags:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]}>"
    nonces = {a.get("nonce") for tag, a in text.tags if tag == "script" and a.get("type") is None}
    assert len(nonces) == 1
    assert f"'nonce-{nonces.pop()}'" in policy
    ids = [a["id"] for _, a in text.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_plot_has_words(fake):
    text, data = read(fake / "report.html")
    plots = {a["data-figure"]: a for tag, a in text.tags if "data-figure" in a}
    assert plots.keys() == data["figures"].keys()
    assert {
        "loss",
        "near-policy",
        "lr",
        "fill",
        "delta",
        "scatter",
        "by-generation",
        "by-source",
        "lengths",
        "timeline",
    } <= plots.keys()
    for attributes in plots.values():
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20


def test_hostile_text_is_text(tmp_path):
    path = make_run(tmp_path / "run", words=HOSTILE, sources=tuple(HOSTILE[:4]))
    (path / "logs").mkdir()
    (path / "logs/refresh-0.log").write_bytes(b"\x1b[31m</pre><script>1</script>\xff\xfe\n")
    Events(path / "events.jsonl").write("<script>", 1.0, 2.0, note="</script>")  # type: ignore[arg-type]
    text, data = read(write_report(path))
    clean, _ = read(write_report(make_run(tmp_path / "clean")))
    kinds = {tag for tag, _ in text.tags}
    assert kinds == {tag for tag, _ in clean.tags}
    assert sum(tag == "script" for tag, _ in text.tags) == sum(tag == "script" for tag, _ in clean.tags) == 3
    assert not [a for _, a in text.tags if any(name.startswith("on") for name in a)]
    for source in HOSTILE[:4]:
        assert source in text.said
    words = {piece for sample in data["samples"] for piece in sample["pieces"]}
    assert {w.strip() for w in words} == {w.strip() for w in HOSTILE}


def test_unfinished_damaged_and_removed_are_said(tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    (path / "generations/g001/manifest.json").unlink()
    part = path / "generations/g001/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:200])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    with (path / "events.jsonl").open("a") as file:
        file.write('["not a span"]\n{"name": "x"}\n{"na')
    text, _ = read(write_report(path))
    assert "part-00001.parquet is damaged and left out" in text.said
    assert "Generations 1 have no manifest yet" in text.said
    assert "Responses, 60" in text.said
    for file in path.glob("generations/*/part-*"):
        file.unlink()
    text, data = read(write_report(path))
    assert "The responses of generations 0 were removed by checkpoint.keep" in text.said
    assert "Responses, 40" in text.said  # by the manifest
    assert "browser" not in [a.get("id") for _, a in text.tags]
    assert data["samples"] == []


def test_a_run_that_has_just_begun(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("run_dir: x\nprovenance: {command: distill}\n")
    text, data = read(write_report(run_dir))
    assert "There are no responses yet." in text.said
    assert "no optimiser step yet" in text.said
    assert data["figures"] == {}
    (run_dir / "config.yaml").write_text("{{{ not yaml")
    assert "config.yaml cannot be read" in read(write_report(run_dir))[0].said
    with pytest.raises(UserError, match="holds no run of npd"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        write_report(tmp_path / "nothing")


def test_samples_are_left_out_of_a_page_that_would_be_too_large(fake, tmp_path, monkeypatch):
    small = make_run(tmp_path / "run")
    whole = len(island_of(write_report(small).read_text())["samples"])
    size = (small / "report.html").stat().st_size
    monkeypatch.setattr("npd.report.page.MOST_BYTES", size - 1000)
    assert len(island_of(write_report(small).read_text())["samples"]) < whole


# -- how runs end


def fail_at(step: int, error: BaseException, monkeypatch) -> None:
    import npd.train.trainer

    real = npd.train.trainer.Trainer.step

    def broken(self, *args: Any) -> Any:
        if args[3] == step:
            raise error
        return real(self, *args)

    monkeypatch.setattr(npd.train.trainer.Trainer, "step", broken)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZeroDivisionError("by <b>zero</b>"), "npd has no explanation of its own"),
        (RunError("The disk is full; free some space."), "the message says how to mend it"),
        (KeyboardInterrupt(), "was stopped by hand"),
    ],
)
def test_a_run_that_failed_has_a_report_too(make_tree, monkeypatch, error, says, capsys):
    tree = make_tree(tracking={"report": True})
    fail_at(5, error, monkeypatch)
    with pytest.raises(type(error)):
        npd.distill(tree, display=Display())
    run_dir = Path(tree["run_dir"])
    failed = [e for e in read_events(run_dir / "events.jsonl") if e.name == "failed"]
    assert len(failed) == 1
    assert failed[0].facts["error"] == type(error).__name__
    assert failed[0].process == os.getpid()
    text, data = read(run_dir / "report.html")
    assert says in text.said
    assert "after step 4" in text.said
    assert str(error) in text.said
    assert "It goes on from step 3" in text.said
    assert f"npd distill {run_dir}" in text.said
    assert data["samples"]
    assert ("ZeroDivisionError" in text.said and "in broken" in text.said) == isinstance(error, ZeroDivisionError)
    monkeypatch.undo()
    npd.distill(tree)  # goes on, and the report then is that of a finished run
    assert gather(run_dir).status.kind == "finished"
    assert "What went wrong" not in read(run_dir / "report.html")[0].said


@pytest.mark.slow
def test_a_run_that_was_killed_is_known_by_its_silence(make_tree, tmp_path):
    tree = make_tree()  # without a report: one that is begun before the kill would be written after it
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    script = (
        "import sys, time, npd, npd.train.trainer\n"
        "real = npd.train.trainer.Trainer.step\n"
        "def slow(self, *a):\n"
        "    if a[3] == 4:\n"
        "        print('here', flush=True); time.sleep(10**6)\n"
        "    return real(self, *a)\n"
        "npd.train.trainer.Trainer.step = slow\n"
        "npd.distill(sys.argv[1])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(config)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    run_dir = Path(tree["run_dir"])
    assert gather(run_dir).status.kind == "running"
    assert "The run goes on" in read(write_report(run_dir))[0].said
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gather(run_dir).status.kind == "stopped"
    assert "stopped without a word" in read(write_report(run_dir))[0].said


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_has_it_on_record(make_tree, tmp_path):
    tree = make_tree(tracking={"report": True})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    script = (
        "import sys, time, npd.cli, npd.train.trainer\n"
        "def slow(self, *a):\n"
        "    print('here', flush=True); time.sleep(10**6)\n"
        "npd.train.trainer.Trainer.step = slow\n"
        "npd.cli.entry()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, "distill", str(config)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert any(b"here" in line for line in process.stdout)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert "The run was stopped by a signal" in read(Path(tree["run_dir"]) / "report.html")[0].said
    assert gather(tree["run_dir"]).status.kind == "failed"


def test_a_run_that_failed_is_not_mended_by_a_refresh(make_tree, monkeypatch):
    tree = make_tree(schedule={"generations": 2, "passes": 2, "lead": 0.0})
    fail_at(2, ZeroDivisionError("x"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        npd.distill(tree)
    run_dir = Path(tree["run_dir"])
    for part in run_dir.glob("generations/g000/part*"):
        part.unlink()
    npd.refresh(tree)
    status = gather(run_dir).status
    assert status.kind == "failed"
    assert status.failure is not None
    assert status.failure.error == "ZeroDivisionError"


def test_a_refresh_that_ended_leaves_a_run_as_it_was(tmp_path):
    """Marks alone: failed or killed and then refreshed; refreshed before any training."""
    for before, kind in (("failed", "failed"), ("", "stopped"), ("never", "between")):
        path = make_run(tmp_path / (before or "killed"), finished=False)
        events = Events(path / "events.jsonl")
        if before == "never":
            events.path.write_text("")
        elif before:
            events.write(SpanName(before), 1100.0, 1100.0, command="distill")
        events.write(SpanName.STARTED, 1200.0, 1200.0, command="refresh")
        events.write(SpanName.ENDED, 1300.0, 1300.0, command="refresh")
        assert gather(path).status.kind == kind


def test_a_refresh_that_failed_is_blamed_and_not_the_trainer(tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    refresh, trainer = Events(path / "events.jsonl", "refresh-1"), Events(path / "events.jsonl")
    error = UserError("The part is damaged.")
    refresh.write(SpanName.FAILED, 1099.0, 1099.0, process=776, **Failure.of(ValueError("one before")).to_json())
    refresh.write(SpanName.FAILED, 1100.0, 1100.0, process=777, **Failure.of(error).to_json())
    error.role = "refresh-1"
    trainer.write(SpanName.FAILED, 1101.0, 1101.0, **Failure.of(error).to_json())
    said = read(write_report(path))[0].said
    assert "Process 777, the refresh-1, after step 30." in said
    assert "The message (UserError)" in said
    trainer.write(SpanName.STARTED, 1200.0, 1200.0)
    trainer.write(SpanName.FAILED, 1201.0, 1201.0, **Failure.of(error).to_json())  # which no mark of the refresh's bears out
    assert f"Process {os.getpid()}, the trainer" in read(write_report(path))[0].said


@pytest.mark.parametrize("going_on", [True, False])
def test_a_span_that_has_not_ended_counts(tmp_path, monkeypatch, going_on):
    """3,000 tokens of 30 steps at 1,015.4 tokens/s; the last whole span ended at 1100, the last step was logged at 1400."""
    path = make_run(tmp_path / "run", finished=False)
    events = Events(path / "events.jsonl")
    events.write(SpanName.CHECKPOINT, 1150.0, 1160.0)
    os.utime(path / "metrics.jsonl", (1400.0, 1400.0))
    monkeypatch.setattr("npd.report.facts.time.time", lambda: 1500.0)
    facts = gather(path, going_on)
    wall = 500.0 if going_on else 400.0
    shown = {tile.title: tile for tile in tiles(facts)}
    assert shown["Speed"].value == f"{3000 / wall:,.0f} tokens/s"
    assert shown["Speed"].detail.endswith("; 1,015 while training")
    assert shown["Wall-clock"].value == duration(wall)
    text, _ = read(write_report(path, going_on=going_on))
    assert f"train 370.0 s ({370 / wall:.1%})" in text.said  # 80 before, and 300 but for the checkpoint
    assert ("under way 100.0 s" in text.said) == going_on


def test_a_report_is_written_while_the_run_goes_on(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run", finished=False)
    monkeypatch.setattr(keeper, "FIRST", 0.05)
    pages = keeper.Pages(path)
    deadline = time.monotonic() + HANG
    while not (path / "report.html").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pages.stop()
    assert "w0" in json.dumps(island_of((path / "report.html").read_text())["samples"])
    assert pages.process is not None
    assert pages.process.poll() is not None


def test_a_writer_that_starts_while_pages_stop_is_given_up(tmp_path, monkeypatch):
    """Started after `stop` has looked for it; what it had begun to write goes too."""
    real, begun, late = subprocess.Popen, threading.Event(), threading.Event()

    def popen(*_: Any, **__: Any) -> Any:
        begun.set()
        late.wait()
        process = real(["sleep", str(2 * HANG)])
        (tmp_path / f".report.html.host.{process.pid}.tmp").write_text("half")
        return process

    monkeypatch.setattr(keeper.subprocess, "Popen", popen)
    monkeypatch.setattr(keeper, "FIRST", 0.0)
    pages = keeper.Pages(tmp_path)
    begun.wait()
    threading.Timer(0.3, late.set).start()
    began = time.monotonic()
    pages.stop()
    assert time.monotonic() - began < HANG
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    path = make_run(tmp_path / "run", finished=False)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("npd.report.output.write_text", broken)
    with keeper.observed(Events(path / "events.jsonl"), Display(), report=True):
        pass
    said = capsys.readouterr().out.replace("\n", " ")
    assert "cannot be written (no space)" in said
    assert "Nothing else is lost." in said
    assert [e.name for e in read_events(path / "events.jsonl")][-1] == "ended"


# -- comparison, trace, command


@pytest.mark.parametrize("option", ["--out", "--trace", "--compare"])
def test_a_directory_is_never_replaced_by_a_file(fake, tmp_path, option):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/precious").write_text("years")
    to = ["--compare", str(fake), "--out"] if option == "--compare" else [option]
    result = CliRunner().invoke(main, ["report", str(fake), *to, str(tmp_path / "work")])
    assert isinstance(result.exception, UserError)
    assert "is a directory" in str(result.exception)
    assert (tmp_path / "work/precious").read_text() == "years"


@pytest.mark.parametrize("option", ["--out", "--trace"])
def test_what_cannot_be_written_is_said(fake, tmp_path, option):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["report", str(fake), option, str(tmp_path / "file/page")])
    assert isinstance(result.exception, UserError)
    assert f"cannot be written (Not a directory); name a file elsewhere with {option} FILE" in str(result.exception)


def test_a_run_directory_that_is_read_only_is_said(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("npd.store.files.put", denied)  # root may write anywhere
    with pytest.raises(UserError, match=r"report.html cannot be written \(Permission denied\)"):
        write_report(path)


def test_a_comparison_says_what_differs(fake, tmp_path):
    other = make_run(tmp_path / "run", steps=20, loss={"kd_weight": 0.5}, selection={"upper": 0.4})
    text, data = read(write_comparison([fake, other], tmp_path / "out/compare.html"))
    assert "loss.kd_weight 0.9 0.5" in text.said
    assert "selection.upper 0.8 0.4" in text.said
    assert "packing.length" not in text.said
    names = {trace["name"] for trace in data["figures"]["loss"]["traces"]}
    assert names == {f"{fake.parent.name}/run", f"{tmp_path.name}/run"}  # both are called run
    assert {"delta-0", "delta-1", "scatter-0", "scatter-1", "timeline-0", "timeline-1"} <= data["figures"].keys()
    kept = [sum(row["verdict"] == "proximal" for row in rows_of(path)) for path in (fake, other)]
    for n in kept:
        low, high = wilson_interval(n / 80, 80)
        assert f"{100 * n / 80:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" in text.said
    overlay = data["figures"]["delta-overlay"]["traces"]
    assert [math.fsum(trace["y"]) for trace in overlay] == pytest.approx([1, 1], abs=0.03)


def test_the_command(fake, tmp_path):
    run = CliRunner().invoke
    out = tmp_path / "page.html"
    result = run(main, ["report", str(fake), "--out", str(out)])
    assert result.exit_code == 0
    assert out.exists()
    trace = tmp_path / "trace.json"
    assert "10 spans" in run(main, ["report", str(fake), "--trace", str(trace)]).output
    assert len(json.loads(trace.read_text())["traceEvents"]) > 10
    for arguments, why in (
        ([str(fake), str(fake)], "add --compare"),
        (["--compare", str(fake)], "needs two run directories"),
        (["--compare", str(fake), str(fake), "--trace", "x"], "give one of them"),
        ([str(tmp_path)], "holds no run of npd"),
        (["--compare", str(fake), str(fake), "--out", str(tmp_path)], "name a file"),
    ):
        result = run(main, ["report", *arguments])
        assert isinstance(result.exception, UserError)
        assert why in str(result.exception)
    assert "--compare" in run(main, ["report", "--help"]).output
    assert "report" in run(main, ["--help"]).output


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / name) for name in ("a/x/run", "b/x/run", "b/y/run")]
    runs = [gather(path) for path in [*paths, paths[2]]]
    assert [label(runs, i) for i in range(4)] == ["a/x/run", "b/x/run", "run (3)", "run (4)"]
    assert label(runs[:1], 0) == "run"


def test_a_page_is_measured_in_bytes(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")
    (path / "logs").mkdir()
    (path / "logs/refresh-0.log").write_text("€" * 20_000)
    size = write_report(path).stat().st_size
    monkeypatch.setattr("npd.report.page.MOST_BYTES", size - 20_000)
    assert len(island_of(write_report(path).read_text())["samples"]) < 80


def test_the_command_to_go_on_can_be_pasted(tmp_path):
    path = make_run(tmp_path / "my run", finished=False)
    assert f"npd distill '{path}'" in read(write_report(path))[0].said


def test_the_tokens_of_parts_that_were_not_read_are_told(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")
    total = sum(len(row["response_ids"]) for row in rows_of(path))
    assert f"Response tokens on disk, {total}" in read(write_report(path))[0].said
    monkeypatch.setattr("npd.report.facts.MOST_TOKENS", total // 2)
    assert f"Response tokens of the parts that were read, out of {total} on disk" in read(write_report(path))[0].said


def test_every_verdict_of_a_generation_that_is_shown_has_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr("npd.report.tables.middle_left_out", lambda numbers: [numbers[0], None, numbers[-1]])
    monkeypatch.setattr("npd.report.tables.MOST_ROWS", 2)
    facts = gather(make_run(tmp_path / "run", generations=3))
    facts.manifests[2].selection.verdicts["undefined"] = 7
    table = generation_table(facts, Browser())
    assert table is not None
    assert table.rows[-1][table.columns.index("undefined")] == "7"


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert ranges([]) == ""


def test_tail_gives_whole_lines_newest_first(tmp_path):
    path = tmp_path / "lines"
    assert list(tail(path)) == []
    path.write_text("".join(f"line {i}\n" for i in range(100)) + "torn")
    assert list(tail(path)) == [f"line {i}" for i in range(99, -1, -1)]
    short = list(tail(path, 50))
    assert short == [f"line {i}" for i in range(99, 99 - len(short), -1)]
    assert len(short) == 5


def test_checks_of_the_engine_are_shown(tmp_path):
    path = make_run(tmp_path / "run")
    facts = EngineCheck(4, 250, -0.00123, 0.0456).to_json()
    Events(path / "events.jsonl", "refresh-0").write(SpanName.ENGINE, 1015.0, 1015.0, generation=1, **facts)
    assert "1 4 250 -0.00123 0.0456" in read(write_report(path))[0].said
    assert "Checks of the engine" not in read(write_report(make_run(tmp_path / "other")))[0].said


@pytest.mark.parametrize(
    ("lower", "upper", "drawn"),
    [(0.0, 0.8, [0.0, 0.8]), (-math.inf, math.inf, []), (0.0, math.inf, [0.0]), (-100.0, 100.0, []), (-100.0, 0.5, [0.5])],
)
def test_a_band_without_borders_is_drawn_too(tmp_path, lower, upper, drawn):
    limits = {"selection": {"lower": lower, "upper": upper}, "schedule": {"kl_budget": math.inf}}
    path = make_run(tmp_path / "run", **limits)
    text, data = read(write_report(path))
    figure = data["figures"]["delta"]
    shapes = figure["layout"]["shapes"]
    assert [s["x0"] for s in shapes if s["type"] == "line"] == drawn
    rows = rows_of(path)
    assert sum(count > 0 for trace in figure["traces"] for count in trace["y"]) > 30  # not all in a few bars
    low, high = min(r["delta_ifd"] for r in rows), max(r["delta_ifd"] for r in rows)
    shaded = [s for s in shapes if s["type"] == "rect"]
    assert min(s["x0"] for s in shaded) >= low - 2
    assert max(s["x1"] for s in shaded) <= high + 2
    assert len(shaded) == 1 + sum(math.isfinite(b) and abs(b) < 100 for b in (lower, upper))
    assert text.said.count("lies beyond what is drawn") == 2 - len(drawn)
    assert "no budget set" in text.said
    read(write_comparison([path, path], tmp_path / "compare.html"))


def lines_drawn(run_dir: Path) -> list[float]:
    shapes = read(write_report(run_dir))[1]["figures"]["delta"]["layout"]["shapes"]
    return [shape["x0"] for shape in shapes if shape["type"] == "line"]


def test_the_band_is_the_one_that_manifests_have(tmp_path):
    """The widest of them; of a rule that gives none, there is none, whatever limits are configured."""
    path = make_run(tmp_path / "run", selection={"rule": "none"})
    assert lines_drawn(path) == []
    store = Store(path)
    for generation, bounds in ((0, (-0.25, 0.5)), (1, (-0.125, 0.75))):
        manifest = store.manifest(generation)
        assert manifest is not None
        store.finish_generation(replace(manifest, selection=replace(manifest.selection, bounds=bounds)))
    assert lines_drawn(path) == [-0.25, 0.75]
    assert "Kept from -0.25 to 0.75" in json.dumps(write_report(path).read_text())


def test_a_verdict_that_somebody_elses_rule_gives_is_shown(tmp_path):
    path = make_run(tmp_path / "run")
    store, name = Store(path), "too <short>"
    for generation in (0, 1):
        (store.generation(generation) / "manifest.json").unlink()
    table = store.read_part(1, 0)
    verdicts = [name] * 7 + table["verdict"].to_pylist()[7:]
    store.write_part(1, 0, table.set_column(table.column_names.index("verdict"), "verdict", pa.array(verdicts)))
    text, data = read(write_report(path))
    assert f"{name} 7 ({7 / 80:.1%})" in text.said
    assert f"disconnect {name} Δ at 5 / 50 / 95%" in text.said
    shown = {trace["name"]: sum(trace["y"]) for trace in data["figures"]["delta"]["traces"]}
    assert shown["too &lt;short&gt;"] == 7
    assert sum(len(trace["x"]) for trace in data["figures"]["scatter"]["traces"]) == 80


def test_lengths_show_the_longest_and_an_overlay_says_what_it_leaves_out(tmp_path):
    facts = gather(make_run(tmp_path / "run"))
    tokens, finish, delta = np.full(5000, 20), np.full(5000, "stop", object), np.random.default_rng(0).normal(0.4, 0.1, 5000)
    tokens[:2], finish[:2], delta[:2], tokens[2] = 1024, "length", 50.0, 1
    facts._arrays |= {"tokens": tokens, "finish_reason": finish, "delta_ifd": delta, "verdict": np.full(5000, "proximal")}
    figure = lengths(facts)
    assert figure is not None
    assert {trace["name"]: sum(trace["y"]) for trace in figure.traces} == {"stopped": 4998, "cut off by max_new_tokens": 2}
    overlay = delta_overlay([facts, facts])
    assert overlay is not None
    beyond = int(re.search(r"and (\d+) to the right", overlay.note)[1])  # type: ignore[index]
    assert beyond >= 4


def test_a_generations_label_stands_at_its_border(fake):
    _, data = read(fake / "report.html")
    for id in ("loss", "near-policy"):
        layout = data["figures"][id]["layout"]
        border = next(s["x0"] for s in layout["shapes"] if s.get("yref") == "paper")
        assert [(a["text"], a["x"], a["xanchor"]) for a in layout["annotations"]] == [("g1", border, "left")]


def test_refreshes_that_died_are_named(tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    Events(path / "events.jsonl").write(SpanName.RESTART, 1015.0, 1016.0, rank=1, code=-9)
    assert "refresh-1 died (exit status -9) and was started again" in read(write_report(path))[0].said


@pytest.mark.parametrize("seed", range(16))
def test_whatever_is_in_the_lines_there_is_a_page(tmp_path, seed):
    path = make_run(tmp_path / "run", finished=False)
    random = Random(seed)
    strange = [None, "x", math.nan, math.inf, -1, 10**30, True, [], {}, 0, 1e308, HOSTILE[0], "\ud800"]
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = []
        for text in (path / name).read_text().splitlines():
            line = json.loads(text)
            for key in list(line):
                if random.random() < 0.08:
                    line[key] = random.choice(strange)
                elif random.random() < 0.03:
                    del line[key]
            if random.random() < 0.1:
                kind, task = random.choice(["eval", "teacher"]), random.choice(HOSTILE[:2])
                figures = {f"{kind}/{task}/accuracy{end}": random.choice(strange) for end in ("", "_low", "_high")}
                line = {"step": random.choice([3, line.get("step")]), kind: True, **figures}
            if random.random() < 0.1:
                line |= {"generation_ended": "passes", "generation": 1, "passes": random.choice(strange)}
            lines += [json.dumps(line), *random.sample(['{"a', "null", "[]", "3", "{}"], int(random.random() < 0.1))]
        raw = b'{"step": 3, "loss": "\xff\xfe"}\n{"name": "\xc3", "start": 1000, "end": 1001}\n\xff\xd8\x00\n'
        (path / name).write_bytes(raw + "\n".join(lines).encode())
    facts = gather(path)
    Text(render(run_page(facts, Browser())))
    Text(render(comparison_page([facts, facts])))
    seconds_by_role(path / "events.jsonl")
    Store(path).rewind_metrics(10)
    assert all(isinstance(step.step, int) for step in facts.steps)
    assert any("left out" in line for line in facts.missing)


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    (tmp_path / "student").mkdir()
    os.mkfifo(tmp_path / "student" / "tokenizer.json")
    facts: Any = SimpleNamespace(path=tmp_path, missing=[])
    assert isinstance(find_decoder(facts), IdsOnly)
