"""Streaming moments and extremes of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion import processes


class Moments:
    """Count, mean, sum of squared deviations, least and greatest value per channel, merged batch by batch in float64.

    Source: Chan, Golub, LeVeque 1979, updating formulae for sample variances.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.channels = 0, channels
        self.mean = self.deviations = torch.zeros(channels, dtype=torch.float64)
        self.minimum = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.maximum = -self.minimum

    def add(self, rows: Tensor) -> None:
        """Takes in rows (tokens, channels), tokens >= 1."""
        rows = rows.double()
        mean = rows.mean(0)
        self._join(rows.shape[0], mean, (rows - mean).square_().sum(0), *rows.aminmax(dim=0))

    def all_reduce(self) -> None:
        """Takes in what all other processes saw, the same bits on each."""
        counts = processes.gathered(torch.tensor(self.count)).tolist()
        values = processes.gathered(torch.stack([self.mean, self.deviations, self.minimum, self.maximum])).unbind(1)
        self.count = 0
        for number, *parts in zip(counts, *values, strict=True):
            if number:
                self._join(number, *parts)

    def merge(self, other: Moments) -> None:
        """Takes in what another stream saw."""
        if other.count:
            self._join(other.count, other.mean, other.deviations, other.minimum, other.maximum)

    def _join(self, count: int, mean: Tensor, deviations: Tensor, least: Tensor, greatest: Tensor) -> None:
        if self.count:
            shift = mean - self.mean
            total = self.count + count
            deviations = deviations + self.deviations + shift.square() * (self.count * count / total)
            mean = self.mean + shift * (count / total)
            least, greatest = torch.minimum(least, self.minimum), torch.maximum(greatest, self.maximum)
        self.count += count
        self.mean, self.deviations, self.minimum, self.maximum = mean, deviations, least, greatest

    @property
    def variance(self) -> Tensor:
        """Population variance, (channels,)."""
        return self.deviations / max(1, self.count)
