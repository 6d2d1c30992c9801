"""Intervals. Counts get Wilson's; anything else the normal interval of its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, over n values."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """95% interval of a mean: Wilson's where every value is 0 or 1 (Wilson 1927), the normal one otherwise."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    if all(value in (0, 1) for value in values):
        from scipy.stats import binomtest

        found = binomtest(round(math.fsum(values)), n).proportion_ci(0.95, method="wilson")
        return Interval(mean, float(found.low), float(found.high), n)
    spread = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z95 * math.sqrt(spread / n)
    return Interval(mean, mean - half, mean + half, n)
