"""Which versions made a run, and what those understood by its options."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from npd.config import Config, ModelConfig

PACKAGES = ("npd", "torch", "transformers", "accelerate", "peft", "pyarrow", "tokenizers")

VARLEN = "varlen"
"""In a run's provenance: is `attention: auto` there over samples end to end, where a model can?"""

M = TypeVar("M", bound=ModelConfig)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def provenance_of(file: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its provenance."""
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")).get("provenance") or {})


def in_rows(config: Config) -> Config:
    """A configuration as versions understood it that did not know attention over samples end to end."""

    def of(model: M) -> M:
        return model.model_copy(update={"attention": "rows"}) if model.attention == "auto" else model

    teacher = None if config.teacher is None else of(config.teacher)
    teachers = {key: of(each) for key, each in config.teachers.items()}
    return config.model_copy(update={"student": of(config.student), "teacher": teacher, "teachers": teachers})
