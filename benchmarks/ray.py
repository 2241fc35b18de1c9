"""Time and memory of a refresh by actors of a Ray cluster, against turns and a worker; interleaved, one thread each.

    python -m benchmarks.ray               # two minutes on two cores that nobody else uses

Contenders make the same generations of the same run: in turns, by one worker, by Ray on one node and on two (of this
machine: a head that takes no actors, and a node for each core). A refresh is timed from its snapshot's being whole to
its last part's being written; memory is the peak of what the processes of a run hold together (PSS), and of that what
Ray's own hold. The simulation of docs/cluster.md is given the parts' durations on one node, and says what two would
take.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import record
from benchmarks.simulation import replay
from npd.config import load_config
from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer
from npd.generations.ray_cluster import imported
from npd.observe.events import SpanName, read_events
from npd.store.files import append_line

CONTENDERS = ("turns", "worker", "ray, 1 node", "ray, 2 nodes")
RAYS_OWN = (
    "raylet",
    "gcs_server",
    "ray::IDLE",
    "ray::Dashboard",
    "ray::RuntimeEnv",
    "dashboard",
    "log_monitor",
    "monitor.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--part-size", type=int, default=12)
    options = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="npd-bench-"))
    try:
        tree = _tree(out, options)
        runs: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(options.repeat):
            order = CONTENDERS[turn % 4 :] + CONTENDERS[: turn % 4]
            for name in order:
                runs[name].append(_measured(out / f"{turn}-{CONTENDERS.index(name)}", name, tree))
                print(name, {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
        found: dict[str, Any] = {
            name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
        }
        for name in CONTENDERS:
            found[name]["refreshes"] = [run["refresh_seconds"] for run in runs[name]]
        one = out / "0-2"
        measured = replay(one, load_config(one / "config.yaml"))
        found["simulated"] = {"one_node": measured.predict(), "two_nodes": measured.predict(2)}
        found["run"] = {name: [run["run_seconds"] for run in runs[name]] for name in CONTENDERS}
        record("ray", vars(options), found)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _tree(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    for name, layers in (("student", 4), ("teacher", 8)):
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(out / name)
        build_tokenizer().save_pretrained(out / name)
    for problem in make_problems(options.prompts, seed=0):
        append_line(out / "data.jsonl", {"prompt": problem.prompt})
    return {
        "student": {"model": str(out / "student")},
        "teacher": {"model": str(out / "teacher")},
        "data": {"train": str(out / "data.jsonl"), "max_prompt_tokens": 32},
        "schedule": {"generations": 3, "passes": 1, "lead": 0.0},
        "rollout": {"max_new_tokens": 64, "part_size": options.part_size, "batch_size": options.part_size},
        "scoring": {"top_k": 8},
        "selection": {"rule": "none"},
        "packing": {"length": 128},
        "training": {"batch_tokens": 2048},
        "tracking": {"trackers": [], "report": False},
    }


def _measured(run_dir: Path, name: str, tree: dict[str, Any]) -> dict[str, float]:
    """One run in processes of its own."""
    placement: dict[str, Any] = {"train_threads": 1, "rollout_threads": 1, "teacher_threads": 1}
    cluster = None
    if name.startswith("ray"):
        placement |= {"rollout": "ray", "ray": {"actors": 1}}
    if name == "ray, 2 nodes":
        imported()
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        placement["ray"] = {"address": cluster.address}
    if name == "worker":  # a lead lets it work beside the trainer; so short, it changes no step
        tree = tree | {"schedule": tree["schedule"] | {"lead": 1e-9}}
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree | {"run_dir": str(run_dir), "placement": placement}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "npd", "distill", str(file)], env=environment, stdout=subprocess.DEVNULL
    )
    peak = _Peak()
    peak.start()
    status = process.wait()
    seconds = time.monotonic() - began
    peak.ended.set()
    peak.join()
    if cluster is not None:
        cluster.shutdown()
    if status:
        raise SystemExit(f"{name} failed with status {status}")
    return {
        "refresh_seconds": _refresh(run_dir),
        "run_seconds": seconds,
        "peak_bytes": peak.most,
        "peak_of_ray_bytes": peak.rays,
    }


def _refresh(run_dir: Path) -> float:
    """From a snapshot to the last part that it wrote; the mean of the later generations."""
    events = list(read_events(run_dir / "events.jsonl"))
    whole = {e.facts["version"]: e.end for e in events if e.name == SpanName.WRITE}
    stored: defaultdict[int, float] = defaultdict(float)
    for event in events:
        if event.name == SpanName.STORE:
            stored[event.facts["generation"]] = max(stored[event.facts["generation"]], event.end)
    return statistics.mean(stored[g] - whole[g] for g in stored if g)


class _Peak(threading.Thread):
    """The most that this process's descendants hold together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.most = self.rays = 0.0

    def run(self) -> None:
        while not self.ended.wait(0.4):
            total = rays = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    size, command = process.memory_full_info().pss, " ".join(process.cmdline()[:4])
                except psutil.Error:
                    continue
                total += size
                rays += size * any(word in command for word in RAYS_OWN)
            self.most, self.rays = max(self.most, total), max(self.rays, rays)


if __name__ == "__main__":
    main()
