"""Rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Average ranks from 1 on, (n,) in float64."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.double().cpu().numpy()))


def spearman(one: Tensor, two: Tensor) -> float:
    """Spearman's rank correlation of two (n,), ties at their average rank; NaN where one of them is constant or n < 2.

    Source: Spearman 1904, as Pearson's correlation of ranks.
    """
    a, b = ranks(one), ranks(two)
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else float("nan")
