"""What a model does to its hidden states to get logits: the head's matrix, its bias, and what comes after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# Where configurations of transformers keep what comes after the head.
SCALES = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class AfterHead:
    """Logits z = cap * tanh(scale * x / cap) from the head's own output x; without a cap z = scale * x."""

    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def changes(self) -> bool:
        """Is it anything but the identity?"""
        return self.scale != 1 or self.soft_cap is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the head's output, of any shape; a new tensor only if something changes."""
        if self.scale != 1:
            x = x * self.scale
        if self.soft_cap is not None:
            x = torch.tanh(x / self.soft_cap) * self.soft_cap
        return x

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx, from the logits z that came of it."""
        if self.soft_cap is None:
            return self.scale
        return (1 - (z / self.soft_cap).square()) * self.scale


def after_head_candidates(config: PreTrainedConfig) -> list[AfterHead]:
    """What may come after the head, as far as a configuration says; the likeliest first."""
    text = config.get_text_config()

    def found(names: tuple[str, ...]) -> list[float]:
        values: list[Any] = [getattr(text, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value]

    cap = next(iter(found(CAPS)), None)
    factor, divisor = math.prod(found(SCALES)), math.prod(found(DIVISORS))
    # Granite divides by its logits_scaling, and HyperCLOVA X multiplies by one of the same name.
    return [AfterHead(scale, cap) for scale in dict.fromkeys((factor / divisor, factor * divisor))]
