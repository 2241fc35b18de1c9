"""Options of the two models."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from npd.config.base import Place, Section, TeacherKind


class LoraConfig(Section):
    r: int = Field(default=16, ge=1, le=65536)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, ge=1e-6, le=1e6)
    """Scale of the adapters; the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Module names that get adapters, as peft takes them."""

    @field_validator("target_modules")
    @classmethod
    def _pattern(cls, value: str | list[str]) -> str | list[str]:
        try:
            re.compile(value if isinstance(value, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return value


class ModelConfig(Section):
    model: Place
    """Directory, Hub id, .gguf file, or package:NAME/PATH for weights inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. auto: on CPU float32; on CUDA bfloat16 for whatever is not itself trained. Weights that
    the optimiser updates are float32 whatever is said here: a smaller type would round most updates away. The finished
    student is saved in the type that is named, auto: in that of the checkpoint that it began as."""
    attention: Literal["auto", "rows", "sdpa", "eager"] = "auto"
    """How attention is computed. auto: over samples that lie end to end, without padding or masks, for models with which
    that holds; others as rows. rows: samples in padded rows, with sdpa, or eager for models that have none. sdpa, eager: rows
    with that alone. However it is read, a sample must equal itself alone: that is checked at load."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its authors."""


class StudentConfig(ModelConfig):
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; null trains all. Snapshots and student/ hold merged weights."""


class TeacherConfig(ModelConfig):
    kind: TeacherKind | None = None
    """What it is; null: what the other options say (loaded here, or served where `server` is set). `plugins` bring others."""
    options: dict[str, Any] = {}
    """Options of a kind that a plug-in brings, by its own names."""
    align: bool = False
    """The teacher has another tokenizer: it reads prompts and responses with that and its own chat template, and positions
    meet by bytes (docs/objectives.md). A served one needs `tokenizer` then."""
    server: str | None = None
    """URL of a running vLLM or SGLang server (http://host:8000) that serves the teacher; `model` is then its name there.
    null: the teacher is loaded here. The key, if the server wants one, is read from the environment (api_key_env)."""
    tokenizer: Place | None = None
    """Tokenizer of a served teacher (directory or Hub id), to be compared with the student's, or with `align` to read by;
    null: the server is asked to turn a few texts into ids instead."""
    api: Literal["auto", "vllm", "sglang"] = "auto"
    """What kind of server it is; auto asks it."""
    api_key_env: str = "NPD_TEACHER_API_KEY"
    """Environment variable that holds the server's API key; the key itself is never written anywhere."""
    concurrency: int = Field(default=32, ge=1, le=4096)
    """Requests in flight at once."""
    timeout: float = Field(default=120.0, ge=1e-3, le=1e6)
    """Seconds a request may take, all told, before it is given up and sent again."""
    retry_seconds: float = Field(default=600.0, ge=0, le=1e9)
    """How long a server may be away, overloaded or failing before the run stops."""

    @model_validator(mode="after")
    def _here_or_served(self) -> TeacherConfig:
        served = ("tokenizer", "api", "api_key_env", "concurrency", "timeout", "retry_seconds")
        local = ("revision", "dtype", "attention", "trust_remote_code")
        given = self.model_fields_set
        wrong = [name for name in (served if self.server is None else local) if name in given and not self._is_default(name)]
        if wrong and self.server is None:
            raise ValueError(f"{', '.join(wrong)} belong to a teacher that is served; set server, or leave them out")
        if wrong:
            raise ValueError(f"{', '.join(wrong)} are the server's own affair; leave them out beside server")
        if self.server is not None and not re.match(r"https?://[^/]", self.server):
            raise ValueError(f"server is a URL such as http://localhost:8000, but it is {self.server!r}")
        if self.server is not None and re.search(r"[?#\s\x00-\x1f\x7f]", self.server):
            raise ValueError(
                "server is a URL such as http://localhost:8000, without spaces, ? and #; a key is not part of it"
            )
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", self.api_key_env, re.ASCII):  # a key itself, for instance: not repeated
            raise ValueError("api_key_env is the name of an environment variable, which what is given here can't be")
        return self

    def _is_default(self, name: str) -> bool:
        return getattr(self, name) == type(self).model_fields[name].default
