"""What makes generations, on a run directory made by hand: prompts and parts as tokens, no models."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from fake_run import responses
from rich.console import Console

from npd.config import Config, PlacementConfig, load_config
from npd.generations.books import Books
from npd.generations.generation import Generations
from npd.generations.pipeline import Pipeline
from npd.generations.producer import Workshop
from npd.observe.display import Display
from npd.observe.events import Events
from npd.placement import Placement, assign_devices
from npd.prompts import SCHEMA, Prompts
from npd.selection import Select
from npd.store import Store

VOCABULARY = 20


def config_of(run_dir: Path | str = "run", **sections: Any) -> Config:
    """A configuration of models that nobody loads."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "data": {"train": "d"},
    }
    for name, options in sections.items():
        tree[name] = {**tree.get(name, {}), **options} if isinstance(options, dict) else options
    return load_config(tree)


def prompts_of(count: int, completions: list[int | None] | None = None, sources: tuple[str, ...] = ("a", "b")) -> Prompts:
    """Prompts p0, p1, ... of 1, 2, 3, 1, ... tokens; `completions` are lengths of references."""
    lengths = completions or [None] * count
    rows = [
        {
            "prompt_id": f"p{i}",
            "source": sources[i % len(sources)],
            "prompt_ids": [i % VOCABULARY] * (1 + i % 3),
            "completion_ids": None if length is None else [3] * length,
            "answer": None,
        }
        for i, length in enumerate(lengths)
    ]
    return Prompts(pa.Table.from_pylist(rows, schema=SCHEMA), count)


def part_of(config: Config, table: pa.Table, generation: int, part: int, version: int) -> pa.Table:
    """A finished part with random responses to the prompts of a table."""
    rng = np.random.default_rng([generation + 1, part, version + 1])
    scored = responses(rng, len(table), VOCABULARY)
    for name in ("prompt_id", "source", "prompt_ids"):
        scored = scored.set_column(scored.column_names.index(name), name, table[name])
    ids = [f"g{generation:03d}-p{part:05d}-{i:05d}" for i in range(len(table))]
    scored = scored.append_column("sample_id", pa.array(ids)).append_column(
        "policy_version", pa.array([version] * len(table), pa.int32())
    )
    return Select(config.selection)(scored)


def damage(file: Path) -> None:
    """Change bytes where a part has its first columns."""
    data = bytearray(file.read_bytes())
    data[60:124] = bytes(byte ^ 0xFF for byte in data[60:124])
    file.write_bytes(data)


class Bench:
    """A run directory and the books of its generations.

    Args:
        prompts: how many, or which.
        kind: what its generations are.
    """

    def __init__(
        self,
        run_dir: Path,
        prompts: int | Prompts = 10,
        kind: type[Generations] = Generations,
        change: Callable[[Config], Config] = lambda config: config,
        **sections: Any,
    ) -> None:
        sections.setdefault("rollout", {})
        sections["rollout"] = {"part_size": 4, "max_new_tokens": 12} | sections["rollout"]
        sections.setdefault("selection", {"rule": "none"})
        self.config = change(config_of(run_dir, **sections))
        self.store = Store(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.prompts = prompts_of(prompts) if isinstance(prompts, int) else prompts
        self.generations = kind(self.config, self.prompts)
        self.said = io.StringIO()
        self.display = Display(Console(file=self.said, width=200, soft_wrap=True))
        self.events = Events(run_dir / "events.jsonl")
        self.books = Books(self.config, self.store, self.generations, self.display, self.events)

    def write(self, generation: int, part: int, version: int | None = None) -> Path:
        """Make a part by hand; its file."""
        table = self.generations.table(generation, part)
        version = generation if version is None else version
        self.store.write_part(generation, part, part_of(self.config, table, generation, part, version))
        return self.store.part(generation, part)

    def shop(self, pipeline: Any = None, placement: Placement | None = None, **options: Any) -> Workshop:
        """A workshop; without a pipeline, nothing can be made in this process."""
        placement = placement or assign_devices(PlacementConfig(), self.config.schedule, gpus=0, cpus=2)
        return Workshop(
            self.config,
            self.store,
            self.generations,
            self.books,
            cast(Pipeline, pipeline),
            placement,
            self.events,
            self.display,
            **options,
        )


class Tasks:
    """A display without a clock: tasks, and how far each came."""

    def __init__(self) -> None:
        self.tasks: list[list[Any]] = []

    def say(self, text: str) -> None: ...

    def table(self, *args: Any) -> None: ...

    @contextmanager
    def task(self, name: str, total: int, unit: str, *, short: str = "") -> Iterator[Callable[..., None]]:
        task: list[Any] = [name, total, unit, 0]
        self.tasks.append(task)

        def advance(steps: float = 1, note: str = "") -> None:
            task[3] += steps

        yield advance
