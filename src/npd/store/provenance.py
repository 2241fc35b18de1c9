"""Which versions made a run."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("npd", "torch", "transformers", "accelerate", "peft", "pyarrow", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
