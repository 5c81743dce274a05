"""Exact second moments of the planes of every input: from them follow variance, straightness and distance of all edges of that input."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion import processes
from kanformer.conversion.moments import Moments
from kanformer.interpret.collecting.sources import Planes

_NUMBERS = 2**21  # of a float64 buffer


class PlaneMoments:
    """Streams sum_t u u^T with u = (1, x_i, b(x_i), B[0](x_i), ...) for every input i, in float64.

    Memory: 8 * (n_basis + 3)^2 bytes per input. What follows for phi = v . (b, B) is exact, not binned: E phi = v . m,
    Var phi = v^T C v, Cov(phi, x) = v . c (a KAN layer is linear in its coefficients).
    """

    def __init__(self, planes: Planes) -> None:
        self.planes, self.count = planes, 0
        size = planes.count + 2
        self.sums = torch.zeros(planes.channels, size, size, dtype=torch.float64, device=planes.module.kan_grid.device)

    def add(self, rows: Tensor) -> None:
        """Takes in rows (tokens, channels)."""
        self.count += rows.shape[0]
        size = self.sums.shape[1]
        step = max(1, _NUMBERS // (rows.shape[0] * size))
        for first in range(0, rows.shape[1], step):
            columns = slice(first, first + step)
            x = rows[:, columns]
            u = torch.stack([torch.ones_like(x, dtype=torch.float64), x.double(), *(plane.double() for plane in self.planes(x, columns))]).permute(2, 0, 1)
            self.sums[columns].baddbmm_(u, u.transpose(1, 2))

    def all_reduce(self) -> None:
        """Takes in what all other processes saw."""
        self.count = int(processes.reduced(torch.tensor(self.count)))
        self.sums = processes.reduced(self.sums)

    def mean(self) -> Tensor:
        """E u u^T, (channels, n_basis + 3, n_basis + 3) in float64 on the CPU."""
        return (self.sums / max(1, self.count)).cpu()


class ValueMoments(Moments):
    """Moments and extremes, and the mean absolute value."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.absolute = torch.zeros(channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        super().add(rows)
        self.absolute = self.absolute + rows.double().abs().sum(0)

    def all_reduce(self) -> None:
        super().all_reduce()
        self.absolute = processes.reduced(self.absolute)


class GradientMoments:
    """Sum of squares per output of the gradients of the summed loss."""

    def __init__(self, channels: int) -> None:
        self.squares, self.count = torch.zeros(channels, dtype=torch.float64), 0

    def add(self, rows: Tensor) -> None:
        self.squares = self.squares + rows.double().square().sum(0)
        self.count += rows.shape[0]

    def all_reduce(self) -> None:
        self.squares, self.count = processes.reduced(self.squares), int(processes.reduced(torch.tensor(self.count)))

    def rms(self) -> Tensor:
        """(channels,) on the CPU."""
        return (self.squares / max(1, self.count)).sqrt().cpu()
