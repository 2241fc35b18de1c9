"""Generations made by actors of a Ray cluster: snapshots go out and tables come back through its object store.

One thread of the trainer's process gives each actor a part, in the order of their numbers, and writes what comes back, so
that actors need nothing of the run directory. An actor or a node that dies costs the part that it was at.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.config import Config, PlacementConfig
from npd.errors import NpdError, RunError, UserError, foreign
from npd.generations.generation import Generations
from npd.generations.producer import Beside, Workshop
from npd.generations.ray_cluster import INSTALL, MEMORY, Actor, Cluster, Needs, imported, needs_of, told, trainers_gpus
from npd.generations.ray_parcels import Parcel, carried, files_of, pack, sizes_of
from npd.observe.events import Events, SpanName
from npd.placement import Placement
from npd.store import REFERENCE, explained_disk, opened
from npd.store.files import beside
from npd.store.names import LOG, PROGRESS
from npd.store.provenance import versions

POLL = 0.1  # seconds between looks at the directory
RECRUIT = 2.0  # seconds between looks at the cluster
SHOWN = 16  # actors whose progress is shown
NODE = 0.1  # of a death: a node that goes is seldom its part's fault


class Ray(Beside):
    """Actors of a Ray cluster make the parts; whoever joins it later makes some as well."""

    elsewhere = True
    in_order = True  # as they are taken: the same weights, whichever of them lands first
    waits_for = "Ray"

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop)
        self.token = uuid.uuid4().hex[:12]
        self.actors: list[Actor] = []
        self.cluster: Cluster | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._finishing = threading.Lock()
        self._failed: BaseException | None = None
        self._deaths: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._stillborn = 0.0
        self._snapshots: dict[int, Parcel] = {}
        self._models: dict[tuple[str, ...], Parcel] = {}
        self._recruited = self._showed = -RECRUIT
        self._waited: float | None = None

    @classmethod
    def uses_cores(cls, config: PlacementConfig) -> bool:
        return config.ray.address is None

    @classmethod
    def check_config(cls, config: Config) -> None:
        imported()

    @classmethod
    def check_placed(cls, config: Config, placed: Placement) -> None:
        cls._needs(config, placed)

    @classmethod
    def _needs(cls, config: Config, placed: Placement) -> Needs:
        local = config.placement.ray.address is None and not imported().is_initialized()
        return needs_of(config.placement.ray, placed, local=local)

    @classmethod
    def plan(cls, config: Config, placed: Placement) -> str:
        return told(config.placement.ray, cls._needs(config, placed))

    # -- asked by the trainer

    def open(self) -> None:
        super().open()
        shop = self.shop
        self.cluster = Cluster(shop.config, shop.placement, self.token)
        self.ray = self.cluster.ray
        if not self.cluster.local and not self.cluster.gpus and shop.config.placement.ray.num_gpus is None:
            shop.display.say("No node of the Ray cluster has a GPU now, so that its actors generate on CPUs.")
        actor = importlib.import_module("npd.generations.ray_actor")
        self._kind = self.ray.remote(actor.Refresher)
        self._messages = actor
        self._carried = carried(shop.config)
        self._run: Parcel | None = None
        self._thread = threading.Thread(target=self._work, name="ray", daemon=True)
        self._thread.start()

    def want(self, generation: int, part: int) -> None:
        """What is missing is seen without that."""

    def check(self) -> None:
        super().check()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def complete(self, generation: int, pause: Any) -> None:
        with self._finishing:
            super().complete(generation, pause)

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self.cluster is not None:
            with suppress(Exception):  # the cluster may be gone
                left = [actor.handle.leave.remote() for actor in self.actors if actor.state != "hello"]
                if left:
                    self.ray.wait(left, num_returns=len(left), timeout=3)
                for actor in self.actors:
                    self.ray.kill(actor.handle)
            self.actors = []
            self.cluster.close()
            self.cluster = None
            self.shop.store.sweep()  # what they were shown to be doing

    # -- the thread

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                self._recruit()
                self._hand_out()
                self._hear()
                self._finish()
                self._show_progress()
        except BaseException as error:
            assert self.cluster is not None, "it was opened"
            self._failed = self.cluster.explained(error) or error

    def _recruit(self) -> None:
        """Begin as many actors as there is room for, and no more than a generation has parts."""
        assert self.cluster is not None, "it was opened"
        if time.monotonic() - self._recruited < RECRUIT:
            return
        self._recruited = time.monotonic()
        contents: Generations = self.shop.generations
        parts = max(len(contents.parts(g)) for g in ([REFERENCE] if contents.mixed else []) + [0])
        wanted = self.cluster.options.actors or max(1, self.cluster.room())
        taken = {actor.number for actor in self.actors}
        for number in range(min(wanted, parts)):
            if number not in taken:
                self.actors.append(self._begin(number))
        if any(actor.state != "hello" for actor in self.actors):
            self._waited = None
        elif self._waited is None:
            self._waited = time.monotonic()
        elif 0 < self._waited < time.monotonic() - 15:
            self._waited = 0.0
            self.shop.display.say(f"No node of the Ray cluster has had room for an actor yet ({self.cluster.needs()} each).")

    def _begin(self, number: int) -> Actor:
        assert self.cluster is not None, "it was opened"
        keys = {teacher.api_key_env for teacher in self.shop.config.all_teachers.values() if teacher.server is not None}
        environment = {key: os.environ[key] for key in keys if key in os.environ}
        name = f"npd refresh-{number} {self.shop.store.path.name} {uuid.uuid4().hex[:6]}"
        kind = self._kind.options(name=name, **self.cluster.resources())
        handle = kind.remote(number, self.token, environment, self.cluster.gpus)
        wanted = {option: (path, sizes_of(files)) for option, (path, files) in self._carried.items()}
        return Actor(number, handle, handle.hello.options(name=f"refresh-{number} begins").remote(wanted))

    def _hand_out(self) -> None:
        """Give whoever has nothing to do the parts that are wanted first."""
        idle = [actor for actor in self.actors if actor.doing is None]
        if not idle:
            return
        for actor, (generation, part, version) in zip(idle, self._wanted(), strict=False):
            versions = {version} if version >= 0 else set()
            if self._takes_first:
                versions.add(0)
            with suppress(FileNotFoundError):  # a snapshot that was just dropped: nobody wants it now
                snapshots = {v: self._snapshot(v) for v in sorted(versions)}
                earlier = None if actor.begun else self._earlier(generation)
                kept = self.shop.store.policies()
                task = self._messages.Task(generation, part, version, snapshots, kept, earlier)
                whose = "references" if generation == REFERENCE else f"generation {generation}"
                actor.doing = actor.handle.make.options(name=f"{whose}, part {part}").remote(task)
                actor.state, actor.task, actor.snapshots = "make", (generation, part), tuple(versions)

    def _wanted(self) -> Iterator[tuple[int, int, int]]:
        """Missing parts that nobody makes, in the order in which they are taken, and the snapshots that write them."""
        shop = self.shop
        busy = {actor.task for actor in self.actors}
        there = set(shop.store.policies())
        for generation in self._ahead():
            missing = [part for part in shop.books.missing(generation) if (generation, part) not in busy]
            if not missing:
                continue
            version = -1
            if not shop.generations.is_reference(generation):
                begun = shop.books.begun_by(generation)
                version = generation if begun is None else begun
                if version not in there:
                    continue
            elif self._takes_first and 0 not in there:
                continue
            yield from ((generation, part, version) for part in missing)

    def _ahead(self) -> list[int]:
        """Generations that are, or will be, trained on."""
        shop = self.shop
        references = [REFERENCE] if shop.generations.mixed else []
        return [*references, *range(shop.store.current, shop.config.schedule.generations)]

    @property
    def _takes_first(self) -> bool:
        """Is the first snapshot read for every part: as the base of adapters, or as a teacher?"""
        config = self.shop.config
        return config.student.adapts or any(teacher.is_student for teacher in config.given_teachers.values())

    def _snapshot(self, version: int) -> Parcel:
        """A snapshot in the object store; those that no part needs any more go from there."""
        if version not in self._snapshots:
            needed = {0, version, *(v for actor in self.actors if actor.task is not None for v in actor.snapshots)}
            self._snapshots = {v: parcel for v, parcel in self._snapshots.items() if v in needed}
            path = self.shop.store.policy(version)
            self.shop.store.check_model(path)
            self._snapshots[version] = pack(path.name, files_of(path), self.ray.put)
        return self._snapshots[version]

    def _earlier(self, generation: int) -> tuple[int, int, Any] | None:
        """A part with what the teachers said, of this generation or the one before."""
        for g in (generation, generation - 1):
            for part in sorted(self.shop.store.parts(g)):
                with suppress(UserError, FileNotFoundError):
                    return g, part, self.shop.store.read_part(g, part, check=True)
        return None

    # -- what comes back

    def _hear(self) -> None:
        by_reference = {actor.doing: actor for actor in self.actors if actor.doing is not None}
        if not by_reference:
            self._closing.wait(POLL)
            return
        done, _ = self.ray.wait([*by_reference], num_returns=1, timeout=POLL)
        for reference in done:
            actor = by_reference[reference]
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                self._lost(actor, error)
                continue
            actor.doing = None
            if actor.state == "hello":
                self._welcome(actor, answer)
                continue
            self._told(actor, answer)
            if answer.failed is not None:
                raise self._blamed(actor, answer.failed.error(actor.role))
            if actor.state == "make":
                assert actor.task is not None, "a part was asked for"
                generation, part = actor.task
                if part in self.shop.books.missing(generation):
                    self.shop.store.write_part(generation, part, answer.table)
                self._deaths.pop(actor.task, None)
                actor.begun = True
            actor.task = None
            self._stillborn = 0

    def _welcome(self, actor: Actor, hello: Any) -> None:
        """Look at what an actor says of itself, and give it what it lacks."""
        assert self.cluster is not None, "it was opened"
        actor.node, actor.host, actor.process = hello.node, foreign(hello.host, 80), hello.process
        mine, theirs = versions(), hello.versions
        if theirs["npd"] != mine["npd"]:
            raise UserError(
                f"The Ray node {actor.host} has npd {theirs['npd']}, and this is npd {mine['npd']}.",
                f"Install the same version there: {INSTALL} placement.ray.runtime_env can bring it.",
            )
        others = ", ".join(f"{name} {theirs[name]} (here {mine[name]})" for name in mine if theirs.get(name) != mine[name])
        if others:
            self.shop.display.say(f"The Ray node {actor.host} has {others}: its parts may differ from this machine's.")
        shared = trainers_gpus(self.shop.placement.train) & {*hello.gpus} if hello.node == self.cluster.node else set()
        if shared:
            raise UserError(
                f"Ray gives its actors GPU {', '.join(sorted(shared))} of this machine, which trains.",
                "Start Ray here with `ray start --num-gpus 0`, or with CUDA_VISIBLE_DEVICES naming those that do not train.",
            )
        for option in hello.lacks:
            if option not in self._models:
                path, files = self._carried[option]
                name = f"model-{[*self._carried].index(option)}{path.suffix if path.is_file() else ''}"
                self._models[option] = pack(name, files, self.ray.put)
        lacked = {option: self._models[option] for option in hello.lacks}
        paths = {option: path for option, (path, _) in self._carried.items()}
        if self._run is None:
            self._run = pack("run", self._run_files(), self.ray.put)
        plugins = [_plugin(i, name) for i, name in enumerate(self.shop.config.plugins)]
        furnish = actor.handle.furnish.options(name=f"{actor.role} loads tokenizers")
        actor.doing, actor.state = furnish.remote(self._run, lacked, paths, plugins, self._threads()), "furnish"

    def _run_files(self) -> dict[str, Path]:
        files = {name: self.shop.store.path / name for name in ("config.yaml", "prompts.arrow")}
        plugins = {_plugin(i, name): Path(name) for i, name in enumerate(self.shop.config.plugins) if name.endswith(".py")}
        return files | plugins

    def _threads(self) -> Any:
        assert self.cluster is not None, "it was opened"
        mine = max(1, int(self.cluster.cpus))
        placed, options = self.shop.placement, self.shop.config.placement
        rollout = options.rollout_threads or mine
        alone = self.cluster.local and len(self.actors) <= 1  # then the trainer waits for the one that there is
        first = placed.first_threads or mine if alone else rollout
        return self._messages.Threads(rollout, options.teacher_threads or rollout, first)

    def _lost(self, actor: Actor, error: BaseException) -> None:
        """An actor died, or with it what it made: somebody else makes it."""
        assert self.cluster is not None, "it was opened"
        if (explained := self.cluster.explained(error)) is not None:
            raise explained
        with suppress(Exception):
            self.ray.kill(actor.handle)
        self.actors.remove(actor)
        progress_file(self.shop.store.path, actor.number).unlink(missing_ok=True)
        cut_off = isinstance(error, self.ray.exceptions.ActorUnavailableError)  # before Ray knows that its node is dead
        gone = bool(actor.node) and (cut_off or not self.cluster.alive(actor.node))
        why = self.cluster.reason(error)
        most = self.shop.config.checkpoint.restarts
        where = f"{actor.role} on {actor.host or 'a Ray node'}" + (f" (process {actor.process})" if actor.process else "")
        if actor.state == "make":
            assert actor.task is not None, "it was at a part"
            generation, part = actor.task
            self._deaths[actor.task] += NODE if gone else 1
            deaths = self._deaths[actor.task]
            what = f"part {part} of " + ("the references" if generation == REFERENCE else f"generation {generation}")
        else:
            self._stillborn += NODE if gone else 1
            deaths, what = self._stillborn, "nothing yet"
        left = f"The node of {where} left Ray's cluster, or cannot be reached,"
        failed = isinstance(error, self.ray.exceptions.RayTaskError)  # in Python; then the process lives until it is killed
        story = left if gone else f"The actor {where} {'failed' if failed else 'died'}"
        story += f" while it made {what}: {why}" if actor.state == "make" else f" before it made a part: {why}"
        story = story.rstrip(".") + "."
        self.shop.events.mark(SpanName.RESTART, rank=actor.number, code=1)
        if deaths > most:
            if "No module named 'npd" in str(error):
                story = f"A node of the Ray cluster has no npd: {why}."
            story += f" That makes {most + 1} in a row (checkpoint.restarts {most})."
            remedy = f"What was finished is kept: mend what Ray names, and run the same command again. {MEMORY}"
            if actor.state != "make":
                remedy += f" npd has to be installed everywhere: {INSTALL}"
            raise self._blamed(actor, RunError(story, remedy))
        self.shop.display.say(f"{story} It is made again by another one." if actor.state == "make" else story)
        self._recruited = -RECRUIT

    def _told(self, actor: Actor, answer: Any) -> None:
        """Put on record what an actor did and said."""
        path = self.shop.events.path
        if answer.events:
            with explained_disk(path), opened(path) as file:
                file.write(answer.events)
        log = self.shop.store.path / "logs" / LOG.name(actor.number)
        log.parent.mkdir(exist_ok=True)
        with explained_disk(log), opened(log) as file:
            file.write(answer.said)

    def _blamed(self, actor: Actor, error: NpdError) -> NpdError:
        """Put on record that it was this actor that failed, not the trainer which says so."""
        error.role = None
        Events(self.shop.events.path, actor.role).failed(error, process=actor.process)
        error.role = actor.role
        return error

    def _finish(self) -> None:
        """Write the manifests of generations whose parts are all there."""
        shop = self.shop
        if not self._finishing.acquire(blocking=False):  # the trainer does
            return
        try:
            for generation in self._ahead():
                if not shop.store.parts(generation) or shop.books.missing(generation):
                    continue
                if shop.store.manifest(generation) is not None:
                    continue
                try:
                    shop.books.finish(generation)
                except (UserError, FileNotFoundError):  # a damaged part, or one that the trainer has just deleted
                    shop.books.mend(generation)
                    continue
                shop.books.check_some_kept(generation)
        finally:
            self._finishing.release()

    def _show_progress(self) -> None:
        """Keep the files that the live view reads up to date."""
        if time.monotonic() - self._showed < 1:
            return
        self._showed = time.monotonic()
        for actor in self.actors[:SHOWN]:
            file = progress_file(self.shop.store.path, actor.number)
            if actor.asked is not None:
                if not self.ray.wait([actor.asked], timeout=0)[0]:
                    continue
                said = None
                with suppress(self.ray.exceptions.RayError):  # what it was at tells more
                    said = self.ray.get(actor.asked)
                with suppress(OSError):
                    if said is None or actor.task is None:
                        file.unlink(missing_ok=True)
                    else:
                        aside = beside(file)
                        aside.write_text(said, encoding="utf-8")
                        os.replace(aside, file)
            actor.asked = actor.handle.progress.remote() if actor.state == "make" and actor.task is not None else None


def progress_file(run_dir: Path, number: int) -> Path:
    return run_dir / "logs" / PROGRESS.name(number)


def _plugin(i: int, name: str) -> str:
    """A plug-in's name for an actor: of a file, its path in the run's parcel."""
    return f"plugins/{i}/{Path(name).name}" if name.endswith(".py") else name
