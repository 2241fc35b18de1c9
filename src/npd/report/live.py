"""The live view of a run: what a terminal shows while `npd distill` and `npd sft` work.

Figures of other processes come from the run directory, where each of them writes what it has done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from npd.config import Config
from npd.observe.display import pace_of
from npd.observe.events import SpanName
from npd.records import Progress, StepLine, as_line, as_span
from npd.report.facts import newest, part_tokens
from npd.store import Store
from npd.store.names import LOG, PROGRESS

LOOK = 1.0  # seconds between looks at the directory
RECENT = 16  # steps whose speed is averaged
DID: dict[str, str] = {SpanName.GENERATE: "generated", SpanName.SCORE: "scored"}

Row = Text | ProgressBar | Table


class Standing(Protocol):
    """Where the trainer stands: see npd.train.loop.Position."""

    generation: int
    passes: int
    step: int
    tokens: int

    @property
    def near_policy_kl(self) -> float | None: ...


class RunView:
    """What is known of a run, as lines for a terminal.

    Args:
        progress: the share of the run that is done, 0..1.
        parts: how many parts a generation has, once that is known.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        at: Standing,
        progress: Callable[[], float],
        parts: Callable[[], int],
        generations: int,
    ) -> None:
        self.store, self.config, self.at, self.generations = store, config, at, generations
        self.progress, self.parts = progress, parts
        self.task: Progress | None = None
        self.began, self.from_progress, self.from_tokens = time.monotonic(), progress(), at.tokens
        self._looked = 0.0
        self._line: StepLine | None = None
        self._speed = 0.0
        self._landed: dict[int, int] = {}
        self._kept: tuple[int, int, int] | None = None  # generation, kept, responses
        self._others: dict[str, str] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._rows: list[tuple[str, Row]] = []

    # -- looking

    def look(self) -> None:
        """Read what has changed in the run directory, at most once a second."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        lines = (as_line(raw) for raw in newest(self.store.metrics))
        steps = list(islice((line for line in lines if isinstance(line, StepLine)), RECENT))
        if steps:
            self._line = steps[0]
            self._speed = sum(line.tokens_per_second for line in steps) / len(steps)
        here = self.at.generation
        self._landed = {g: len(self.store.parts(g)) for g in (here, here + 1) if g < self.generations}
        for g in (here + 1, here, here - 1):
            manifest = self.store.manifest(g) if g >= 0 else None
            if manifest is not None:
                self._kept = g, manifest.selection.kept, manifest.selection.rows
                break
        self._look_at_others()

    def _look_at_others(self) -> None:
        """What each background refresh did last, how fast it wrote, and what it is doing now."""
        said: dict[str, list[str]] = {}
        timed: set[str] = set()  # by the newest part that has landed
        for raw in newest(self.store.path / "events.jsonl", 1 << 16):
            span = as_span(raw)
            if span is None or span.role.startswith("trainer") or span.role in timed:
                continue
            generation, part = span.facts.get("generation"), span.facts.get("part")
            if span.name == SpanName.WAIT:
                said.setdefault(span.role, ["had nothing to do"])
            elif span.name in DID and isinstance(generation, int) and isinstance(part, int):
                said.setdefault(span.role, [f"{DID[span.name]} g{generation} part {part + 1}/{self.parts() or '?'}"])
                tokens = self._tokens_of(generation, part)
                if span.name == SpanName.GENERATE and tokens and span.seconds > 0:
                    timed.add(span.role)
                    said[span.role].append(f"{tokens / span.seconds:,.0f} tokens/s generated")
        logs = self.store.path / "logs"
        for _, file in PROGRESS.within(logs):
            with suppress(OSError, ValueError):  # it has just ended
                task, role = Progress.from_json(json.loads(file.read_text("utf-8"))), file.name.removesuffix(PROGRESS.suffix)
                name = f"now {task.short}" if role in said else task.name
                said.setdefault(role, []).append(f"{name}: {pace_of(task)}")
        for _, log in LOG.within(logs):
            said.setdefault(log.stem, ["is starting"])
        self._others = {role: "; ".join(said[role]) for role in sorted(said)}

    def _tokens_of(self, generation: int, part: int) -> int:
        """Response tokens of a part, once it has landed."""
        key = generation, part
        if key not in self._tokens:
            with suppress(Exception):  # not there yet, or no longer
                self._tokens[key] = part_tokens(self.store.part(generation, part))
        return self._tokens.get(key, 0)

    # -- showing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with suppress(Exception):  # a view must not end a run, nor the thread that draws it
            self.look()
        with suppress(Exception):  # what was shown last is shown again
            self._rows = self.lines()
        yield Text("─" * options.max_width, style="dim")
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=14, no_wrap=True, style="dim")
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for name, what in self._rows:
            table.add_row(name, what)
        yield table

    def lines(self) -> list[tuple[str, Row]]:
        """(label, what) from top to bottom."""
        at, schedule, line = self.at, self.config.schedule, self._line
        share = min(1.0, self.progress())
        generation = min(at.generation + 1, self.generations)
        passes = f"pass {min(at.passes + 1, schedule.passes)} of {schedule.passes}"
        where = f"generation {generation:,} of {self.generations:,}, {passes}"
        rows: list[tuple[str, Row]] = [
            ("run", _bar(share, f"{share:4.0%}  {self.time_left(share)}")),
            ("at", Text(f"{where}, step {at.step:,}")),
        ]
        task = self.task  # another thread may take it away meanwhile
        if task is not None:
            rows.append(("now", Text(f"{task.short}: {pace_of(task)}")))
        landed = ", ".join(f"g{g} {there}/{self.parts() or '?'}" for g, there in self._landed.items())
        if landed and self.parts():
            rows.append(("parts landed", Text(landed)))
        if self._kept is not None:
            g, kept, n = self._kept
            rows.append(("kept", Text(f"{kept / n:.1%} of g{g}: {kept:,} of {n:,} responses" if n else "–")))
        if line is not None:
            rows.append(("loss", Text(f"{line.loss:.4f}   CE {line.ce:.4f}, KD {line.kd:.4f}")))
            rows += self._near_policy(line)
            rows.append(("trainer", Text(f"{self._speed:,.0f} tokens/s while training, {at.tokens:,} tokens trained")))
        rows += [(role, Text(what)) for role, what in self._others.items()]
        return rows

    def _near_policy(self, line: StepLine) -> list[tuple[str, Row]]:
        smooth = self.at.near_policy_kl
        value = smooth if smooth is not None else line.near_policy_kl
        if value is None:
            return []
        budget = self.config.schedule.kl_budget
        proxy = " (proxy)" if line.near_policy_kl_is_proxy else ""
        if budget is None:
            return [("near-policy KL", Text(f"{value:.4f}{proxy}   no budget"))]
        return [("near-policy KL", _bar(min(1.0, value / budget), f"{value:.4f} of {budget:g}{proxy}"))]

    def time_left(self, share: float) -> str:
        """By the pace of this process so far."""
        gained, elapsed = share - self.from_progress, time.monotonic() - self.began
        if gained < 0.005:
            return f"{_clock(elapsed)} gone"
        return f"{_clock(elapsed)} gone, about {_clock(elapsed / gained * (1 - share))} left"


def _bar(share: float, text: str) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=20)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(ProgressBar(total=1.0, completed=share, width=20), Text(text))
    return grid


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
