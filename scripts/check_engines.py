"""Check, on this machine's GPU (or its CPU), every path that an engine or a served teacher takes, and say what works.

    python scripts/check_engines.py [--student MODEL --teacher MODEL] [--only attention|engines|shards|step]
        [--out FILE.json]

Attention, the training step and, on two GPUs or more, sharded training are checked first (see check_attention.py,
check_step.py and check_shards.py beside this file). Without models it makes random ones. It starts vLLM in this process and a
vLLM server on loopback; needs `npd[vllm]`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import check_attention
import check_step
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import npd
from npd.config import ModelConfig, Sampling, StudentConfig, load_config
from npd.demo.task import make_problems
from npd.demo.tokenizer import build_tokenizer
from npd.generations.models import engine_difference
from npd.models import (
    Vocabulary,
    load_model,
    load_model_config,
    load_tokenizer,
    resolve_dtype,
    shared_vocabulary,
    stop_ids_of,
)
from npd.observe.display import Display
from npd.rollout import EngineSetting
from npd.rollout.transformers import TransformersEngine
from npd.rollout.vllm import VllmEngine
from npd.run import ModelWeights
from npd.scoring import Prefill
from npd.store import Store, write_json, write_text

GPUS = torch.cuda.device_count()
BOUND = 0.05  # nats per token between engine and transformers, as rollout.check_bound
KL_BOUND = 0.25  # of the distance to the teacher, between samples of two engines
NEW_TOKENS, PROMPT_TOKENS = 64, 256

Check = Callable[["Bench"], str]


class Skip(Exception):
    """Why a check can't be made here."""


class Bench:
    """Models, prompts and a directory for runs."""

    def __init__(self, folder: Path, student: str | None, teacher: str | None) -> None:
        self.folder = folder
        self.student = student or random_model(folder / "student", 1, layers=4)
        self.teacher = teacher or random_model(folder / "teacher", 2, layers=8)
        rows = [
            {"prompt": problem.prompt, "answer": problem.answer, "source": "ab"[i % 2]}
            for i, problem in enumerate(make_problems(64, 3))
        ]
        write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer = load_tokenizer(ModelConfig(model=self.student))
        configs = [load_model_config(ModelConfig(model=m)) for m in (self.student, self.teacher)]
        stops = [*stop_ids_of(ModelConfig(model=self.student)), *stop_ids_of(ModelConfig(model=self.teacher))]
        self.vocabulary: Vocabulary = shared_vocabulary(self.tokenizer, *configs, stop_ids=stops)

    def tree(self, name: str, **sections: Any) -> dict[str, Any]:
        """Options of a run of two generations."""
        tree: dict[str, Any] = {
            "run_dir": str(self.folder / name),
            "student": {"model": self.student},
            "teacher": {"model": self.teacher},
            "data": {"train": str(self.folder / "prompts.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
            "schedule": {"generations": 2, "passes": 1, "lead": 0.0},
            "rollout": {"engine": "vllm", "max_new_tokens": NEW_TOKENS, "batch_size": 32, "part_size": 16},
            "selection": {"rule": "none"},
            "packing": {"length": 512},
            "training": {"batch_tokens": 512, "learning_rate": 1e-3},
            "tracking": {"trackers": [], "report": False},
        }
        for key, options in sections.items():
            tree[key] = {**tree.get(key, {}), **options} if isinstance(tree.get(key, {}), dict) else options
        return tree

    def distill(self, name: str, **sections: Any) -> Path:
        """Run two generations; every generation's engine must agree with its snapshot."""
        return npd.distill(self.tree(name, **sections)).run_dir


def random_model(path: Path, seed: int, layers: int) -> str:
    """A Llama with the demo's tokenizer whose distributions are not flat."""
    torch.manual_seed(seed)
    hidden = 512 if GPUS else 128
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def agreement(run_dir: Path) -> str:
    """How far the engine was from transformers in each generation.

    Raises:
        AssertionError: further than kernels explain.
    """
    figures = []
    for generation in (0, 1):
        manifest = Store(run_dir).manifest(generation)
        assert manifest is not None
        assert manifest.engine is not None
        figures.append(manifest.engine.mean_abs_difference)
    shown = ", ".join(f"{figure:.2g}" for figure in figures)
    assert max(figures) <= BOUND, f"engine and transformers differ by {shown} nats per token"
    return f"engine and transformers differ by {shown} nats per token"


# -- the checks


def both_engines(bench: Bench) -> str:
    """Greedy tokens and log-probabilities of vLLM and transformers; weights given away and taken back."""
    import pyarrow as pa

    prompts = [bench.tokenizer(problem.prompt)["input_ids"] for problem in make_problems(32, 5)]
    table = pa.table({"prompt_ids": prompts})
    config, student = load_config(bench.tree("engines")), StudentConfig(model=bench.student)
    weights, greedy = ModelWeights(student), Sampling(NEW_TOKENS, temperature=0.0)
    model, dtype, pad_id = weights.model(), resolve_dtype(student, trained=False), bench.tokenizer.pad_token_id
    setting = EngineSetting(config, student, bench.vocabulary, pad_id, str(model.device), PROMPT_TOKENS, shares_device=True)
    engine, reference = VllmEngine(setting), TransformersEngine(setting)
    try:
        engine.take(weights)
        ours = engine.answer(table, greedy)
        memory = ""
        if GPUS:
            before = torch.cuda.mem_get_info()[0]
            engine.rest()
            freed = (torch.cuda.mem_get_info()[0] - before) / 2**30
            assert freed > 0.5, f"sleep freed only {freed:.2f} GiB"
            memory = f"; asleep it frees {freed:.1f} GiB"
        engine.path = None  # so that the weights are read anew
        engine.take(weights)
        again = engine.answer(table, greedy)
    finally:
        engine.close()
    reference.take(weights)
    theirs = reference.answer(table, greedy)
    same = np.mean(
        [a == b for a, b in zip(ours["response_ids"].to_pylist(), theirs["response_ids"].to_pylist(), strict=True)]
    )
    prefill = Prefill(model, bench.vocabulary, pad_id, 8192)
    gap = max(engine_difference(answers, prefill).mean_abs_difference for answers in (ours, again))
    assert gap <= BOUND, f"log-probabilities differ by {gap:.3g} nats per token"
    assert same == 1.0 or dtype != torch.float32, f"only {same:.0%} of the greedy responses are alike"
    return f"{same:.0%} of greedy responses alike, log-probabilities {gap:.2g} nats apart{memory}"


def in_turns(bench: Bench) -> str:
    """Trainer, teacher and engine on one device, in turns; weights change in the middle."""
    return agreement(bench.distill("turns"))


def with_adapters(bench: Bench) -> str:
    """A LoRA student, whose adapters alone are taken."""
    return agreement(bench.distill("adapters", student={"lora": {"r": 8}}))


def with_evaluation(bench: Bench) -> str:
    """The student is evaluated, and the teacher answers tasks and writes references, by the engine."""
    data = {"eval": str(bench.folder / "prompts.jsonl"), "references": "teacher"}
    evaluation = {"tasks": ["answer"], "teacher": True, "kl_prompts": 64}
    tree = bench.tree("evaluated", data=data, schedule={"references": 0.2}, evaluation=evaluation)
    result = npd.distill(tree)
    _, expected = npd.evaluate({**tree, "rollout": {**tree["rollout"], "engine": "transformers"}})
    ours, theirs = result.after["eval/kl_to_teacher"], expected["eval/kl_to_teacher"]
    assert abs(ours - theirs) <= KL_BOUND * theirs, (
        f"the KL to the teacher is {ours:.3g} nats, with transformers {theirs:.3g}"
    )
    return f"KL to the teacher {ours:.3g} nats, with transformers {theirs:.3g}; {agreement(result.run_dir)}"


def with_a_server(bench: Bench) -> str:
    """A teacher served by vLLM on loopback, against the same teacher here."""
    with serving(bench) as url:
        run_dir = bench.distill("served", teacher={"model": "big", "server": url})
    words = agreement(run_dir)
    config = ModelConfig(model=bench.teacher)
    reader = Prefill(load_model(config), bench.vocabulary, bench.tokenizer.pad_token_id, 8192)
    rows = Store(run_dir).read_part(0, 0).to_pylist()
    readings = reader([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows])
    gap = float(np.mean([abs(r.logprobs.mean() * -1 - row["teacher_nll"]) for r, row in zip(readings, rows, strict=True)]))
    bound = 1e-3 if resolve_dtype(config, trained=False) == torch.float32 else BOUND
    assert gap <= bound, f"the served teacher is {gap:.3g} nats per token from the one here"
    return f"the served teacher is {gap:.2g} nats per token from the one here; {words}"


def beside_the_trainer(bench: Bench) -> str:
    """The refresh on a GPU of its own."""
    if GPUS == 1:
        raise Skip("needs two GPUs")
    return agreement(bench.distill("beside", schedule={"lead": 1.0}))


def tensor_parallel(bench: Bench) -> str:
    """One engine on two GPUs beside the trainer's."""
    if GPUS < 3:
        raise Skip("needs three GPUs")
    return agreement(bench.distill("parallel", schedule={"lead": 1.0}, rollout={"vllm": {"tensor_parallel_size": 2}}))


CHECKS: list[Check] = [
    *(both_engines, in_turns, with_adapters, with_evaluation, with_a_server),
    *(beside_the_trainer, tensor_parallel),
]


@contextmanager
def serving(bench: Bench) -> Iterator[str]:
    """The address of a vLLM server that serves the teacher as `big`."""
    import urllib3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", bench.teacher]
    command += ["--served-model-name", "big", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--gpu-memory-utilization", "0.2"] if GPUS else ["--dtype", "float32", "--enforce-eager"]
    environment = os.environ | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    log = bench.folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            try:
                if urllib3.request("GET", f"{url}/health", timeout=2.0, retries=False).status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                pass
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="model directory or Hub id [default: a random model]")
    parser.add_argument("--teacher", help="model directory or Hub id [default: a random model]")
    parser.add_argument("--only", choices=["attention", "engines", "shards", "step"], help="check these alone")
    parser.add_argument("--out", "--json", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    works = True
    for name, script in (("attention", check_attention), ("step", check_step)):
        if options.only in (None, name):
            out = options.out if options.only or options.out is None else options.out.with_suffix(f".{name}.json")
            works = script.check(script.CHECKS, out) and works
    if options.only == "shards" or (options.only is None and GPUS > 1):
        out = [] if options.out is None else ["--out", str(options.out.with_suffix(".shards.json"))]
        command = [sys.executable, str(Path(__file__).with_name("check_shards.py")), *out]
        works = subprocess.run(command).returncode == 0 and works
    if options.only in (None, "engines"):
        works = check_engines(options) and works
    sys.exit(not works)


def check_engines(options: argparse.Namespace) -> bool:
    """Run the checks, print their table, write them as JSON; did all that could be made here work?"""
    device = torch.cuda.get_device_name() if GPUS else f"CPU ({os.cpu_count()} cores)"
    display = Display()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="npd-check-") as folder:
        bench = Bench(Path(folder), options.student, options.teacher)
        for check in CHECKS:
            display.say(f"{check.__name__}: {(check.__doc__ or '').splitlines()[0]}")
            began = time.monotonic()
            try:
                outcome, words = "works", check(bench)
            except Skip as why:
                outcome, words = "skipped", str(why)
            except Exception as error:
                outcome, words = "FAILS", f"{type(error).__name__}: {error}"
                display.say(traceback.format_exc())
            results.append({"check": check.__name__, "outcome": outcome, "seconds": time.monotonic() - began, "words": words})
    rows = [[r["check"], r["outcome"], f"{r['seconds']:.0f}", r["words"]] for r in results]
    display.table(f"Engines on {max(1, GPUS)} x {device}", ["check", "outcome", "s", "what was seen"], rows)
    if options.out:
        write_json(options.out, {"device": device, "gpus": GPUS, "torch": torch.__version__, "results": results})
    return all(result["outcome"] != "FAILS" for result in results)


if __name__ == "__main__":
    main()
