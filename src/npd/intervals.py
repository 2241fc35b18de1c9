"""How sure a share is that was counted, and a mean over a few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% confidence interval of a share seen in `count` independent trials (Wilson, 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of normal values whose variance is not known (Student, 1908).

    Raises:
        ValueError: there are fewer than two values, which say nothing about their variance.
    """
    count = len(values)
    if count < 2:
        raise ValueError("an interval of a mean needs two values or more")
    mean = math.fsum(values) / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = t_quantile(count - 1, level) * error
    return mean - half, mean + half


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t within which a share `level` of Student's distribution lies, to both sides of 0."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range((degrees - odd) // 2):
        total += term
        term *= square * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
