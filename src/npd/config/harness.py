"""Options of evaluation by lm-eval, the harness that most published figures come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from npd.config.base import LONGEST_TEXT, MANY, Place, Section

RESERVED = {
    "pretrained": "it is the model under evaluation",
    "tokenizer": "it is the student's",
    "batch_size": "set evaluation.harness.batch_size",
    "trust_remote_code": "set student.trust_remote_code",
}
"""Options of lm-eval's model that npd gives itself."""


class HarnessTaskConfig(Section):
    name: str = Field(min_length=1)
    """A task, group or tag of lm-eval, or of `include_path`."""
    num_fewshot: int | None = Field(default=None, ge=0, le=MANY)
    """Examples before each problem; null: as evaluation.harness.num_fewshot."""
    limit: int | None = Field(default=None, ge=1, le=MANY)
    """Problems asked; null: as evaluation.harness.limit."""


class HarnessConfig(Section):
    tasks: list[HarnessTaskConfig] = []
    """Tasks of lm-eval (pip install 'npd[eval]'), also groups and tags: names, {name, num_fewshot, limit}, or one text with
    commas."""
    suite: Literal["paper"] | None = None
    """paper: the paper's eleven benchmarks as lm-eval has them, besides `tasks`; docs/evaluation.md lists them."""
    num_fewshot: int | None = Field(default=None, ge=0, le=MANY)
    """Examples before each problem; null: each task's own number. lm-eval leaves a task alone that is set to none."""
    limit: int | None = Field(default=None, ge=1, le=MANY)
    """Problems asked of each task (of each of a group's); null: all."""
    every: Literal["end", "passes"] = "end"
    """When: at the run's end alone, for lm-eval takes long; or whenever evaluation.every_passes says, start included."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What computes: lm-eval's HFLM with the model that is there, or lm-eval's own vLLM on files of it."""
    batch_size: int = Field(default=8, ge=1, le=65536)
    """Sequences read or written at once by transformers; vLLM fills its batches itself."""
    chat_template: bool = False
    """Ask through the student's chat template, examples as turns of a conversation; false, as lm-eval has it: plain text."""
    include_path: Place | None = None
    """Directory with task files of your own, which come before lm-eval's; they may name Python functions, which then run."""
    unsafe_code: bool = False
    """Run tasks that execute what the model wrote, such as humaneval and mbpp. Do it only where that can do no harm."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Length of a response where a task does not say; null: lm-eval's 256."""
    options: dict[str, Any] = {}
    """Further options of lm-eval's model by its own names: {max_length: 4096}, or vLLM's {gpu_memory_utilization: 0.5}."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _once(self) -> HarnessConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks has a name twice ({', '.join(names)}), and its figures would share one metric name")
        for name, why in RESERVED.items():
            if name in self.options:
                raise ValueError(f"options has {name}, which is not open: {why}")
        return self
