"""What a command shows while it works: bars on a terminal, a line a task elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Advance = Callable[..., None]

PLAIN_SECONDS = 15.0  # between lines of a long task when the output is not a terminal


class Display:
    """One console for a command."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=False)
        self.busy = False
        """Is a task being shown? Tasks inside it are not."""

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
    def task(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """A task of `total` steps; call the result as advance(steps=1, note="")."""
        if self.busy or self.console.quiet:
            yield lambda steps=1, note="": None
            return
        self.busy = True
        try:
            with self._bar(name, total, unit) if self.console.is_terminal else self._lines(name, total, unit) as advance:
                yield advance
        finally:
            self.busy = False

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
