"""Means over seeds with their 95 % intervals."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, probability in [0.5, 1), degrees >= 1."""
    import mpmath

    def missing(t: float) -> float:
        tail = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) / 2
        return float(1 - tail) - probability

    low, high = 0.0, 1.0
    while missing(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) < 0 else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """(mean, half the width of its 95 % t interval); no mean of nothing, no interval of one value."""
    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
