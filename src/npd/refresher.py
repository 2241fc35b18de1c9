"""Prompts to a finished generation: rollout, scoring, selection, store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npd.config import Config, ModelConfig
from npd.models import Vocabulary, load_model, snapshot_config
from npd.observe.display import Display
from npd.observe.events import Events
from npd.prompts import Prompts
from npd.rollout import TransformersRollout
from npd.schedule import derive_seed, prompts_of_generation
from npd.scoring import Prefill, ScoreStudent, ScoreTeacher
from npd.selection import Select, check_some_kept, summarize
from npd.store import Store

REFERENCE = -1
"""policy_version of text that no student snapshot wrote."""


@dataclass(frozen=True)
class Generation:
    """A finished generation on disk."""

    index: int
    path: Path
    policy_version: int
    manifest: dict[str, Any]


class Refresher:
    """Makes generations. Holds the teacher, loaded once and only if something is missing."""

    def __init__(
        self,
        config: Config,
        store: Store,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        display: Display,
        events: Events,
        *,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.store, self.prompts, self.vocabulary = config, store, prompts, vocabulary
        self.pad_id: int = tokenizer.pad_token_id
        self.display, self.events = display, events
        self.rank, self.world, self.wait = rank, world, wait

    @cached_property
    def teacher(self) -> PreTrainedModel:
        assert self.config.teacher is not None
        return load_model(self.config.teacher)

    def __call__(self, generation: int, policy_version: int) -> Generation:
        """Make whatever parts of a generation are missing, then its manifest.

        A generation that another snapshot began is finished with that snapshot.

        Raises:
            RunError: selection left nothing.
            UserError: the snapshot is damaged.
        """
        indices = self._indices(generation)
        count = self.part_count(generation)
        incomplete = self.store.manifest(generation) is None or self.store.missing_parts(generation, count)
        self.wait()  # every process has looked before any of them begins to mend what is missing
        if incomplete:
            policy_version = self._begun_by(generation, count, policy_version)
            missing = [p for p in self.store.missing_parts(generation, count) if p % self.world == self.rank]
            if missing:
                stages = self._stages(policy_version)
                for part in missing:
                    with self.events.span("part", generation=generation, part=part):
                        self._make_part(generation, part, indices, policy_version, *stages)
                del stages
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.wait()
            if self.rank == 0:
                self._finish(generation, count, policy_version)
            self.wait()
        manifest = self.store.check_generation(generation)
        check_some_kept(manifest["selection"], self.config.selection)
        return Generation(generation, self.store.generation(generation), manifest["policy_version"], manifest)

    def _indices(self, generation: int) -> list[int]:
        return prompts_of_generation(len(self.prompts), generation, self.config.schedule, self.config.seed)

    def part_count(self, generation: int) -> int:
        """Parts of a generation."""
        return -(-len(self._indices(generation)) // self.config.rollout.part_size)

    def _begun_by(self, generation: int, count: int, policy_version: int) -> int:
        for part in range(count):
            if self.store.part(generation, part).exists():
                return int(self.store.read_part(generation, part, ["policy_version"])["policy_version"][0].as_py())
        return policy_version

    def rollout(self, model: PreTrainedModel) -> TransformersRollout:
        options = self.config.rollout
        return TransformersRollout(
            model,
            self.vocabulary,
            self.pad_id,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=options.batch_size,
            samples_per_prompt=options.samples_per_prompt,
        )

    def prefill(self, model: PreTrainedModel) -> Prefill:
        return Prefill(model, self.vocabulary, self.pad_id, self.config.scoring.batch_tokens)

    def _student_config(self, policy_version: int) -> ModelConfig:
        path = self.store.policy(policy_version)
        self.store.check_model(path)
        return snapshot_config(self.config.student, path)

    def _stages(self, policy_version: int) -> tuple[Any, ...]:
        student = load_model(self._student_config(policy_version))
        return (
            self.rollout(student),
            ScoreTeacher(self.prefill(self.teacher), self.config.scoring.top_k),
            ScoreStudent(self.prefill(student)),
            Select(self.config.selection),
        )

    def _table(self, indices: list[int], part: int) -> pa.Table:
        size = self.config.rollout.part_size
        return self.prompts.table.take(pa.array(indices[part * size : (part + 1) * size], pa.int64()))

    def _make_part(
        self,
        generation: int,
        part: int,
        indices: list[int],
        policy_version: int,
        rollout: TransformersRollout,
        score_teacher: ScoreTeacher,
        score_student: ScoreStudent,
        select: Select,
    ) -> None:
        table = self._table(indices, part)
        name, parts = f"generation {generation}, part {part + 1}/{self.part_count(generation)}", self.config.rollout
        with (
            self.events.span("generate", generation=generation, part=part),
            self.display.task(f"{name}: generate", len(table) * parts.samples_per_prompt, "responses") as advance,
        ):
            table = rollout(table, derive_seed(self.config.seed, "rollout", policy_version, generation, part), advance)
        table = identify(table, generation, part, policy_version)
        tokens = count_tokens(table["response_ids"])
        with (
            self.events.span("score", generation=generation, part=part),
            self.display.task(f"{name}: score", 3 * tokens, "tokens") as advance,
        ):
            table = score_student(score_teacher(table, advance), advance)
        self.store.write_part(generation, part, select(table))

    def _finish(self, generation: int, count: int, policy_version: int) -> None:
        columns = ["verdict", "source", "delta_ifd", "finish_reason", "response_ids"]
        tables = [self.store.read_part(generation, part, columns) for part in range(count)]
        table = pa.concat_tables(tables)
        deltas = table["delta_ifd"].to_numpy().astype(np.float64)
        summary = summarize(table["verdict"].to_pylist(), table["source"].to_pylist(), deltas)
        facts = {
            "policy_version": policy_version,
            "selection": summary,
            "prompts": {"read": self.prompts.rows, "used": len(self.prompts), "left_out": self.prompts.report()},
            "response_tokens": count_tokens(table["response_ids"]),
            "length_stops": table["finish_reason"].to_pylist().count("length"),
        }
        self.store.finish_generation(generation, count, facts)
        self._show(generation, facts)

    def _show(self, generation: int, facts: dict[str, Any]) -> None:
        if self.display.busy:  # one of many short generations
            return
        summary = facts["selection"]
        names = sorted({v for s in summary["sources"].values() for v in s["verdicts"]})
        rows = []
        for label, s in [("all", summary), *(summary["sources"].items() if len(summary["sources"]) > 1 else ())]:
            shown = [s["delta_ifd_quantiles"][q] for q in ("0.05", "0.5", "0.95") if s["delta_ifd_quantiles"]]
            quantiles = " ".join(f"{q:.2f}" for q in shown) or "-"
            counts = [str(s["verdicts"].get(name, 0)) for name in names]
            rows.append([label or "(none)", str(s["rows"]), *counts, quantiles])
        title = (
            f"Generation {generation}: {facts['response_tokens']:,} response tokens, "
            f"{facts['length_stops']} stopped by length"
        )
        self.display.table(title, ["source", "responses", *names, "delta 5/50/95%"], rows)


class ReferenceMaker(Refresher):
    """Makes the one generation that `npd sft` trains on: given completions, or the teacher's answers."""

    def _indices(self, generation: int) -> list[int]:
        return list(range(len(self.prompts)))

    def _stages(self, policy_version: int) -> tuple[Any, ...]:
        if self.config.data.references == "given":
            return ()
        return (self.rollout(self.teacher),)

    def _make_part(self, generation: int, part: int, indices: list[int], policy_version: int, *stages: Any) -> None:
        table = self._table(indices, part)
        if stages:
            with (
                self.events.span("generate", generation=generation, part=part),
                self.display.task(f"teacher answers, part {part + 1}", len(table), "responses") as advance,
            ):
                table = stages[0](table, derive_seed(self.config.seed, "teacher", part), advance)
        else:
            table = table.append_column("response_ids", table["completion_ids"]).append_column(
                "finish_reason", pa.array(["stop"] * len(table), pa.string())
            )
        table = identify(table, generation, part, REFERENCE)
        self.store.write_part(
            generation, part, table.append_column("verdict", pa.array(["reference"] * len(table), pa.string()))
        )


def count_tokens(column: pa.ChunkedArray) -> int:
    """Tokens in a list column."""
    return int(pc.sum(pc.list_value_length(column)).as_py())


def identify(table: pa.Table, generation: int, part: int, policy_version: int) -> pa.Table:
    """Add sample_id (unique in the run) and policy_version."""
    ids = [f"g{generation:03d}-p{part:05d}-{row:05d}" for row in range(len(table))]
    return table.append_column("sample_id", pa.array(ids, pa.string())).append_column(
        "policy_version", pa.array([policy_version] * len(table), pa.int32())
    )
