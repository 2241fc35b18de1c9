"""How sure a share is that was counted."""

from __future__ import annotations

import math


def wilson_interval(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% confidence interval of a share seen in `count` independent trials (Wilson, 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
