"""What the benchmarks share: the machine, interleaving, peaks of memory, results as JSON."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from npd.config import load_config
from npd.models import Vocabulary
from npd.registry import ENGINES
from npd.rollout import Engine, EngineSetting
from npd.store import write_json
from npd.threads import cores

RESULTS = Path("benchmarks/results")
PACKAGES = ("npd", "torch", "transformers", "accelerate", "pyarrow", "trl")


def machine() -> dict[str, Any]:
    """Processor, memory and versions, as they stand in every result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory_gib": round(float((_first("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "load": os.getloadavg()[0],
    }


def _first(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def record(name: str, options: dict[str, Any], runs: Any) -> Path:
    """Write results/NAME.json; what the table in docs/benchmarks.md is made of."""
    file = RESULTS / f"{name}.json"
    write_json(file, {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "options": options, "runs": runs})
    return file


class Loaded:
    """A model that is loaded here, as weights for an engine.

    Args:
        folder: the same weights as files, for an engine that reads those.
    """

    def __init__(self, model: PreTrainedModel, folder: Path = Path()) -> None:
        self._model, self.folder = model, folder

    def model(self) -> PreTrainedModel:
        return self._model

    def path(self) -> Path:
        return self.folder


def start_engine(
    name: str,
    weights: Loaded,
    vocabulary: Vocabulary,
    pad_id: int,
    *,
    batch_size: int,
    new_tokens: int = 1024,
    longest_prompt: int = 1024,
    **others: Any,
) -> Engine:
    """An engine by its name, with these weights; it answers at most `new_tokens` to at most `longest_prompt` tokens.

    `others`: options of the section rollout.
    """
    rollout = others | {"engine": name, "batch_size": batch_size, "max_new_tokens": new_tokens}
    config = load_config({"run_dir": "", "student": {"model": ""}, "data": {"train": ""}, "rollout": rollout})
    device = str(weights.model().device)
    engine: Engine = ENGINES[name](EngineSetting(config, config.student, vocabulary, pad_id, device, longest_prompt))
    engine.take(weights)
    return engine


class Clock:
    """Seconds by stage of methods that are watched; what runs inside another one counts for the outer alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def watch(self, owner: Any, method: str, stage: str) -> None:
        """Count a method of this object from now on."""
        act = getattr(owner, method)
        self.seconds.setdefault(stage, 0.0)

        @functools.wraps(act)
        def counted(*args: Any, **options: Any) -> Any:
            if self._inside:
                return act(*args, **options)
            self._inside = True
            began = self._now()
            try:
                return act(*args, **options)
            finally:
                self._inside = False
                self.seconds[stage] += self._now() - began

        setattr(owner, method, counted)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def interleaved(contenders: Sequence[str], repeat: int) -> Iterator[tuple[int, str]]:
    """(turn, contender): each turn has all of them, beginning with another one, so that noise hits all alike."""
    for turn in range(repeat):
        first = turn % len(contenders)
        for name in [*contenders[first:], *contenders[:first]]:
            yield turn, name


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fresh(module: str, **options: Any) -> dict[str, Any]:
    """Run `python -m MODULE one --key value ...` in a process of its own; the JSON object of its last line."""
    arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, "-m", module, "one", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def memory(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the highest since `peak` began, RssAnon what no file backs."""
    return int((_first("/proc/self/status", key) or "0 kB").split()[0]) / 1024


def available_gib() -> float:
    return int((_first("/proc/meminfo", "MemAvailable") or "0 kB").split()[0]) / 2**20


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Highest resident memory inside the block above that before it, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    figures: dict[str, float] = {}
    try:
        yield figures
    finally:
        figures["peak_mib"] = memory("VmHWM") - before


def matmul_rate(size: int = 1024, seconds: float = 1.0) -> float:
    """Floating-point operations per second of float32 matrix products, the median over about `seconds`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    rates, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        rates.append(2 * size**3 / timed(lambda: a @ b))
    return statistics.median(rates)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
