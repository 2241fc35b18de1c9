"""Which versions made a run, and what those understood by its options."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
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


def read_options(file: Path) -> dict[str, Any]:
    """What a run's config.yaml holds, with its provenance, which may be empty."""
    tree = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    return tree | {"provenance": dict(tree.get("provenance") or {})}


def as_begun(config: Config, provenance: Mapping[str, Any]) -> Config:
    """A configuration as the version that began a run understood it, so that the run goes on as it was.

    Versions that did not know attention over samples end to end read in rows where it is `auto`.
    """
    if provenance.get(VARLEN):
        return config

    def in_rows(model: M) -> M:
        return model.model_copy(update={"attention": "rows"}) if model.attention == "auto" else model

    teacher = None if config.teacher is None else in_rows(config.teacher)
    teachers = {key: in_rows(each) for key, each in config.teachers.items()}
    return config.model_copy(update={"student": in_rows(config.student), "teacher": teacher, "teachers": teachers})
