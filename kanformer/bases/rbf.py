"""Gaussian radial basis functions at evenly spaced centres."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import RangeBasis

_FAR = 30.0  # cells from a centre, where exp(-z^2) has long been 0


class GaussianRBF(RangeBasis):
    """exp(-((x - centre) / h)^2) at the G + 1 grid points, with h the width of a cell. Fades to 0 beyond the range."""

    name = "rbf"
    source = "Li 2024, Kolmogorov-Arnold Networks are Radial Basis Function Networks, arXiv 2405.06721, equation 8"

    @property
    def n_basis(self) -> int:
        return self.grid_size + 1

    @property
    def member_flops(self) -> int:
        return 2 + 3 * self.n_basis

    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        return [torch.exp(-z * z) for z in self._distances(x, constants)]

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        return [-2 * constants[1] * z * torch.exp(-z * z) for z in self._distances(x, constants)]

    def _distances(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        t = (x - constants[0]) * constants[1]
        return [(t - centre).clamp(-_FAR, _FAR) for centre in range(self.n_basis)]

    def sympy_members(self, x, lo, hi):
        from sympy import exp

        width = (hi - lo) / self.grid_size
        return [exp(-(((x - lo) / width - centre) ** 2)) for centre in range(self.n_basis)]
