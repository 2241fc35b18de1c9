"""Rules that ask the same of every part: the paper's band, and none."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from npd.config import SelectionConfig
from npd.selection.rules import PROXIMAL, Bounds, Judgement, Rule, bands


class FixedBand(Rule):
    """Keeps lower <= Δ <= upper (arXiv:2605.05940)."""

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        bounds = Bounds(config.lower, config.upper)
        return Judgement(
            bands(table["delta_ifd"].to_numpy(), *bounds), dict.fromkeys(table["source"].unique().to_pylist(), bounds)
        )

    def name_bounds(self, config: SelectionConfig, bounds: Bounds | None) -> tuple[str, str]:
        return f"selection.lower {config.lower}", f"selection.upper {config.upper}"


class Everything(Rule):
    """Keeps all, an undefined Δ too."""

    reads_free = False

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        return Judgement(np.full(len(table), PROXIMAL), None)
