"""Tiny models and runs that every test can afford."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Tests are of this processor and of nothing that lies elsewhere, whatever the machine. Libraries read these when imported.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import npd.placement
from npd import models, registry
from npd.config import load_config
from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer
from npd.models import Vocabulary
from npd.rollout import EngineSetting
from npd.rollout.transformers import TransformersEngine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

HANG = 600.0  # seconds after which what is waited for is taken to hang: no machine is that busy

# Machines are shared: time is no property of the code. What a property's examples are is no matter of chance either; to look
# for new ones, `pytest --hypothesis-profile=explore`.
TIMELESS = [HealthCheck.too_slow]
settings.register_profile("npd", deadline=None, suppress_health_check=TIMELESS, derandomize=True)
settings.register_profile("explore", deadline=None, suppress_health_check=TIMELESS, max_examples=1000)
settings.load_profile("npd")
torch.set_num_threads(1)  # models this small lose time to a second thread

# What the shell, the terminal or a launcher says is for its own programs.
for name in list(os.environ):
    if name.startswith(("ACCELERATE_", "FSDP_", "WANDB_")) or name in (
        *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPD_TEACHER_API_KEY"),
    ):
        del os.environ[name]
os.environ["TERM"] = "xterm-256color"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NPD_TEST_ORDER=reversed, or any other word to shuffle by: finds tests that lean on those before them."""
    order = os.environ.get("NPD_TEST_ORDER", "")
    if order == "reversed":
        items.reverse()
    elif order:
        random.Random(order).shuffle(items)


@pytest.fixture(scope="session", autouse=True)
def two_cores() -> Iterator[None]:
    """Training and generation share two cores, whatever the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npd.placement, "cores", lambda: 2)
        yield


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """What a process keeps between runs is for each test as for the first one."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    torch.set_num_threads(1)
    models.use_device(None)
    loaded = set(sys.modules)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kinds = [(kind, dict(kind._homes)) for kind in vars(registry).values() if isinstance(kind, registry.Registry)]
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for kind, homes in kinds:
        kind._homes = homes
    for name in set(sys.modules) - loaded:
        if name.startswith("npd_plugin_"):
            del sys.modules[name]


@contextmanager
def own_port() -> Iterator[int]:
    """A port of 127.0.0.1 that only servers with SO_REUSEPORT of this user can listen on; it refuses until one does."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def save_model(
    path: Path,
    *,
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    vocabulary: int = 20,
    tied: bool = True,
    head_dim: int | None = None,
) -> Path:
    """A random Llama with the demo's tokenizer; its initialisation is wide enough that its distributions are not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


UP_TO = """import os, sys, time, npd.cli, npd.train.trainer
held, real, parent = int(sys.argv.pop(1)), npd.train.trainer.Trainer.step, os.getppid()
def step(self, *args):
    while args[3] == held:
        if os.getppid() != parent:  # nobody is left to kill it
            os._exit(1)
        time.sleep(1)
    return real(self, *args)
npd.train.trainer.Trainer.step = step
npd.cli.entry()
"""


def killed_from_outside(*arguments: str, once: Path, before_step: int) -> tuple[int, str]:
    """Run `npd ARGUMENTS` in a process of its own, and kill it as soon as a file is there.

    However late this process is, that one has not begun the step `before_step`.

    Returns:
        its number, and what it said
    """
    command = [sys.executable, "-c", UP_TO, str(before_step), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + HANG
    while not once.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    said = process.communicate()[0]
    assert once.exists(), said
    assert process.returncode == -signal.SIGKILL, said
    return process.pid, said


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "teacher", seed=1, layers=3)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "student", seed=2)


class Held:
    """A model that is loaded already, as weights for an engine."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def model(self) -> PreTrainedModel:
        return self._model

    def path(self) -> Path:
        raise AssertionError("transformers' engine asks for no files")


def engine_of(model: PreTrainedModel, vocabulary: Vocabulary, *, pad_id: int = 0, **rollout: Any) -> TransformersEngine:
    """What writes with a model that is loaded already, in transformers."""
    tree = {"run_dir": "", "student": {"model": ""}, "data": {"train": ""}, "rollout": {"batch_size": 4} | rollout}
    config = load_config(tree)
    engine = TransformersEngine(EngineSetting(config, config.student, vocabulary, pad_id, "cpu", longest_prompt=64))
    engine.take(Held(model))
    return engine


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """Twelve of the demo's problems from two sources."""
    rows = [
        {"prompt": p.prompt, "completion": p.completion, "answer": p.answer, "source": "ab"[i % 2]}
        for i, p in enumerate(make_problems(12, seed=7))
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture
def vllm_is_there(monkeypatch):
    """What a test asks of a configuration is the same with and without it."""
    monkeypatch.setattr("npd.rollout.vllm.VllmEngine.lacks", classmethod(lambda cls, config: ""))


@pytest.fixture
def make_tree(tmp_path, teacher_dir, student_dir, data_file) -> Callable[..., dict[str, Any]]:
    """A configuration of a run that takes about a second; keyword arguments replace or add sections' keys."""

    def make(run_dir: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "run_dir": str(tmp_path / run_dir),
            "student": {"model": str(student_dir)},
            "teacher": {"model": str(teacher_dir)},
            "data": {"train": str(data_file), "max_prompt_tokens": 32},
            "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
            "rollout": {"max_new_tokens": 12, "batch_size": 4, "part_size": 5},
            "scoring": {"top_k": 4, "batch_tokens": 128, "free": "always"},
            "selection": {"rule": "none"},
            "packing": {"length": 64},
            "training": {"batch_tokens": 128, "learning_rate": 1e-3},
            "checkpoint": {"every_steps": 3},
            "tracking": {"trackers": [], "report": False},
        }
        for name, options in sections.items():
            tree[name] = {**tree.get(name, {}), **options}
        return tree

    return make


@pytest.fixture
def vllm_tree(make_tree, tmp_path) -> Callable[..., dict[str, Any]]:
    """A run with vLLM rollouts; its student's heads are wide enough for vLLM's CPU kernels."""
    student = save_model(tmp_path / "student", seed=2, hidden=64)

    def make(run_dir: str = "run", **sections: Any) -> dict[str, Any]:
        rollout = {"engine": "vllm", "batch_size": 8, **sections.pop("rollout", {})}
        student_section = {"model": str(student), **sections.pop("student", {})}
        return make_tree(run_dir, student=student_section, rollout=rollout, **sections)

    return make
