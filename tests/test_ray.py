"""Generations by actors of a Ray cluster: the same bytes as in turns, whoever is killed, and nobody left behind."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import config_of
from conftest import HANG, killed_from_outside
from test_workers import ONE_THREAD, assert_same, state_of, three_parts

import npd
from npd.config import PlacementConfig, ScheduleConfig, load_config
from npd.errors import NpdError, RunError, UserError
from npd.generations import ray_cluster
from npd.generations.producer import producer_kind
from npd.generations.ray_cluster import MARK, imported, trainers_gpus
from npd.generations.ray_parcels import CHUNK, carried, files_of, pack, sizes_of, sweep, unpack
from npd.generations.ray_producer import Ray
from npd.observe.display import Display
from npd.observe.events import SpanName, read_events
from npd.placement import assign_devices

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


# -- clusters


def marked() -> list[str]:
    """Processes of clusters that npd started, by what their command is."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if f"{MARK}=".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


def left(seconds: float = 20.0) -> list[str]:
    """Those that are still there after some time."""
    deadline = time.monotonic() + seconds
    while marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    return marked()


@pytest.fixture(scope="module")
def base(tmp_path_factory, teacher_dir, student_dir) -> Tree:
    """A run of a second: three generations of three parts."""
    return three_parts(tmp_path_factory.mktemp("ray") / "data.jsonl", student_dir, teacher_dir, lead=0.0)


@pytest.fixture
def make(base, tmp_path) -> Callable[..., Tree]:
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


class Nodes:
    """A cluster of this machine: a head that takes no actors, and nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=STORE))

    def kill(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    @property
    def options(self) -> Tree:
        return {"address": self.cluster.address, "resources": {"rollout": 1}}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(npd.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        imported()
        found = Nodes()
        found.add()
        yield found
        found.cluster.shutdown()


@needs_ray
def test_nodes_and_actors_that_come_and_go(make, nodes, in_turns, monkeypatch, capsys):
    """At some moment a node joins, one is killed at work, and later an actor is: each costs the part that it was at."""
    handed = 0
    killed = False
    real = Ray._hand_out

    def hand_out(self: Ray) -> None:
        nonlocal handed, killed
        before = {actor.task for actor in self.actors}
        real(self)
        busy = [actor for actor in self.actors if actor.task is not None and actor.task not in before]
        for _ in busy:
            handed += 1
            if handed == 1:
                wanted.append("a node")
            if handed == 2:
                nodes.kill()
        if busy and self._deaths and not killed:  # the node's loss is known: these actors live
            killed = True
            os.kill(busy[0].process, signal.SIGKILL)

    def check(self: Ray) -> None:  # in the main thread, which alone can begin nodes
        while wanted:
            wanted.pop()
            nodes.add()
        checked(self)

    wanted: list[str] = []
    checked = Ray.check
    monkeypatch.setattr(Ray, "check", check)
    monkeypatch.setattr(Ray, "_hand_out", hand_out)
    tree = make(ray=nodes.options)
    npd.distill(tree, display=Display())
    said = capsys.readouterr().out
    assert killed
    assert said.count("while it made part") >= 2, said  # which of both a socket that is closed means, Ray may not know yet
    assert_same(state_of(tree["run_dir"]), in_turns)
    events = list(read_events(Path(tree["run_dir"]) / "events.jsonl"))
    assert len([e for e in events if e.name == SpanName.RESTART]) >= 2
    assert {e.role for e in events if e.name == SpanName.GENERATE} <= {"refresh-0", "refresh-1"}
    stored = [(e.facts["generation"], e.facts["part"]) for e in events if e.name == SpanName.STORE]
    assert sorted(stored) == [(g, part) for g in range(3) for part in range(3)]


@needs_ray
def test_an_object_store_that_is_too_small_spills(nodes, tmp_path):
    """A parcel of three times what a node's store takes arrives whole."""
    import ray

    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "big").write_bytes(random.Random(0).randbytes(1 << 20) * (3 * STORE >> 20))
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        parcel = pack("big", files_of(tmp_path / "big"), ray.put)
        carry = ray.remote(num_cpus=1)(lambda: unpack(parcel, folder, ray.get).stat().st_size)
        assert ray.get(carry.remote(), timeout=HANG) == 3 * STORE
    finally:
        ray.shutdown()
    assert (folder / "big").read_bytes() == (tmp_path / "big").read_bytes()


PLUGIN = """
import os
import npd.rollout.transformers as t
from npd.errors import UserError
from npd.registry import ENGINES

class Fails(t.TransformersEngine):
    def stream(self, requests, sampling, progress=None):
        def looked():
            for request in requests:
                if request.number == 1:
                    if self.setting.config.rollout.options["how"] == "die":
                        os._exit(9)
                    raise UserError("Its prompts are wrong.", "Mend them.")
                yield request
        return super().stream(looked(), sampling, progress)

ENGINES.register("fails", Fails)
"""


@needs_ray
@pytest.mark.parametrize("how", ["die", "say"])
def test_a_part_that_fails_ends_the_run(make, nodes, tmp_path, how):
    """The plug-in goes to the actor as well. One that dies is named with its part; what npd says of itself comes through."""
    plugin = tmp_path / "fails.py"
    plugin.write_text(PLUGIN)
    rollout = {"engine": "fails", "options": {"how": how}, "check_samples": 0}
    tree = make(ray=nodes.options, rollout=rollout, plugins=[str(plugin)], checkpoint={"restarts": 0})
    with pytest.raises(NpdError) as caught:
        npd.distill(tree)
    assert caught.value.role == "refresh-0"
    assert "\n" not in str(caught.value)
    assert (Path(tree["run_dir"]) / "generations" / "g000" / "part-00000.parquet").exists()
    if how == "say":
        assert isinstance(caught.value, UserError)
        assert str(caught.value) == "Its prompts are wrong. Mend them."
    else:
        assert isinstance(caught.value, RunError)
        assert "died while it made part 1 of generation 0" in caught.value.what
        assert "OOM" in caught.value.what  # Ray's reason


@needs_ray
def test_a_driver_that_is_stopped_or_killed_leaves_nobody(make, in_turns, tmp_path):
    """With a cluster of its own: stopped by Ctrl-C, then killed, then run to its end."""
    tree = make(ray={"actors": 1, "object_store_memory": STORE})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    run_dir = Path(tree["run_dir"])
    command = [sys.executable, "-m", "npd", "distill", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + HANG
    while not (run_dir / "generations" / "g000").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes hear it as well
    said = process.communicate(timeout=HANG)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert marked() == []
    killed_from_outside("distill", str(file), once=run_dir / "generations" / "g001" / "part-00000.parquet", before_step=12)
    assert left() == []
    npd.distill(tree)
    assert left(5) == []
    assert_same(state_of(run_dir), in_turns)


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


def test_the_example():
    config = load_config(Path(__file__).parent.parent / "examples" / "ray.yaml")
    assert (config.placement.rollout, config.placement.ray.address) == ("ray", "auto")
