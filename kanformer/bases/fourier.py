"""Sines and cosines over the grid range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kanformer.bases.base import RangeBasis


class Fourier(RangeBasis):
    """cos(m w) and sin(m w), m = 1..G, with w from 0 to pi over the grid range, so that the period is twice the range."""

    name = "fourier"
    source = "Xu et al. 2024, FourierKAN-GCF, arXiv 2406.01034, equation 6 (there without a range)"
    unbounded = True

    @property
    def n_basis(self) -> int:
        return 2 * self.grid_size

    @property
    def member_flops(self) -> int:
        return 4 + 6 * (self.grid_size - 1)

    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        cosines, sines = self._harmonics(x, constants)
        return [*cosines, *sines]

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        cosines, sines = self._harmonics(x, constants)
        unit = constants[1] * (math.pi / self.grid_size)
        orders = range(1, self.grid_size + 1)
        return [*(-m * unit * sine for m, sine in zip(orders, sines, strict=True)), *(m * unit * cosine for m, cosine in zip(orders, cosines, strict=True))]

    def _harmonics(self, x: Tensor, constants: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(cosines, sines) of all orders from one sine and one cosine, by the addition theorem."""
        angle = (x - constants[0]) * constants[1] * (math.pi / self.grid_size)
        cosines, sines = [torch.cos(angle)], [torch.sin(angle)]
        for _ in range(1, self.grid_size):
            c, s = cosines[-1], sines[-1]
            cosines.append(c * cosines[0] - s * sines[0])
            sines.append(s * cosines[0] + c * sines[0])
        return cosines, sines

    def nested_members(self, grid_size: int) -> list[int]:
        """Which members of the basis with a larger `grid_size` on the same range are the members of this one, in order."""
        return [*range(self.grid_size), *range(grid_size, grid_size + self.grid_size)]

    def sympy_members(self, x, lo, hi):
        from sympy import cos, pi, sin

        angle = pi * (x - lo) / (hi - lo)
        orders = range(1, self.grid_size + 1)
        return [*(cos(m * angle) for m in orders), *(sin(m * angle) for m in orders)]
