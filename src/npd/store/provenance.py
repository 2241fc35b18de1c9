"""Which versions made a run, and what those understood by its options."""

from __future__ import annotations

import importlib.metadata
from typing import TypeVar

from npd.config import Config, ModelConfig

PACKAGES = ("npd", "torch", "transformers", "accelerate", "peft", "pyarrow", "tokenizers")

VARLEN = "varlen"
"""In a run's provenance: is `attention: auto` there over samples end to end, where a model can?"""

M = TypeVar("M", bound=ModelConfig)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def in_rows(config: Config) -> Config:
    """A configuration as versions understood it that did not know attention over samples end to end."""

    def of(model: M) -> M:
        return model.model_copy(update={"attention": "rows"}) if model.attention == "auto" else model

    teacher = None if config.teacher is None else of(config.teacher)
    teachers = {key: of(each) for key, each in config.teachers.items()}
    return config.model_copy(update={"student": of(config.student), "teacher": teacher, "teachers": teachers})
