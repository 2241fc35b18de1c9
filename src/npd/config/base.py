"""What sections of the configuration are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from npd.registry import DIVERGENCES, ENGINES, RULES, TEACHERS, Registry


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class KindOf:
    """Marks an option that holds the name of a kind, for `--help`."""

    registry: Registry


EngineName = Annotated[str, KindOf(ENGINES), AfterValidator(ENGINES.check)]
TeacherKind = Annotated[str, KindOf(TEACHERS), AfterValidator(TEACHERS.check)]
RuleName = Annotated[str, KindOf(RULES), AfterValidator(RULES.check)]
DivergenceName = Annotated[str, KindOf(DIVERGENCES), AfterValidator(DIVERGENCES.check)]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 decodes greedily."""
    top_p: float = 1.0
    samples_per_prompt: int = 1


# Options of vLLM that may differ when a run is continued: they change memory and speed alone.
VLLM_FREE = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "swap_space", "cpu_offload_gb", "block_size"),
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce"),
    *("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager"),
)
