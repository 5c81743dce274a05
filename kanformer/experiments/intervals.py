"""Means over seeds with their 95 % t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """(mean, half the width of its 95 % t interval); no mean of nothing, no interval of one value."""
    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    return mean, float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
