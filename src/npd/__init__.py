"""Near-Policy Distillation: a small language model learns from a large one on its own responses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from npd.threads import wait_politely

if TYPE_CHECKING:
    from npd import losses, packing, rewards, selection
    from npd.config import Config, load_config
    from npd.errors import NpdError, RunError, UserError
    from npd.generations.generation import Generation
    from npd.result import DistillResult
    from npd.run import distill, evaluate, refresh, sft

_HOMES = {
    "Config": "npd.config",
    "load_config": "npd.config",
    "NpdError": "npd.errors",
    "RunError": "npd.errors",
    "UserError": "npd.errors",
    "Generation": "npd.generations.generation",
    "DistillResult": "npd.result",
    "distill": "npd.run",
    "evaluate": "npd.run",
    "refresh": "npd.run",
    "sft": "npd.run",
}
wait_politely()  # before anything imports PyTorch

_MODULES = ("losses", "packing", "rewards", "selection")

__all__ = [
    "Config", "DistillResult", "Generation", "NpdError", "RunError", "UserError", "distill", "evaluate", "load_config",
    "losses", "packing", "refresh", "rewards", "selection", "sft",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # On demand: `npd --help` should not wait for PyTorch.
    if name == "__version__":
        from importlib.metadata import version

        return version("npd")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"npd.{name}")
    raise AttributeError(f"module 'npd' has no attribute {name!r}")
