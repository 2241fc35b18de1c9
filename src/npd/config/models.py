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

    adapter: Place | None = None
    """Directory or Hub id of a LoRA adapter on `model`, as peft writes it (adapter_model.safetensors): the model is the two
    together."""


class StudentConfig(ModelConfig):
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; null trains all. Snapshots and student/ hold merged weights, adapter/
    the adapters by themselves."""
    adapter_mode: Literal["continue", "merge"] = "continue"
    """What becomes of `adapter`. continue: it is what is trained (student.lora may be left out, or describe the same shape).
    merge: it is added to the weights, which then learn as those of any model, all of them or by a fresh student.lora."""

    @property
    def continues(self) -> bool:
        """Does training go on with an adapter that is there?"""
        return self.adapter is not None and self.adapter_mode == "continue"

    @property
    def adapts(self) -> bool:
        """Are adapters trained, and the weights below them not?"""
        return self.lora is not None or self.continues

    @property
    def base(self) -> StudentConfig:
        """The weights below the adapters that are trained; all of them where there are none."""
        return self.model_copy(update={"lora": None} | ({"adapter": None} if self.continues else {}))


STUDENT = "student"
"""As a teacher's model: the student itself. (A directory of that name is ./student.)"""


class TeacherConfig(ModelConfig):
    model: Place
    """As student.model. student: the student itself, as it started or as `snapshot` says (a directory of that name is
    ./student)."""
    snapshot: Literal["start", "latest"] = "start"
    """Of a teacher that is the student itself. start: as it started. latest: each generation is read by the snapshot that
    wrote it, references and what else belongs to none by the first."""
    system: str | None = None
    """A system prompt for the teacher alone, in front of a row's own."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template where the teacher's prompt goes through it, over data.template_options and a row's
    own, such as {enable_thinking: true}."""
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
        local = ("revision", "dtype", "attention", "trust_remote_code", "adapter")
        given = self.model_fields_set
        if self.is_student:
            theirs = [name for name in local if name in given and not self._is_default(name)]
            if theirs:
                raise ValueError(
                    f"model student is the student itself, so {', '.join(theirs)} are those of `student`; leave them out (a "
                    "directory of that name is ./student)"
                )
        elif self.snapshot != "start":
            raise ValueError(f"snapshot {self.snapshot} is one of the student's; it goes with model: student")
        if self.system is not None and not self.system.strip():
            raise ValueError("system is empty; leave it out")
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

    @property
    def is_student(self) -> bool:
        """Is it the student itself?"""
        return self.model == STUDENT and self.server is None and self.kind is None

    def of_student(self, student: StudentConfig) -> TeacherConfig:
        """The weights of a student as it started, read as this teacher reads."""
        names = ("model", "revision", "dtype", "attention", "trust_remote_code", "adapter")
        return self.model_copy(update={name: getattr(student, name) for name in names})

    @property
    def tells_more(self) -> bool:
        """Does it read every prompt that goes through the chat template behind another context than the student's?"""
        return self.system is not None or bool(self.template_options)

    def _is_default(self, name: str) -> bool:
        return getattr(self, name) == type(self).model_fields[name].default
