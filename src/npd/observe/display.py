"""What a command shows while it works: a live view or bars on a terminal, a line a task elsewhere."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from npd.errors import NpdError
from npd.records import Progress

Advance = Callable[..., None]


def untold(steps: float = 1, note: str = "") -> None:
    """An `Advance` of what nobody is shown."""


PLAIN_SECONDS = 15.0  # between lines of a long task when the output is not a terminal
RECORD_SECONDS = 1.0  # between writes of a task's progress to a file
FRAMES = 2  # a second, of the live view; each takes some milliseconds from the training


def pace_of(task: Progress) -> str:
    """How far a task is and how fast, such as 40/120 responses, 7/s."""
    rate = task.done / max(1e-9, time.time() - task.began)
    pace = f", {rate:,.0f}/s" if task.unit != "%" and task.done else ""
    count = f"{task.done:,.0f}%" if task.unit == "%" else f"{task.done:,.0f}/{task.total:,.0f} {task.unit}"
    return f"{count}{pace}"


class View(Protocol):
    """What a terminal shows below the messages."""

    task: Progress | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult: ...


class Whole(io.TextIOBase):
    """What libraries write to standard error, above a live view: whole lines, and of a redrawn line its last state."""

    def __init__(self, console: Console, file: TextIO) -> None:
        self.console, self.file, self.rest = console, file, ""

    def write(self, text: str) -> int:
        *lines, rest = (self.rest + text).split("\n")
        for line in lines:
            self.console.print(Text(line.rstrip("\r").rpartition("\r")[2]), soft_wrap=True)
        line = rest.rstrip("\r")
        self.rest = line.rpartition("\r")[2] + "\r" * (len(line) < len(rest))
        return len(text)

    def fileno(self) -> int:
        return self.file.fileno()

    def end(self) -> None:
        if self.rest.strip():
            self.write("\n")


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _plain(text: str) -> str:
    """Text as it is, for rich to print: no markup, and of data, names and templates nothing that a terminal would obey."""
    return escape(CONTROLS.sub("\ufffd", text))


class Display:
    """One console for a command.

    Args:
        progress: a file that has the task being shown as a `Progress` record, for other processes; none between tasks.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False, progress: Path | None = None) -> None:
        self.progress = progress
        if progress is not None:
            with suppress(OSError):
                progress.unlink(missing_ok=True)  # of a process that was killed
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=False)
        self.busy = False
        """Is a task being shown? Tasks inside it are not."""
        self.view: View | None = None
        self._lock = threading.Lock()

    @property
    def redraws(self) -> bool:
        """Can lines be drawn anew? Not in a file, whatever FORCE_COLOR says, nor on a terminal that is only written to."""
        return self.console.is_interactive and self.console.file.isatty()

    def say(self, text: str) -> None:
        self.console.print(_plain(text), soft_wrap=True)  # a path that is broken in two can't be copied

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table; the first column is left-aligned, the others right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(_plain, row))
        self.console.print(table)

    @contextmanager
    def live(self, view: View) -> Iterator[None]:
        """Show a view below everything that is said meanwhile, on a terminal; elsewhere nothing changes."""
        if not self.redraws or self.console.quiet or self.view is not None:
            yield
            return
        self.view = view
        try:
            live = Live(view, console=self.console, refresh_per_second=FRAMES, transient=True, redirect_stderr=False)
            others = Whole(self.console, sys.stderr)
            # One that goes elsewhere is not in the view's way.
            with live, redirect_stderr(others) if sys.stderr.isatty() else nullcontext():
                yield
                others.end()
        finally:
            self.view = None

    @contextmanager
    def task(self, name: str, total: int, unit: str, *, short: str = "") -> Iterator[Advance]:
        """A task of `total` steps; call the result as advance(steps=1, note="").

        Of tasks inside or beside each other, in one thread or in several, the first is shown. `short` is its name where
        what it belongs to stands beside it.
        """
        with self._lock:
            first = not (self.busy or self.console.quiet)
            self.busy = self.busy or first
        if not first:
            yield untold
            return
        show = self._in_view if self.view is not None else self._bar if self.redraws else self._lines
        task = Progress(name, short or name, total, unit)
        try:
            with show(task) as advance, self._on_record(task, advance) as recorded:
                yield recorded
        finally:
            self.busy = False

    @contextmanager
    def _on_record(self, task: Progress, advance: Advance) -> Iterator[Advance]:
        """Keep the file that others read up to date, at most once a second."""
        file = self.progress
        if file is None:
            yield advance
            return
        from npd.store.files import beside, opened  # here: `npd --help` should not wait for Arrow

        written = -RECORD_SECONDS

        def write() -> None:
            nonlocal written
            if time.monotonic() - written < RECORD_SECONDS:
                return
            written = time.monotonic()
            aside = beside(file)
            with suppress(OSError, NpdError):  # what is shown must not end what is done
                with opened(aside, "w") as whole:
                    whole.write(json.dumps(task.to_json()))
                os.replace(aside, file)

        def recorded(steps: float = 1, note: str = "") -> None:
            nonlocal task
            advance(steps, note=note)
            task = replace(task, done=task.done + steps, note=note)
            write()

        write()
        try:
            yield recorded
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    @contextmanager
    def _in_view(self, task: Progress) -> Iterator[Advance]:
        view = self.view
        assert view is not None, "a task is shown in the view that is there"

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal task
            view.task = task = replace(task, done=task.done + steps, note=note)

        view.task = task
        try:
            yield advance
        finally:
            view.task = None

    @contextmanager
    def _bar(self, task: Progress) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            bar = bars.add_task(escape(task.name), total=task.total, unit=task.unit, note="")

            def advance(steps: float = 1, note: str = "") -> None:
                bars.update(bar, advance=steps, note=escape(note))

            yield advance

    @contextmanager
    def _lines(self, task: Progress) -> Iterator[Advance]:
        done, last = 0.0, time.monotonic()

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                self.say(f"{task.name}: {done:.0f}/{task.total:.0f} {task.unit} {note}".rstrip())

        yield advance
