"""What sections of the configuration are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from npd.registry import DIVERGENCES, ENGINES, RULES, TEACHERS, Registry

MANY = 1_000_000  # of what is counted one by one
LONGEST_TEXT = 1 << 24  # tokens: more than any model reads
LONGEST_NAME = 255  # bytes of a file's name, as file systems have it
_USERINFO = re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://[^/?#]*@", re.IGNORECASE)
_SECRET = re.compile(r"(api[_-]?key|password|passwd|secret|(access|auth|hf)[_-]?token)$", re.IGNORECASE)
_SECRET_OPTION = re.compile(  # of a URL
    r"://[^?#\s]*\?([^#\s]*&)?"
    r"(sig|[^=&#]*(secret|passw|credential|signature)[^=&#]*|[^=&#]*((access|account|api|storage)[_-]?key|token))=",
    re.IGNORECASE,
)


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
    elif isinstance(value, str) and _SECRET_OPTION.search(value):
        yield name.removesuffix("."), "a key or a password in a URL (behind ?)"


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
    """A part of the tree. Numbers are finite where the field does not say otherwise, and every one has bounds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, str_max_length=4096
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number, which true and false (in YAML also yes, no, on and off) are not")
        return value

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, values: Any) -> Any:
        """Before anything else: other messages repeat what is wrong, and options go into config.yaml and to trackers."""
        check_without_secrets(values)
        return values


def _kinds(annotation: Any) -> set[Any]:
    return {annotation}.union(*map(_kinds, get_args(annotation)))


def _named(place: str) -> str:
    if any(len(name.encode()) > LONGEST_NAME for name in place.split("/")):
        raise ValueError(f"has a name longer than a file's can be ({LONGEST_NAME} bytes)")
    return place


def _warm(temperature: float) -> float:
    if 0 < temperature < 1e-6:
        raise ValueError("must be 0, which is greedy, or at least 1e-6")
    return temperature


def _mirror(uri: str) -> str:
    """A URI with a scheme, or an absolute path."""
    scheme, there, rest = uri.partition("://")
    if not (there and rest and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme)) and not uri.startswith("/"):
        raise ValueError("must be a URI of a directory, such as s3://BUCKET/runs/first, or an absolute path")
    return uri


Place = Annotated[str, AfterValidator(_named)]
"""A path, or whatever else may be looked for as one."""
MirrorURI = Annotated[str, AfterValidator(_mirror)]
"""Where a mirror lies, for pyarrow."""
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_warm)]


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
