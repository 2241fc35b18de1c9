"""The Ray cluster of a run: joined, or started on this machine alone and ended with it, however that ends."""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from npd.config import Config, RayConfig
from npd.errors import RunError, UserError, foreign
from npd.generations.workers import visible_gpus
from npd.placement import Placement

OLDEST = 2, 40
INSTALL = "pip install 'npd[ray]', on every node of the cluster."
MEMORY = (
    "Where memory is short, let a node have fewer actors (placement.ray.actors, or num_cpus or memory of each), or let them "
    "take less (rollout.batch_size, rollout.max_new_tokens, scoring.batch_tokens); Ray ends actors where a node's memory is "
    "used to RAY_memory_usage_threshold (0.95)."
)
WORDS = 700  # characters of Ray's
MARK = "NPD_RAY_CLUSTER"
WIDE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray keeps to the loopback interface, on any system
# Ray's agents outlive a driver that is killed: whoever has the mark of a cluster is ended once the pipe to its driver closes.
KEEPER = f"""
import os, psutil, sys, time
mark = sys.argv[1]
sys.stdin.buffer.read()
def marked(process):
    try:
        return process.pid != os.getpid() and process.environ().get({MARK!r}) == mark
    except psutil.Error:
        return False
for attempt in range(20):
    left = [process for process in psutil.process_iter() if marked(process)]
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            pass
    if not left and attempt:
        break
    time.sleep(0.1)
"""


def imported() -> Any:
    """Ray itself.

    Raises:
        UserError: it is not installed, or too old.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # which the extra npd[ray] alone brings
    except ImportError as error:
        raise UserError(
            f"placement.rollout ray makes generations on a Ray cluster, but Ray can't be imported ({foreign(error)}).",
            INSTALL,
        ) from error
    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        raise UserError(f"Ray is {ray.__version__} here, and npd needs {'.'.join(map(str, OLDEST))} or newer.", INSTALL)
    return ray


@dataclass
class Actor:
    """An actor, as the trainer's process knows it."""

    number: int
    handle: Any
    doing: Any
    """A reference to what it does now; None: nothing."""
    state: str = "hello"
    """hello, furnish or make, which it does now or did last."""
    task: tuple[int, int] | None = None
    """Generation and part."""
    snapshots: tuple[int, ...] = ()
    """Those of its part."""
    begun: bool = False
    """Has it made a part?"""
    node: str = ""
    host: str = ""
    process: int = 0
    asked: Any = None
    """A reference to its progress, asked for and not heard."""

    @property
    def role(self) -> str:
        return f"refresh-{self.number}"


class Needs(NamedTuple):
    """Actors, and what each takes."""

    actors: int | None
    """None: as many as the cluster has room for."""
    cpus: float
    gpus: float | None
    """None: 1 where the cluster has GPUs, else none."""


def needs_of(options: RayConfig, placed: Placement, *, local: bool) -> Needs:
    """What a configuration asks for, as far as it is known without the cluster.

    Args:
        local: is the cluster one of this machine alone, that the run starts?

    Raises:
        UserError: this machine has not what its actors are to have.
    """
    if not local:
        return Needs(options.actors, 1.0 if options.num_cpus is None else options.num_cpus, options.num_gpus)
    free = free_gpus(placed)
    each = options.num_gpus if options.num_gpus is not None else float(bool(free))
    if options.num_gpus is None and not free and torch.cuda.device_count():
        raise UserError(
            "Every GPU of this machine trains, so that actors of a Ray cluster of its own would generate on the CPU.",
            "Set placement.ray.address, or leave placement.rollout auto: they then take turns.",
        )
    if each * (options.actors or 1) > len(free):
        raise UserError(
            f"placement.ray asks for {options.actors or 1} actors of {each:g} GPUs on this machine, and {len(free)} of "
            "its GPUs do not train.",
            "Lower actors or num_gpus, or set placement.ray.address.",
        )
    count = options.actors or (int(len(free) / each) if each else 1)
    cpus = 1.0 if each else float(threads_each(options, placed))
    return Needs(count, cpus if options.num_cpus is None else options.num_cpus, each)


def told(options: RayConfig, needs: Needs) -> str:
    """What a run's actors are and take, for people."""
    where = f"the Ray cluster at {options.address}" if options.address else "a Ray cluster of this machine alone"
    count = (
        "as many actors as there is room for" if needs.actors is None else f"{needs.actors} actor{'s' * (needs.actors > 1)}"
    )
    gpus = "1 GPU where it has GPUs" if needs.gpus is None else f"{needs.gpus:g} GPUs"
    each = [f"{needs.cpus:g} CPUs", gpus, *(f"{number:g} {name}" for name, number in options.resources.items())]
    held = "no memory set aside" if options.memory is None else f"{options.memory / (1 << 30):.2f} GiB of memory set aside"
    return f"made by {count} of {where}, no more than a generation has parts; each takes {', '.join([*each, held])}"


def free_gpus(placed: Placement) -> list[str]:
    """GPUs of this machine that do not train."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count()) if f"cuda:{i}" not in placed.train]


def threads_each(options: RayConfig, placed: Placement) -> int:
    """CPU threads of an actor of this machine."""
    return max(1, (placed.rollout_threads or 1) // (options.actors or 1))


class Cluster:
    """What actors run on.

    Args:
        token: a name for what belongs to this process.

    Raises:
        UserError: there is no such cluster, its version is another one, or this machine lacks what actors are to have.
    """

    def __init__(self, config: Config, placed: Placement, token: str) -> None:
        self.ray = imported()
        self.options: RayConfig = config.placement.ray
        self.joined = bool(self.ray.is_initialized())  # by whoever runs npd inside a job of their own
        self.local = self.options.address is None and not self.joined
        self._keeper: subprocess.Popen[bytes] | None = None
        if not self.joined:
            try:
                with _signals_kept():
                    if self.local:
                        self._start(placed, token)
                    else:
                        self._connect({"address": self.options.address}, token)
            except BaseException:
                self.close()
                raise
        there = self.ray.cluster_resources()
        options = self.options
        self.gpus = options.num_gpus if options.num_gpus is not None else float(there.get("GPU", 0) > 0)
        self.cpus = options.num_cpus if options.num_cpus is not None else 1.0
        if self.local and options.num_cpus is None and not self.gpus:
            self.cpus = float(threads_each(options, placed))
        self.node = self.ray.get_runtime_context().get_node_id()

    def _start(self, placed: Placement, token: str) -> None:
        options = self.options
        free, needs = free_gpus(placed), needs_of(options, placed, local=True)
        count = needs.actors or 1
        cpus = options.num_cpus if options.num_cpus is not None else threads_each(options, placed)
        self._keeper = subprocess.Popen([sys.executable, "-c", KEEPER, token], stdin=subprocess.PIPE, start_new_session=True)
        # SPT_NOENV: processes that give themselves a title keep their environment where the keeper can read it.
        with _environment({MARK: token, "SPT_NOENV": "1"} | private() | visible_gpus(free)):
            arguments = {
                "address": "local",
                "num_cpus": max(1, math.ceil(count * cpus)),
                "num_gpus": len(free),
                "include_dashboard": False,
                "object_store_memory": options.object_store_memory,
            }
            self._connect(arguments, token)
        address = self.ray.util.get_node_ip_address()
        if WIDE not in os.environ and not ipaddress.ip_address(address).is_loopback:
            raise UserError(
                f"Ray {self.ray.__version__} listens on {address} although it was told to keep to this machine.",
                f"Set {WIDE}=1 if it may, or start a cluster with `ray start` and set placement.ray.address to auto.",
            )

    def _connect(self, arguments: dict[str, Any], token: str) -> None:
        reread(self.ray)
        try:
            self.ray.init(**arguments, namespace=f"npd-{token}", log_to_driver=False, logging_level="ERROR")
            with suppress(AttributeError):  # a raylet's log is printed where it dies; npd says itself what that costs
                self.ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
        except (
            Exception
        ) as error:  # of many kinds: no such cluster, another version of Ray or Python, a limit of this machine
            where = f"The Ray cluster at {self.options.address} can't be joined" if not self.local else "Ray can't start here"
            remedy = (
                "See that `ray status` shows the cluster on this machine, which has to be one of its nodes (`ray start "
                "--address HOST:PORT`), with the same versions of Ray and Python."
            )
            raise UserError(
                f"{where} ({type(error).__name__}: {foreign(error)}).", remedy if not self.local else "Mend that."
            ) from error

    # -- room

    def room(self) -> int:
        """Actors that the nodes that are there have room for, if nobody else uses them."""
        needs = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.options.memory or 0} | self.options.resources
        needs = {name: count for name, count in needs.items() if count}
        if not needs:
            return self.options.actors or 1
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) / count + 1e-9) for name, count in needs.items()) for node in nodes)

    def alive(self, node: str) -> bool:
        return any(each["NodeID"] == node and each["Alive"] for each in self.ray.nodes())

    def resources(self) -> dict[str, Any]:
        """Options of an actor."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.options.resources}
        if self.options.memory is not None:
            options["memory"] = self.options.memory
        if self.options.runtime_env:
            options["runtime_env"] = self.options.runtime_env
        return options | {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}

    def needs(self) -> str:
        """What an actor takes, for people."""
        said = [f"{self.cpus:g} CPUs", f"{self.gpus:g} GPUs"]
        said += [f"{self.options.memory:,} bytes"] if self.options.memory else []
        return ", ".join([*said, *(f"{count:g} {name}" for name, count in self.options.resources.items())])

    def explained(self, error: BaseException) -> RunError | None:
        """An error that this machine's or a node's limits caused; None for others."""
        kinds = self.ray.exceptions
        cause = getattr(error, "cause", None) or error
        if not isinstance(cause, kinds.ObjectStoreFullError | kinds.OutOfDiskError):
            return None
        return RunError(
            f"Ray's object store is full, and no more can be spilled to disk ({type(cause).__name__}: {foreign(cause)}).",
            "Give it more (placement.ray.object_store_memory, or `ray start --object-store-memory` and --object-spilling-"
            "directory), free disk space (Ray spills nothing to a disk that is 95% full), or lower rollout.part_size. "
            "What was finished is kept.",
        )

    def reason(self, error: BaseException) -> str:
        """Why an actor was lost, in Ray's words.

        They end with it, after ids or a traceback; but where a node's memory was short, they begin with it.
        """
        lines = str(error).strip().split("\n")
        short = isinstance(error, self.ray.exceptions.OutOfMemoryError)
        return foreign(" ".join(lines[:2]) if short else lines[-1], WORDS)

    def close(self) -> None:
        """Leave; a cluster that was started here ends."""
        if not self.joined:
            with suppress(Exception), _signals_kept():  # whatever is left of it
                self.ray.shutdown()
            reread(self.ray)
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(timeout=5)
            self._keeper = None


def private() -> dict[str, str]:
    """Variables that make a cluster this process's own, as far as the user has not set them.

    Its processes then listen on the loopback interface alone, and (Ray 2.52 and newer) to those who have a token, which no
    file holds.
    """
    wanted = {WIDE: "0", "RAY_AUTH_MODE": "token"}
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def reread(ray: Any) -> None:
    """Have Ray read again what it read of its environment when it was imported, by whoever did."""
    with suppress(AttributeError):  # of a Ray that keeps it elsewhere: who starts a cluster looks where it listens
        constants = ray._private.ray_constants
        constants.ENABLE_RAY_CLUSTER = constants.env_bool(WIDE, sys.platform not in ("darwin", "win32"))
    with suppress(AttributeError):  # before 2.52
        loader = ray._raylet.AuthenticationTokenLoader.instance()
        ray._raylet.Config.initialize("")
        loader.reset_cache()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What processes that begin meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """What Ray does about SIGTERM is not done."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # in another thread, where Ray leaves it alone as well
            signal.signal(signal.SIGTERM, before)


def trainers_gpus(devices: list[str]) -> set[str]:
    """The trainer's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = [int(device.removeprefix("cuda:")) for device in devices if device != "cpu"]
    return {visible[i] if i < len(visible) else str(i) for i in numbers}
