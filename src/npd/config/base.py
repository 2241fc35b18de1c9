"""What sections of the configuration are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from npd.registry import DIVERGENCES, ENGINES, RULES, TEACHERS, Registry

_USERINFO = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*@", re.IGNORECASE)
_SECRET = re.compile(r"(api[_-]?key|password|passwd|secret|(access|auth|hf)[_-]?token)$", re.IGNORECASE)


def _secrets(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, what is there) of secrets in options."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and inner and _SECRET.search(str(key)):
                yield f"{name}{key}", "a key or a password"
            else:
                yield from _secrets(inner, f"{name}{key}.")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _secrets(inner, f"{name}{i}.")
    elif isinstance(value, str) and _USERINFO.search(value):
        yield name.removesuffix("."), "a user's name or password in a URL (in front of @)"


def check_without_secrets(options: Any) -> None:
    """See that options, as they were given, hold no secret.

    Raises:
        ValueError: one does; it is not repeated.
    """
    found = next(_secrets(options), None)
    if found is not None:
        raise ValueError(
            f"{found[0]} holds {found[1]}, and options are written into the run directory and told to trackers; leave it "
            "out and give it through the environment (a server's key in the variable that teacher.api_key_env names)"
        )


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, values: Any) -> Any:
        """Before anything else: other messages repeat what is wrong, and options go into config.yaml and to trackers."""
        check_without_secrets(values)
        return values


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
