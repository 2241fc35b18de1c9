"""A rule that keeps the half of each source's responses from which most is to be learned."""

import numpy as np
import pyarrow as pa

from npd.config import SelectionConfig
from npd.registry import RULES
from npd.selection import Bounds, Judgement, Rule, bands


class UpperHalf(Rule):
    """Keeps Δ from the source's median upwards, and none that is infinite."""

    bounds_of = "the upper half's"

    def check(self, config: SelectionConfig) -> None:
        if config.lower != 0:
            raise ValueError(f"upper_half draws its own lower bound, but lower is {config.lower}")

    def __call__(self, table: pa.Table, config: SelectionConfig) -> Judgement:
        delta, sources = table["delta_ifd"].to_numpy().astype(np.float64), table["source"].to_pylist()
        bounds = {}
        for source in set(sources):
            finite = [d for d, name in zip(delta, sources, strict=True) if name == source and np.isfinite(d)]
            bounds[source] = Bounds(np.median(finite), max(finite)) if finite else Bounds(0, 0)
        lower, upper = np.array([bounds[source] for source in sources]).reshape(-1, 2).T
        return Judgement(bands(delta, lower, upper), bounds)


RULES.register("upper_half", UpperHalf)
