"""What a command shows while it works: a live view or bars on a terminal, a line a task elsewhere."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]


def untold(steps: float = 1, note: str = "") -> None:
    """An `Advance` of what nobody is shown."""


PLAIN_SECONDS = 15.0  # between lines of a long task when the output is not a terminal
FRAMES = 2  # a second, of the live view; each takes some milliseconds from the training


@dataclass
class Task:
    """What is being done now."""

    name: str
    total: float
    unit: str
    done: float = 0.0
    note: str = ""
    began: float = field(default_factory=time.monotonic)

    def figures(self) -> str:
        rate = self.done / max(1e-9, time.monotonic() - self.began)
        pace = f", {rate:,.0f}/s" if self.unit != "%" and self.done else ""
        count = f"{self.done:,.0f}%" if self.unit == "%" else f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"
        return f"{count}{pace}"


class View(Protocol):
    """What a terminal shows below the messages."""

    task: Task | None

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


class Display:
    """One console for a command."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
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
        self.console.print(escape(text), soft_wrap=True)  # a path that is broken in two can't be copied

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table; the first column is left-aligned, the others right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
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
    def task(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """A task of `total` steps; call the result as advance(steps=1, note="").

        Of tasks inside or beside each other, in one thread or in several, the first is shown.
        """
        with self._lock:
            first = not (self.busy or self.console.quiet)
            self.busy = self.busy or first
        if not first:
            yield untold
            return
        show = self._in_view if self.view is not None else self._bar if self.redraws else self._lines
        try:
            with show(name, total, unit) as advance:
                yield advance
        finally:
            self.busy = False

    @contextmanager
    def _in_view(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        view, task = self.view, Task(name, total, unit)
        assert view is not None, "a task is shown in the view that is there"

        def advance(steps: float = 1, note: str = "") -> None:
            task.done, task.note = task.done + steps, note

        view.task = task
        try:
            yield advance
        finally:
            view.task = None

    @contextmanager
    def _bar(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(name), total=total, unit=unit, note="")

            def advance(steps: float = 1, note: str = "") -> None:
                progress.update(task, advance=steps, note=escape(note))

            yield advance

    @contextmanager
    def _lines(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        done, last = 0.0, time.monotonic()

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                self.say(f"{name}: {done:.0f}/{total} {unit} {note}".rstrip())

        yield advance
