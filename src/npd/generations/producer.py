"""Where a run's generations are made: what a producer is, and the one that takes turns with the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from npd.config import Config, PlacementConfig
from npd.errors import UserError
from npd.generations.books import Books
from npd.generations.generation import Generations
from npd.generations.pipeline import Pipeline
from npd.observe.console import show_generation
from npd.observe.display import Display
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.registry import PRODUCERS
from npd.store import REFERENCE, Store


@dataclass
class Workshop:
    """What a producer works with: one for each process that trains.

    Of every `world` parts that are made in these processes, this one makes one.
    """

    config: Config
    store: Store
    generations: Generations
    books: Books
    pipeline: Pipeline
    placement: Placement
    events: Events
    display: Display
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns once every process has come here."""
    room: Callable[[], AbstractContextManager[object]] = nullcontext
    """Around generating in this process: the trainer's models leave a device that is shared."""
    shown: set[int] = field(default_factory=set)
    """Generations whose table was shown."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def make(self, generation: int, version: int | None = None) -> None:
        """Make whatever parts of a generation are missing or damaged, in this process, then its manifest.

        A generation that another snapshot began is finished with that snapshot.

        Args:
            version: the snapshot that writes; None: that of the generation's number.

        Raises:
            RunError: selection left nothing.
            UserError: the snapshot is damaged, or is no longer kept.
        """
        if self.main:
            self.books.mend(generation)
        self.wait()  # every process sees the same parts before any of them begins to make what is missing
        mine = [part for part in self.books.missing(generation) if part % self.world == self.rank]
        self.make_parts(generation, mine, version)
        self.pipeline.models.release()
        self.wait()
        if self.main and self.store.manifest(generation) is None:
            self.finish(generation)
        self.wait()
        self.shown.add(generation)  # whoever made it showed it, and that may have been an earlier process
        self.books.check_some_kept(generation)

    def make_parts(self, generation: int, parts: Iterable[int], version: int | None = None) -> None:
        """Make these parts in this process."""
        self.pipeline.make(generation, iter(parts), version)

    def finish(self, generation: int) -> None:
        """Write the manifest of a generation whose parts are all there, and show what is in it."""
        manifest = self.books.finish(generation)
        self.shown.add(generation)
        show_generation(manifest, self.display)


class Producer(ABC):
    """Makes generations while a run is trained; the main process asks it, but for `begin`, which all of them call.

    A part is a pure function of configuration, snapshot and number, so it does not matter who makes it, or how often.
    """

    elsewhere: ClassVar[bool] = False
    """Are generations made without this machine's devices? Then placement.rollout has its name, instead of devices."""
    in_turns: ClassVar[bool] = False
    """Is a generation whole when `begin` returns? Then training stands still meanwhile, and no snapshot is taken ahead."""
    waits_for: ClassVar[str] = ""
    """Who is waited for, if a person should know."""

    def __init__(self, workshop: Workshop) -> None:
        self.shop = workshop

    @classmethod
    def suits(cls, placed: Placement) -> bool:
        """Is a producer of this kind meant, where placement.rollout does not name one?"""
        return False

    @classmethod
    def uses_cores(cls, config: PlacementConfig) -> bool:
        """Do its generations take cores of this machine beside the trainer, though no devices are named?"""
        return False

    @classmethod
    def check_config(cls, config: Config) -> None:
        """What can be known before a run begins; nothing is started.

        Raises:
            UserError: it can't work so.
        """

    @classmethod
    def check_placed(cls, config: Config, placed: Placement) -> None:
        """As `check_config`, of what this machine has.

        Raises:
            UserError: it can't work so.
        """

    @classmethod
    def plan(cls, config: Config, placed: Placement) -> str:
        """What `--dry-run` says of who makes them elsewhere, and what each takes; nothing: no more than its name."""
        return ""

    def open(self) -> None:
        """Begin to work: called once, by the main process, before the trainer's own models are loaded."""

    @abstractmethod
    def begin(self, generation: int) -> None:
        """The trainer begins a generation, whose snapshot is published.

        Raises:
            UserError: it can't be made.
        """

    @abstractmethod
    def landed(self, generation: int, taken: list[int]) -> int | None:
        """The part to train on next, of those that are not taken; None while there is none."""

    @abstractmethod
    def want(self, generation: int, part: int) -> None:
        """A part that should be there is not, or was lost: make it, or see that it is made."""

    def check(self) -> None:
        """Called now and then.

        Raises:
            UserError, RunError: it has failed for good.
        """

    def complete(self, generation: int, pause: Callable[[], None]) -> None:
        """See that a generation whose parts have all landed has its manifest; `pause` waits a little.

        Raises:
            RunError: its selection left nothing.
        """

    def close(self) -> None:
        """End all work; nothing is left running."""


class Turns(Producer):
    """Training and generation take turns, in the trainers' own processes."""

    in_turns = True

    @classmethod
    def suits(cls, placed: Placement) -> bool:
        return placed.turns

    def begin(self, generation: int) -> None:
        with self.shop.room():
            if self.shop.generations.mixed:
                self.shop.make(REFERENCE)
            self.shop.make(generation)

    def landed(self, generation: int, taken: list[int]) -> int | None:
        return min(set(range(len(self.shop.generations.parts(generation)))) - set(taken))

    def want(self, generation: int, part: int) -> None:
        with self.shop.room():
            self.shop.make(generation)


class Beside(Producer):
    """What producers beside the trainer share: parts land in the run directory while it trains."""

    in_order: ClassVar[bool] = False
    """Do parts land in the order of their numbers?"""
    _begun: int | None = None
    """The generation that the trainer began last."""

    def open(self) -> None:
        self.shop.store.current = self.shop.store.resumed_generation()

    def begin(self, generation: int) -> None:
        shop = self.shop
        if not shop.main:
            return
        if shop.store.manifest(generation) is not None:  # others are looked at as they are taken
            with shop.events.span(SpanName.VERIFY, generation=generation):
                shop.books.mend(generation)
        self._check_snapshot(generation)
        self._begun = generation

    def check(self) -> None:
        """Once the snapshot is gone nobody can write what is missing: to wait for it would be to wait for ever."""
        if self._begun is not None and self._begun not in self.shop.store.policies():
            self._check_snapshot(self._begun)

    def _check_snapshot(self, generation: int) -> None:
        shop = self.shop
        missing = shop.books.missing(generation)
        begun = shop.books.begun_by(generation)
        if missing and (generation if begun is None else begun) not in shop.store.policies():
            raise UserError(
                f"Generation {generation} of {shop.store.path} lacks {len(missing)} parts, and the snapshot that writes them "
                "is not there any more.",
                "Restore policy/, or delete the run directory and start over.",
            )

    def landed(self, generation: int, taken: list[int]) -> int | None:
        there = self.shop.store.parts(generation) - set(taken)
        if self.in_order or self.shop.store.manifest(generation) is not None:
            # They have landed in order, or all have: one that is missing was lost, and whoever takes it waits for it.
            return min(set(range(len(self.shop.generations.parts(generation)))) - set(taken))
        return min(there, default=None)

    def complete(self, generation: int, pause: Callable[[], None]) -> None:
        shop = self.shop
        while shop.store.manifest(generation) is None:
            missing = shop.books.missing(generation)
            if missing:  # lost since
                self.want(generation, missing[0])
                pause()
                continue
            try:
                shop.finish(generation)
            except (UserError, FileNotFoundError):
                shop.books.mend(generation)
        shop.books.check_some_kept(generation)


def producer_kind(placed: Placement) -> type[Producer]:
    """The kind of producer that a placement means.

    Raises:
        UserError: there is no such kind.
    """
    if placed.producer is not None:
        return PRODUCERS[placed.producer]
    return PRODUCERS.suiting(placed)
