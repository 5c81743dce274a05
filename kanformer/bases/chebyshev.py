"""Chebyshev polynomials of the first kind on the grid range."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import RangeBasis


class Chebyshev(RangeBasis):
    """T[0..G](t) with t in [-1, 1] over the grid range; `grid_size` is the degree. Beyond the range each stays at its end value."""

    name = "chebyshev"
    source = "Sidharth et al. 2024, Chebyshev polynomial-based KANs, arXiv 2405.07200 (there with tanh instead of a range)"

    @property
    def n_basis(self) -> int:
        return self.grid_size + 1

    @property
    def member_flops(self) -> int:
        return 3 + 2 * max(0, self.grid_size - 1)

    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        t = self._position(x, constants).clamp(-1, 1)
        found = [t - t + 1, t]
        while len(found) < self.n_basis:
            found.append(2 * t * found[-1] - found[-2])
        return found

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """T'[n] = n U[n-1], with U the polynomials of the second kind."""
        position = self._position(x, constants)
        t = position.clamp(-1, 1)
        second = [t - t + 1, 2 * t]
        while len(second) < self.n_basis:
            second.append(2 * t * second[-1] - second[-2])
        # At the very ends the slope from inside, as the tangent of a linear extrapolation needs it.
        unit = torch.where((position < -1) | (position > 1), 0.0, 2 * constants[1] / self.grid_size)
        return [t - t, *(degree * unit * second[degree - 1] for degree in range(1, self.n_basis))]

    def _position(self, x: Tensor, constants: Tensor) -> Tensor:
        return (x - constants[0]) * (2 * constants[1] / self.grid_size) - 1

    def _clamped(self, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        inside, beyond = super()._clamped(x, constants)
        # Rounding must not carry the clamped point over the end, where the slope is 0.
        nearer = inside - (beyond.sign() * 1e-6 * (self.grid_size / constants[1]))
        return nearer, x - nearer

    def nested_members(self, grid_size: int) -> list[int]:
        """Which members of the basis with a larger `grid_size` on the same range are the members of this one, in order."""
        return list(range(self.n_basis))

    def sympy_members(self, x, lo, hi):
        from sympy import Max, Min, chebyshevt

        t = Max(-1, Min(1, 2 * (x - lo) / (hi - lo) - 1))
        return [chebyshevt(degree, t) for degree in range(self.n_basis)]
