"""What is there of a generation, what is missing or damaged, and the manifest that closes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pyarrow.compute as pc

from npd.config import Config, SelectionConfig
from npd.errors import UserError
from npd.generations.generation import Generations
from npd.generations.guards import look_at
from npd.observe.display import Display
from npd.observe.events import Events, SpanName, read_events
from npd.records import AlignedPositions, EngineCheck, Manifest, SelectionSummary
from npd.registry import ENGINES
from npd.selection import Summary, check_some_kept
from npd.store import Store
from npd.store.schema import NO_POLICY, SCALARS, count_aligned, count_tokens


class Books:
    """The parts and manifests of a run's generations.

    Args:
        selection: the selection that holds now; it may change while a run is followed.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        generations: Generations,
        display: Display,
        events: Events,
        selection: Callable[[], SelectionConfig] | None = None,
    ) -> None:
        self.config, self.store, self.generations = config, store, generations
        self.display, self.events = display, events
        self.selection = selection or (lambda: config.selection)

    def missing(self, generation: int) -> list[int]:
        """Parts that are not there."""
        return self.store.missing_parts(generation, len(self.generations.parts(generation)))

    def begun_by(self, generation: int) -> int | None:
        """The snapshot that wrote what there is of a generation (NO_POLICY for references); None if there is nothing."""
        for part in sorted(self.store.parts(generation)):
            try:
                table = self.store.read_part(generation, part, ["policy_version"], check=True)
                return int(table["policy_version"][0].as_py())
            except (UserError, FileNotFoundError):  # damaged; it is made again
                continue
        manifest = self.store.manifest(generation)
        return None if manifest is None else manifest.policy_version

    def mend(self, generation: int) -> None:
        """Delete damaged parts, so that they are made again: by the manifest if there is one, else by reading them."""
        if self.store.manifest(generation) is None:
            for part in self.store.parts(generation):
                self.drop_if_damaged(generation, part)
        for name in self.store.drop_damaged_parts(generation):
            self.display.say(f"{self.store.generation(generation) / name} was damaged; it is made again.")

    def drop_if_damaged(self, generation: int, part: int) -> None:
        """Delete a part that can't be read, or holds what this part can't."""
        try:
            rows = len(self.store.read_part(generation, part, check=True))
        except FileNotFoundError:
            return
        except UserError:
            rows = -1
        prompts = self.generations.parts(generation)[part : part + 1]  # none, of a part that nobody asks for
        if any(rows != (here.stop - here.start) * self.generations.per_prompt(generation) for here in prompts):
            self.display.say(f"{self.store.part(generation, part)} was damaged; it is made again.")
            self.store.part(generation, part).unlink(missing_ok=True)

    def finish(self, generation: int) -> Manifest:
        """Write the manifest of a generation whose parts are all there; returns it.

        Raises:
            UserError: a part is damaged in a column that is counted; the others are verified when they are trained on.
            FileNotFoundError: a part is gone.
        """
        count = len(self.generations.parts(generation))
        prompts = self.generations.prompts
        with self.events.span(SpanName.FINISH, generation=generation):
            # Before they are read: what is damaged meanwhile is not what the manifest says, and is found by that.
            parts = self.store.part_entries(generation, count)
            summary, tokens, stops = Summary(self.selection()), 0, 0
            for part in range(count):
                table = self.store.read_part(generation, part, [*SCALARS, "reward", "response_ids"], check=True)
                summary.add(table)
                tokens += count_tokens(table["response_ids"])
                stops += int(pc.sum(pc.equal(table["finish_reason"], "length")).as_py())
            selection, version = summary.result(), self.begun_by(generation)
            manifest = Manifest(
                generation=generation,
                rows=sum(part.rows for part in parts),
                parts=parts,
                policy_version=NO_POLICY if version is None else version,
                selection=selection,
                prompts={"read": prompts.rows, "used": len(prompts), "left_out": prompts.report()},
                response_tokens=tokens,
                length_stops=stops,
                teachers=self._rows_by_teacher(selection) if self.config.teachers else {},
                engine=self._engine_check(generation),
                aligned=self._aligned(generation, count),
            )
            self.store.finish_generation(manifest)
        look_at(generation, self.config, self.store, self.events, self.display)
        return manifest

    def check_some_kept(self, generation: int) -> None:
        """See that a finished generation's selection left something.

        Raises:
            RunError: it did not.
        """
        manifest = self.store.manifest(generation)
        if manifest is not None:
            check_some_kept(manifest.selection, self.selection())

    def _aligned(self, generation: int, count: int) -> AlignedPositions | None:
        found = [count_aligned(self.store.part(generation, part)) for part in range(count)]
        counts = [each for each in found if each is not None]
        return AlignedPositions(*map(sum, zip(*counts, strict=True))) if counts else None

    def _engine_check(self, generation: int) -> EngineCheck | None:
        """The worst of what the checks of this generation's engines found."""
        if ENGINES[self.config.rollout.engine].exact:
            return None
        events = read_events(self.events.path, SpanName.ENGINE)
        found = [EngineCheck.from_json(event.facts) for event in events if event.facts.get("generation") == generation]
        return max(found, key=lambda check: check.mean_abs_difference, default=None)

    def _rows_by_teacher(self, selection: SelectionSummary) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for source, counts in selection.sources.items():
            key = self.config.teacher_of(source)
            rows["teacher" if key is None else f"teachers.{key}"] += counts.rows
        return dict(sorted(rows.items()))
