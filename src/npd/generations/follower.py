"""Generations made from a run's directory alone, as its snapshots appear: here beside the trainer, or on another machine."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from npd import models
from npd.config import Config, config_tree, differing_keys, load_config
from npd.errors import UserError
from npd.generations.books import Books
from npd.generations.generation import Generations
from npd.generations.models import Models, load_tokenizers, texts_of
from npd.generations.pipeline import Pipeline
from npd.generations.producer import Beside, Workshop
from npd.observe.display import Display
from npd.observe.events import Events, SpanName
from npd.placement import Placement, check_engine, resolve_placement
from npd.store import REFERENCE, Store, check_places, explained_run, recorded
from npd.store.provenance import in_rows

ELSEWHERE = re.compile(r"(student|teacher|teachers\..+)\.(model|tokenizer|adapter):")  # another machine may have its own way


class External(Beside):
    """Others make the generations, by `npd refresh --follow`."""

    elsewhere = True
    waits_for = "npd refresh --follow"

    def want(self, generation: int, part: int) -> None:
        """Whoever follows the run sees for itself what is missing."""


class Follower:
    """Makes each generation of a run as soon as its snapshot is published: of every `world` parts one.

    The part that is wanted first is made first: after each, all that may be missing is looked at anew.
    """

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop

    def follow(self, poll: float) -> None:
        """Until every generation is made or the run is finished; looks at the directory every `poll` seconds.

        Raises:
            UserError, RunError: something in the run is damaged for good, or a selection keeps nothing.
        """
        try:
            self._follow(poll)
        finally:
            self.shop.pipeline.models.close()

    def _follow(self, poll: float) -> None:
        shop = self.shop
        waits_since: float | None = None
        while not shop.store.finished:
            shop.store.check_there()
            wanted = range(shop.store.current, shop.config.schedule.generations)
            there = sorted(version for version in shop.store.policies() if version in wanted)
            candidates = ([REFERENCE] if shop.generations.mixed else []) + there
            work = next((generation for generation in candidates if self._is_open(generation)), None)
            if work is not None:
                if waits_since is not None:
                    shop.events.write(SpanName.WAIT, waits_since, time.time())
                    waits_since = None
                self._advance(work)
                continue
            if all(shop.store.manifest(generation) is not None for generation in wanted):
                return
            waits_since = waits_since or time.time()
            time.sleep(poll)

    def _mine(self, generation: int) -> list[int]:
        """Missing parts that this process makes."""
        return [part for part in self.shop.books.missing(generation) if part % self.shop.world == self.shop.rank]

    def _is_open(self, generation: int) -> bool:
        """Is there anything to do for a generation now?"""
        if self._mine(generation):
            return True
        shop = self.shop
        return shop.main and shop.store.manifest(generation) is None and not shop.books.missing(generation)

    def _advance(self, generation: int) -> None:
        """Make the next parts of a generation, or its manifest."""
        shop = self.shop
        if self._mine(generation):
            shop.make_parts(generation, self._wanted(generation), generation)
            return
        try:
            shop.finish(generation)
        except (UserError, FileNotFoundError):  # a damaged part, or one that the trainer has just found damaged and deleted
            shop.books.mend(generation)
            return
        shop.books.check_some_kept(generation)

    def _wanted(self, generation: int) -> Iterator[int]:
        """Missing parts, each asked for once, for as long as no other generation comes before this one.

        Without continuous batching there is a single part: what is wanted first is then looked at anew.
        """
        shop = self.shop
        asked: set[int] = set()
        while missing := [part for part in self._mine(generation) if part not in asked]:
            if asked and (not shop.pipeline.models.engine_kind.continuous or shop.store.current > generation):
                return
            asked.add(missing[0])
            yield missing[0]


def follow(
    run_dir: Path,
    placement: Placement | None,
    rank: int,
    world: int,
    display: Display,
    poll: float,
    *,
    config: Config | None = None,
    began: float | None = None,
) -> None:
    """Make the generations of a run from its directory alone, as their snapshots appear: of every `world` parts one.

    Args:
        placement: None: as the configuration says for this machine.
        config: the run's, but with this machine's placement, paths of models and evaluation; None: the run's.
        began: when this process began, if somebody supervises it; it then hears of a failure, and puts it on record.

    Raises:
        UserError: there is no run to follow, `config` differs in more, or something in the run is damaged.
    """
    check_places(run_dir)
    file = run_dir / "config.yaml"
    if not file.exists() or not (run_dir / "prompts.arrow").exists():
        raise UserError(f"{run_dir} holds no run of `npd distill`; start one there first.")
    here = {} if config is None else {"plugins": config.plugins}  # another machine has them elsewhere
    theirs = load_config(file, {"run_dir": str(run_dir)} | here)
    if recorded(run_dir).command != "distill":
        raise UserError(f"{run_dir} holds no run of `npd distill`, and only those have generations to make.")
    store = Store(run_dir)
    theirs, config = store.as_begun(theirs), store.as_begun(config or theirs)
    changes = [c for c in differing_keys(config_tree(theirs), config_tree(config)) if not ELSEWHERE.match(c)]
    if changes:
        raise UserError(f"A run is followed as it is, but here {'; '.join(changes)}. Leave that out.")
    shop = workshop_of(config, placement, rank, world, display)
    shop.events.write(SpanName.LOAD, began or time.time(), time.time())
    try:
        with explained_run(run_dir):
            Follower(shop).follow(poll)
    except Exception as error:
        if began is None:  # nobody else would put it on record
            shop.events.failed(error)
        raise


def workshop_of(config: Config, placement: Placement | None, rank: int, world: int, display: Display) -> Workshop:
    """What makes the generations of a run from its directory alone, on devices of this machine.

    Args:
        placement: None: as the configuration says for this machine.

    Raises:
        UserError: tokenizers or prompts can't be loaded, or the engine can't stand here.
    """
    store = Store(config.run_dir)
    store.joined = True
    config = in_rows(config) if store.began_in_rows else config
    loaded = load_tokenizers(config)
    store.vocabulary_size = loaded.vocabulary.size
    if placement is None:  # the trainer's device is another machine's
        anywhere = config.placement.model_copy(update={"train": "auto"})
        placement = resolve_placement(config.model_copy(update={"placement": anywhere}), take_turns=True)
        check_engine(config, placement, 1, trains=False)
    models.use_device(placement.rollout)
    prompts = store.prompts()
    events = Events(store.path / "events.jsonl", f"refresh-{rank}")
    generations = Generations(config, prompts)
    # The selection is read anew for each part: `npd refresh --reselect` may have changed it.
    books = Books(config, store, generations, display, events, store.selection)
    pad_id = loaded.tokenizer.pad_token_id
    kept = Models(
        config,
        store,
        loaded.vocabulary,
        pad_id,
        prompts.longest,
        display,
        placement,
        longest_of_teacher=prompts.longest_of_teacher,
        decode=texts_of(loaded),
    )
    pipeline = Pipeline(config, store, generations, kept, books, display, events, placement)
    return Workshop(config, store, generations, books, pipeline, placement, events, display, rank, world)
