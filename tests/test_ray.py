"""Generations by actors of a Ray cluster: the same bytes as in turns, whoever is killed, and nobody left behind."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from bench import config_of
from conftest import HANG, save_model, write_jsonl
from fake_ray import FakeRay, OutOfMemoryError, RayError
from fake_server import serving
from rich.console import Console
from test_adapters import save_adapter
from test_workers import ONE_THREAD, assert_same, state_of, three_parts

import npd
from npd.config import PlacementConfig, ScheduleConfig, load_config
from npd.demo.task import make_problems
from npd.errors import NpdError, RunError, UserError
from npd.generations import ray_cluster, ray_producer
from npd.generations.producer import producer_kind
from npd.generations.ray_cluster import MARK, WIDE, imported, reread, trainers_gpus
from npd.generations.ray_parcels import CHUNK, carried, files_of, pack, sizes_of, sweep, unpack
from npd.generations.ray_producer import Ray
from npd.observe.display import Display
from npd.observe.events import SpanName, read_events
from npd.placement import assign_devices
from npd.train.trainer import Trainer

Tree = dict[str, Any]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'npd[ray]'")
STORE = 80 << 20  # bytes of a node's object store: the least that Ray allows

# -- what needs no cluster


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"address": "ray://head:10001"}, "HOST:PORT or auto"),
        ({"address": "head"}, "HOST:PORT or auto"),
        ({"address": "auto", "object_store_memory": 1 << 30}, "ray start --object-store-memory"),
        ({"resources": {"rollout": 1}}, "address names none"),
        ({"address": "auto", "resources": {"GPU": 1}}, "num_gpus"),
        ({"address": "auto", "resources": {"rollout": 1.5}}, "fraction"),
        ({"num_gpus": 1.5}, "fraction"),
    ],
)
def test_options_that_do_not_go_together(options, wrong):
    with pytest.raises(UserError, match=wrong):
        config_of(placement={"rollout": "ray", "ray": options})


def test_placement_that_names_ray():
    there = {"rollout": "ray", "ray": {"address": "auto"}}
    placed = assign_devices(PlacementConfig.model_validate(there), ScheduleConfig(lead=1), gpus=0, cpus=4)
    assert producer_kind(placed) is Ray
    assert (placed.train_threads, placed.workers, placed.turns, placed.lead) == (None, [], False, 1)
    here = assign_devices(PlacementConfig(rollout="ray"), ScheduleConfig(lead=1), gpus=0, cpus=4)
    assert (here.train_threads, here.rollout_threads) == (2, 2)  # it shares this machine's cores
    with pytest.raises(UserError, match=r"set placement\.rollout: ray"):
        assign_devices(PlacementConfig(rollout=["ray", "external"]), ScheduleConfig(), gpus=0, cpus=4)


def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'npd\\[ray\\]'"):
        Ray.check_config(config_of(placement={"rollout": "ray"}))


def test_gpus_of_the_trainer(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert trainers_gpus(["cpu"]) == set()
    assert trainers_gpus(["cuda:0", "cuda:2"]) == {"0", "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert trainers_gpus(["cuda:0", "cuda:2"]) == {"4", "6"}


def test_parcels_hold_every_byte(tmp_path):
    rng = random.Random(0)
    source, objects = tmp_path / "source", []
    for name, size in (("config.json", 10), ("deep/empty", 0), ("deep/weights.safetensors", 2 * CHUNK + 7)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(rng.randbytes(size))

    def put(data: bytes) -> int:
        objects.append(data)
        return len(objects) - 1

    parcel = pack("v000001", files_of(source), put)
    assert max(map(len, objects)) == CHUNK
    (tmp_path / ".v000001.tmp").mkdir()  # of one that was killed
    (tmp_path / ".v000001.tmp" / "half").write_text("")
    there = unpack(parcel, tmp_path, objects.__getitem__)
    assert {n: f.read_bytes() for n, f in files_of(there).items()} == {n: f.read_bytes() for n, f in files_of(source).items()}
    assert unpack(parcel, tmp_path, lambda _: pytest.fail("it is there")) == there
    alone = unpack(pack("m.gguf", files_of(source / "config.json"), put), tmp_path, objects.__getitem__)
    assert alone.read_bytes() == (source / "config.json").read_bytes()


def test_which_files_are_carried(tmp_path, student_dir, teacher_dir):
    """Of a student that snapshots hold whole, no weights; of what adapters lie on, all."""
    teachers = {"a.b": {"model": str(teacher_dir)}, "c": {"server": "http://x", "model": "m", "tokenizer": str(student_dir)}}
    options: Tree = {"student": {"model": str(student_dir)}, "teacher": {"model": "owner/name"}, "teachers": teachers}
    found = carried(config_of(tmp_path, **options))
    assert found.keys() == {("student", "model"), ("teachers", "a.b", "model"), ("teachers", "c", "tokenizer")}
    path, files = found["student", "model"]
    assert path == student_dir
    assert "tokenizer.json" in files
    assert "model.safetensors" not in files
    assert "model.safetensors" in found["teachers", "a.b", "model"][1]
    assert sizes_of(files)["config.json"] == (student_dir / "config.json").stat().st_size
    options["student"]["lora"] = {"r": 2}
    assert "model.safetensors" in carried(config_of(tmp_path, **options))["student", "model"][1]


def test_folders_of_the_dead_are_swept(tmp_path):
    import fcntl

    dead, living = tmp_path / "dead", tmp_path / "living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "v000001").write_text("")
    with (living / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        sweep([dead, living])
    assert not dead.exists()
    assert (living / "v000001").exists()


# -- without a cluster: actors in this process


@pytest.fixture(scope="module")
def base(tmp_path_factory, teacher_dir, student_dir) -> Tree:
    """A run of a second: three generations of three parts."""
    return three_parts(tmp_path_factory.mktemp("ray") / "data.jsonl", student_dir, teacher_dir, lead=0.0)


def marked() -> dict[int, str]:
    """Processes of clusters that npd started, with what their command is."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if f"{MARK}=".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        except OSError:
            continue
    return found


def left() -> dict[int, str]:
    """Those that stay."""
    deadline = time.monotonic() + HANG
    while marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    return marked()


def begin(tree: Tree, log: Path) -> None:
    """A run in a process of its own, a fork of this one, that waits for ever before its second generation's first step."""
    os.setsid()
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    parent, real = os.getppid(), Trainer.step

    def step(self: Trainer, *arguments: Any) -> Any:
        while arguments[3] == 5:
            if os.getppid() != parent:
                os._exit(1)
            time.sleep(0.1)
        return real(self, *arguments)

    setattr(Trainer, "step", step)  # noqa: B010
    npd.distill(tree)


@pytest.fixture(scope="module")
def driver(base, tmp_path_factory) -> Iterator[tuple[BaseProcess, Tree, Path]]:
    """A run with a cluster of its own that is to be killed. It goes on beside other tests, and begins before this process,
    which it is a fork of, has one."""
    folder = tmp_path_factory.mktemp("driver")
    ray = {"actors": 1, "object_store_memory": STORE}
    tree = base | {"run_dir": str(folder / "run"), "placement": ONE_THREAD | {"rollout": "ray", "ray": ray}}
    process = multiprocessing.get_context("fork").Process(target=begin, args=(tree, folder / "log"), daemon=True)
    process.start()
    yield process, tree, folder / "log"
    process.kill()


@pytest.fixture(scope="module")
def killed(driver) -> Tree:
    """A run whose process was killed, with a cluster of its own, while its second generation was made."""
    process, tree, log = driver
    deadline = time.monotonic() + HANG
    while not (Path(tree["run_dir"]) / "generations/g001/part-00000.parquet").exists() and time.monotonic() < deadline:
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert left() == {}
    return tree


@pytest.fixture
def make(base, driver, tmp_path) -> Callable[..., Tree]:
    def make(name: str = "run", ray: Tree | None = None, **sections: Any) -> Tree:
        placement = ONE_THREAD | ({} if ray is None else {"rollout": "ray", "ray": ray})
        changed = {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in sections.items()}
        return base | {"run_dir": str(tmp_path / name), "placement": placement} | changed

    return make


@pytest.fixture(scope="module")
def in_turns(base, tmp_path_factory) -> dict[str, Any]:
    """The undisturbed run."""
    run_dir = tmp_path_factory.mktemp("turns") / "run"
    npd.distill(base | {"run_dir": str(run_dir)})
    return state_of(run_dir)


@pytest.fixture
def fake(monkeypatch) -> Callable[..., FakeRay]:
    def fake(*arguments: Any) -> FakeRay:
        ray = FakeRay(*arguments)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    monkeypatch.setattr(ray_producer, "RECRUIT", 0.0)
    return fake


PLUGIN = """
import npd.rollout.transformers as t
from npd.errors import UserError
from npd.registry import ENGINES

class Fails(t.TransformersEngine):
    def stream(self, requests, sampling, progress=None):
        def looked():
            for request in requests:
                if request.number == 1:
                    kind = {"say": UserError, "raise": RuntimeError}[self.setting.config.rollout.options["how"]]
                    raise kind("Its prompts are wrong.", "Mend them.")
                yield request
        return super().stream(looked(), sampling, progress)

ENGINES.register("fails", Fails)
"""


@pytest.mark.parametrize("how", ["say", "raise"])
def test_a_part_that_fails_ends_the_run(make, fake, tmp_path, capsys, how):
    """The plug-in goes to the actor as well. What npd says of itself comes through; what else is raised is tried again."""
    ray = fake()
    plugin = tmp_path / "fails.py"
    plugin.write_text(PLUGIN)
    rollout = {"engine": "fails", "options": {"how": how}, "check_samples": 0}
    tree = make(ray={"actors": 1}, rollout=rollout, plugins=[str(plugin)], checkpoint={"restarts": 2})
    with pytest.raises(NpdError) as caught:
        npd.distill(tree, display=Display())
    assert caught.value.role == "refresh-0"
    assert (Path(tree["run_dir"]) / "generations" / "g000" / "part-00000.parquet").exists()
    if how == "say":
        assert isinstance(caught.value, UserError)
        assert str(caught.value) == "Its prompts are wrong. Mend them."
        assert ray.begun == 1
    else:
        assert isinstance(caught.value, RunError)
        assert "failed while it made part 1 of generation 0: RuntimeError: (" in caught.value.what
        assert caught.value.what.endswith("That makes 3 in a row (checkpoint.restarts 2).")
        assert capsys.readouterr().out.count("It is made again by another one.") == 2
        assert ray.begun == 3


# As Ray 2.60 and 2.40 said it of actors that its memory monitor ended.
OUT_OF_MEMORY = [
    """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: dc1508) was \
5.51GB used / 23.54GB limit (0.233854)
OOM kill reason: Memory usage 5836771328B exceeded threshold of 5586106880B (22.1% of 25276502016B limit)
Object store memory usage: [- objects spillable: 9
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
11142\t3.51\tray::Refresher
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io. Set max_restarts and \
max_task_retries to enable retry when the task crashes due to OOM.""",
    """Task was killed due to the node running low on memory.
Memory on the node (IP: 127.0.0.1, ID: 0df1a5) where the task (actor ID: 25015a, name=npd refresh-0:A.__init__, pid=31156, \
memory used=2.16GB) was running was 5.51GB / 23.54GB (0.156508), which exceeds the memory usage threshold of 0.156. Ray \
killed this worker (ID: 09bdb0) because it was the most recently scheduled task; to see more information about memory \
usage on this node, use `ray logs raylet.out -ip 127.0.0.1`.  Top 10 memory users:
PID\tMEM(GB)\tCOMMAND
31156\t2.16\tray::A.eat
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io. Set max_restarts and \
max_task_retries to enable retry when the task crashes due to OOM.""",
]


def test_a_part_that_takes_too_much_memory_is_given_up(make, fake, capsys):
    """However often other parts are finished meanwhile; what is said names the memory and what to turn."""
    deaths = [OutOfMemoryError(said) for said in OUT_OF_MEMORY]

    def fails(method: str, task: Any) -> RayError | None:
        return deaths.pop(0) if method == "make" and (task.generation, task.part) == (1, 1) else None

    ray = fake(fails)
    tree = make(ray={"actors": 2}, checkpoint={"restarts": len(deaths) - 1})
    with pytest.raises(RunError) as caught:
        npd.distill(tree, display=Display(Console(width=10_000)))
    assert deaths == []
    assert ray.begun == 2 + len(OUT_OF_MEMORY) - 1
    (again,) = [line for line in capsys.readouterr().out.splitlines() if "It is made again by another one." in line]
    for said in (again, caught.value.what):
        assert "died while it made part 1 of generation 1: " in said
        assert "node running low on memory" in said
        assert "5.51GB" in said
        assert "max_restarts" not in said
        assert said.isprintable()
    for option in ("placement.ray.actors", "rollout.batch_size", "RAY_memory_usage_threshold"):
        assert option in caught.value.remedy


def test_what_actors_make_is_what_turns_make(make, fake, tmp_path, monkeypatch, teacher_dir):
    """With a served teacher that asks for a key, an adapter that is gone on with, and references."""
    base_dir = save_model(tmp_path / "base", seed=2, tied=False)
    rows = [{"prompt": p.prompt, "completion": p.completion[:6]} for p in make_problems(6, seed=7)]
    monkeypatch.setenv("TEACHER_KEY", "sekrit")
    with serving(teacher_dir, key="sekrit") as server:
        options: Tree = {
            "student": {"model": str(base_dir), "adapter": str(save_adapter(tmp_path / "adapter", base_dir))},
            "teacher": {"server": server.url, "model": "big", "tokenizer": str(teacher_dir), "api_key_env": "TEACHER_KEY"},
            "data": {"train": str(write_jsonl(tmp_path / "data.jsonl", rows)), "max_prompt_tokens": 32},
            "schedule": {"generations": 2, "passes": 1, "references": 0.4},
            "packing": {"length": 64},
        }
        npd.distill(make("turns", **options))
        fake()
        npd.distill(make("ray", ray={"actors": 2}, **options))
    states = [state_of(tmp_path / name) for name in ("ray", "turns")]
    for name, state in zip(("ray", "turns"), states, strict=True):
        references = [*(tmp_path / name / "generations" / "references").glob("*")]
        assert len(references) == 4
        state |= {file.name: file.read_bytes() for file in references}
    assert_same(*states)


def test_limits_of_ray_are_explained():
    class Full(Exception):
        pass

    class Other(Exception):
        pass

    class Wrapped(Exception):
        cause = Full("no room")

    cluster = ray_cluster.Cluster.__new__(ray_cluster.Cluster)
    kinds = type("Kinds", (), {"ObjectStoreFullError": Full, "OutOfDiskError": Full})
    cluster.ray = type("Module", (), {"exceptions": kinds})
    assert cluster.explained(Other()) is None
    for error in (Full("no room"), Wrapped()):
        explained = cluster.explained(error)
        assert isinstance(explained, RunError)
        assert "no room" in explained.what
        assert "object_store_memory" in explained.remedy


# -- clusters


class Nodes:
    """A cluster of this machine: a head, and nodes that come and go, each with room for an actor."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = self.each | {"include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    each: ClassVar[Tree] = {"num_cpus": 1, "resources": {"rollout": 1}, "object_store_memory": STORE}

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(**self.each))

    def kill(self, actors: dict[str, int] | None = None) -> None:
        """Kill a node, at once with the actor's process that is there, where processes by their nodes' ids are known."""
        node = self.nodes.pop(0)
        self.cluster.remove_node(node, allow_graceful=False)
        if actors is not None:
            os.kill(actors.pop(node.node_id), signal.SIGKILL)

    @property
    def options(self) -> Tree:
        return {"address": self.cluster.address, "resources": {"rollout": 1}}


@pytest.fixture(scope="module")
def nodes(driver) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(npd.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(WIDE, "0")
        patch.setenv("RAY_local_fs_capacity_threshold", "1")  # nothing spills to a disk fuller than that, 0.95 otherwise
        reread(imported())
        found = Nodes()
        found.add()
        yield found
        found.cluster.shutdown()


@pytest.mark.slow
@needs_ray
def test_nodes_and_actors_that_come_and_go(killed, nodes, in_turns, tmp_path, monkeypatch, capsys):
    """Where two actors are at work, the node of one is killed, and the process of the other one; a node joins later.

    The run is one whose driver was killed before.
    """
    at_work: dict[str, int] = {}
    real, checked = Ray._hand_out, Ray.check

    def hand_out(self: Ray) -> None:
        idle = [actor for actor in self.actors if actor.doing is None]
        if not at_work and len(idle) < 2 <= len([*self._wanted()]):  # the other one is still beginning
            return
        real(self)
        busy = {actor.node: actor.process for actor in self.actors if actor.task is not None}
        if len(busy) == 2 and not at_work:
            at_work.update(busy)
            nodes.kill(busy)
            (other,) = busy.values()
            os.kill(other, signal.SIGKILL)

    def check(self: Ray) -> None:  # in the main thread, which alone can begin nodes
        if at_work and not nodes.nodes:
            nodes.add()
        checked(self)

    monkeypatch.setattr(Ray, "check", check)
    monkeypatch.setattr(Ray, "_hand_out", hand_out)
    run_dir = tmp_path / "run"
    shutil.copytree(killed["run_dir"], run_dir)
    placement = ONE_THREAD | {"rollout": "ray", "ray": nodes.options}
    npd.distill(killed | {"run_dir": str(run_dir), "placement": placement}, display=Display())
    said = capsys.readouterr().out
    assert said.count("while it made part") == 2, said  # which of both a socket that is closed means, Ray may not know yet
    assert_same(state_of(run_dir), in_turns)
    events = list(read_events(run_dir / "events.jsonl"))
    early = said.count("before it made a part")  # an actor that Ray began on the node before it knew that it was dead
    assert len([e for e in events if e.name == SpanName.RESTART]) == 2 + early, said
    # Two at a time; three while Ray does not know yet that a node is dead.
    assert {e.role for e in events if e.name == SpanName.GENERATE} <= {"refresh-0", "refresh-1", "refresh-2"}
    stored = [(e.facts["generation"], e.facts["part"]) for e in events if e.name == SpanName.STORE]
    assert {*stored} == {(g, part) for g in range(3) for part in range(3)}


@pytest.mark.slow
@needs_ray
def test_an_object_store_that_is_too_small_spills(nodes, tmp_path):
    """A parcel of twice what a node's store takes arrives whole."""
    import ray

    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "big").write_bytes(random.Random(0).randbytes(1 << 20) * (2 * STORE >> 20))
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        parcel = pack("big", files_of(tmp_path / "big"), ray.put)
        carry = ray.remote(num_cpus=1)(lambda: unpack(parcel, folder, ray.get).stat().st_size)
        assert ray.get(carry.remote(), timeout=HANG) == 2 * STORE
    finally:
        ray.shutdown()
    assert (folder / "big").read_bytes() == (tmp_path / "big").read_bytes()


def answers(port: int) -> set[str]:
    """How Ray's services at a port of this machine answer to who has no token."""
    import grpc

    calls = ["NodeInfoGcsService/CheckAlive", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull"]
    calls += ["CoreWorkerService/GetCoreWorkerStats"]
    found = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in calls:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=HANG)
                found.add("OK")
            except grpc.RpcError as error:
                found.add(error.code().name)
    return found - {"UNIMPLEMENTED"}


def listening_of(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses and ports that processes listen on."""
    found = set()
    for pid in pids:
        with suppress(psutil.Error):  # some come and go
            for connection in psutil.Process(pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_its_own_is_nobody_elses(killed, in_turns, tmp_path, monkeypatch, capfd):
    """It listens on the loopback interface, refuses whoever has no token, and is gone after Ctrl-C."""
    listening: set[tuple[str, int]] = set()
    answered: dict[int, set[str]] = {}
    real = Ray._hear

    def hear(self: Ray) -> None:
        real(self)
        listening.update(listening_of({os.getpid(), *marked()}))
        answered.update({port: answers(port) for _, port in listening if port not in answered})
        if sum(codes != {"UNAVAILABLE"} for codes in answered.values()) >= 5:  # driver, GCS, two of a raylet, a worker
            for pid in marked():  # as a terminal does
                os.kill(pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            self._closing.wait()

    shutil.copytree(killed["run_dir"], tmp_path / "run")
    tree = killed | {"run_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(Ray, "_hear", hear)
        patch.setenv("HOME", str(tmp_path))
        patch.delenv(WIDE, raising=False)
        before = {*os.environ}
        with pytest.raises(KeyboardInterrupt):
            npd.distill(tree)
        assert not {name for name in {*os.environ} - before if name == WIDE or name.startswith("RAY_AUTH")}
    assert marked() == {}
    assert {address.removeprefix("::ffff:") for address, _ in listening} == {"127.0.0.1"}
    assert all(codes <= {"UNAUTHENTICATED", "UNAVAILABLE"} for codes in answered.values())  # the latter: it speaks HTTP
    assert not (tmp_path / ".ray").exists()
    npd.distill(tree | {"placement": ONE_THREAD})
    assert_same(state_of(tmp_path / "run"), in_turns)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_example():
    config = load_config(Path(__file__).parent.parent / "examples" / "ray.yaml")
    assert (config.placement.rollout, config.placement.ray.address) == ("ray", "auto")
