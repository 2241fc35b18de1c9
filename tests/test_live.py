from __future__ import annotations

import io
import json
import math
import re
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run
from rich.console import Console

import npd
from npd.config import load_config
from npd.observe.display import Display, Whole
from npd.records import Progress
from npd.report.live import RunView
from npd.store import Store
from npd.train.loop import Position


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int = 80) -> Console:
    return Console(file=Terminal(), force_terminal=True, width=width, color_system=None, highlight=False)


def plain(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def view_of(path: Path, at: Position, progress: float, **options: Any) -> RunView:
    base = {"run_dir": str(path), "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    return RunView(Store(path), load_config(base | options), at, lambda: progress, lambda: 2, 2)


def shown(view: RunView, width: int = 80) -> str:
    console = terminal(width)
    console.print(view)
    return plain(console)


def test_the_view_says_what_the_files_say(tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    logs = path / "logs"
    logs.mkdir()
    (logs / "refresh-0.log").write_text("loaded\ngeneration 1, part 2/2: generate: 6/20 responses\n")
    doing = Progress("generation 1, part 2/2: generate", "generate", 20, "responses", done=7.0)
    (logs / "refresh-0.progress.json").write_text(json.dumps(doing.to_json()))
    (logs / "refresh-1.log").write_text("")
    at = Position(generation=1, passes=2, step=30, tokens=3000, kl=0.5, kl_tokens=20)
    view = view_of(path, at, 0.6, schedule={"kl_budget": 0.05})
    said = shown(view)
    assert "generation 2 of 2, pass 3 of 5, step 30" in said
    assert "60%" in said
    assert "0.0250 of 0.05" in said
    assert "g1 2/2" in said
    counts = Store(path).manifest(1).selection.verdicts  # type: ignore[union-attr]
    kept = counts["proximal"]
    assert f"{kept / 40:.1%} of g1: {kept} of 40 responses" in said
    assert f"{2 / 30:.4f}" in said  # the last step's loss
    steps = range(15, 31)
    assert f"{sum(1000 + s for s in steps) / len(steps):,.0f} tokens/s while training, 3,000 tokens" in said
    tokens = sum(len(r) for r in Store(path).read_part(1, 0)["response_ids"].to_pylist())
    assert f"scored g1 part 1/2; {tokens / 20:,.0f} tokens/s generated" in said  # its span lasted 20 s
    assert "refresh-0" in said
    assert re.search(r"refresh-1 +is starting", said)
    assert "now generate: 7/20 responses" in shown(view, 200)
    (logs / "refresh-1.progress.json").write_text(json.dumps(doing.to_json()))
    (logs / "refresh-0.progress.json").write_text('{"name": "generation 1", "sho')
    said = shown(view_of(path, at, 0.6), 200)
    assert "generation 1, part 2/2: generate: 7/20 responses" in said  # it has done nothing yet that would name the part
    assert "now generate" not in said


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    path = make_run(tmp_path / "run", finished=False)
    (path / "logs").mkdir()
    doing = Progress("generate", "x" * 300, 20, "responses")
    (path / "logs/refresh-0.progress.json").write_text(json.dumps(doing.to_json()))
    lines = shown(
        view_of(path, Position(step=30, kl=1.0, kl_tokens=9), 0.3, schedule={"kl_budget": 0.05}), width
    ).splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= width


def test_a_view_of_nothing_yet(tmp_path):
    assert "step 0" in shown(view_of(tmp_path, Position(), 0.0))


def test_messages_stand_above_the_view_and_tasks_in_it(tmp_path):
    path = make_run(tmp_path / "run", finished=False)
    console = terminal()
    display = Display(console)
    view = view_of(path, Position(), 0.1)
    with display.live(view):
        display.say("first [not markup]")
        with display.task("generation 0, part 1/2: generate", 10, "responses") as advance:
            with display.task("inside", 3, "x") as nothing:
                nothing()
            advance(4)
            assert "generate: 4/10 responses" in shown(view)
        assert "generate" not in shown(view).replace("generated", "")
        display.say("second")
    said = plain(console)
    assert said.index("first [not markup]") < said.index("second")
    assert display.view is None


def test_what_libraries_write_stands_above_the_view_in_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    console = terminal()
    display = Display(console)
    with display.live(view_of(tmp_path, Position(), 0.1)):
        for percent in (10, 55, 100):
            sys.stderr.write(f"\rconverting {percent}%")
            sys.stderr.flush()
        sys.stderr.write("\na [warning]\nunfinished")
    said = plain(console)
    assert "converting 100%" in said
    assert "converting 55%" not in said
    assert "a [warning]" in said
    assert "unfinished" in said


def test_an_error_in_the_view_leaves_what_was_shown_last(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run", finished=False)
    console = terminal()
    display = Display(console)
    view = view_of(path, Position(step=7), 0.1)
    assert "step 7" in shown(view)
    monkeypatch.setattr(view, "lines", lambda: 1 / 0)
    assert "step 7" in shown(view)
    with display.live(view):
        display.say("the run goes on")
    assert "the run goes on" in plain(console)


def test_a_task_that_ends_while_the_view_is_drawn(tmp_path):
    class Vanishing(RunView):
        looks = 0

        @property
        def task(self) -> Any:
            self.looks += 1
            return Progress("generation 0, part 1/2: generate", "generate", 10, "responses") if self.looks == 1 else None

        @task.setter
        def task(self, value: Any) -> None:
            self.looks = 0

    base = view_of(tmp_path, Position(), 0.1)
    view = Vanishing(base.store, base.config, base.at, base.progress, base.parts, 2)
    view.looks = 0
    assert "now" in dict(view.lines())


@pytest.mark.parametrize("live", [False, True])
def test_tasks_of_several_threads_at_once(tmp_path, live):
    display = Display(terminal())
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                with display.task("score", 3, "tokens") as advance:
                    advance()
        except BaseException as error:
            failed.append(error)

    with display.live(view_of(tmp_path, Position(), 0.1)) if live else nullcontext():
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert not display.busy


def test_progress_is_kept_in_a_file_for_others(tmp_path, monkeypatch):
    """Of the task that is shown, whole at any time, at most once a second; and nothing of a process that was killed."""
    file = tmp_path / "refresh-0.progress.json"
    file.write_text("{")
    display = Display(Console(file=io.StringIO()), progress=file)
    assert not file.exists()
    now = [100.0]
    monkeypatch.setattr("npd.observe.display.time.monotonic", lambda: now[0])

    def kept() -> Progress:
        return Progress.from_json(json.loads(file.read_text()))

    with display.task("generation 0, part 1/2: generate", 20, "responses", short="generate") as advance:
        assert kept().done == 0
        advance(3)
        assert kept().done == 0
        with display.task("inside", 5, "tokens") as nothing:
            nothing(5)
        now[0] += 1.0
        advance(4, note="so far")
        assert (kept().name, kept().short) == ("generation 0, part 1/2: generate", "generate")
        assert (kept().total, kept().unit, kept().done, kept().note) == (20, "responses", 7, "so far")
    assert list(tmp_path.iterdir()) == []
    with display.task("score", 1, "tokens") as advance:
        file.unlink()
        file.mkdir()  # a file that cannot be written must not end the work
        now[0] += 1.0
        advance()


@pytest.mark.parametrize("kind", ["pipe", "dumb"])
def test_where_lines_cannot_be_drawn_anew_there_are_plain_ones(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb" else "xterm")
    monkeypatch.setattr("npd.observe.display.PLAIN_SECONDS", 0.0)
    out = Terminal() if kind == "dumb" else io.StringIO()
    display = Display(Console(file=out, highlight=False))
    with display.live(view_of(tmp_path, Position(), 0.1)), display.task("generate", 10, "responses") as advance:
        advance(4)
    assert out.getvalue() == "generate: 4/10 responses\n"


def test_standard_error_that_goes_to_a_file_stays_there(tmp_path, monkeypatch):
    console = terminal()
    with (tmp_path / "err.log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        with Display(console).live(view_of(tmp_path, Position(), 0.1)):
            print("a warning", file=sys.stderr)
    assert (tmp_path / "err.log").read_text() == "a warning\n"
    assert "a warning" not in plain(console)


def test_standard_error_above_a_view_is_still_a_file(tmp_path):
    with (tmp_path / "err.log").open("w") as log:
        assert Whole(terminal(), log).fileno() == log.fileno()


@pytest.mark.parametrize("line", ["\r{}%", "{}%\r", "{}%\r\r"])
def test_a_line_that_is_redrawn_is_not_kept_whole(line):
    console = terminal()
    others = Whole(console, sys.stderr)
    for i in range(1000):
        others.write(line.format(i))
        assert len(others.rest) < 12
    others.write("\n")
    assert plain(console).splitlines() == ["999%"]


@pytest.mark.slow
def test_a_run_in_a_terminal_says_all_that_it_says_elsewhere(make_tree, monkeypatch):
    """Every message that plain output has is there, whole, beside the frames of the live view."""
    monkeypatch.setattr("npd.observe.display.PLAIN_SECONDS", math.inf)  # on a slow machine a task would get lines of its own
    tree = make_tree(schedule={"lead": 1.0}, rollout={"part_size": 6})
    console = terminal()
    npd.distill(tree, display=Display(console))
    said = plain(console)
    pages = Console(file=io.StringIO(), width=80)
    npd.distill(make_tree("other", schedule={"lead": 1.0}, rollout={"part_size": 6}), display=Display(pages))
    assert isinstance(pages.file, io.StringIO)
    for line in pages.file.getvalue().splitlines():
        assert line.strip() in said
    assert "generation 2 of 2" in said
    assert "refresh-0" in said
