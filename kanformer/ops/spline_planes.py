"""Full edges on uniform splines without a compiler: only k+1 members are not 0 at any x, so those are computed and scattered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kanformer.bases.bspline import BSpline, local_polynomials
from kanformer.ops.uniform import cell_scale, chunk_rows, locate


class SplinePlanes:
    """The basis of a chunk in planar layout (tokens, n_basis, in_features)."""

    def __init__(self, grid: Tensor, basis: BSpline, dtype: torch.dtype, features: int) -> None:
        self.basis, self.dtype, self.features = basis, dtype, features
        self.order = basis.spline_order
        self.factors = local_polynomials(self.order)
        self.lo, self.per_unit = cell_scale(grid, basis, dtype)
        self.pad = self.order + 1

    def chunks(self, tokens: int):
        bytes_per_token = self.features * (self.basis.n_basis + 2 * self.pad) * (8 if self.dtype == torch.float64 else 4)
        step = chunk_rows(bytes_per_token)
        return [slice(start, start + step) for start in range(0, tokens, step)]

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, n_basis * in_features) in the dtype of the GEMM."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        local = torch.stack([self._polynomial(r, u) for r in range(self.order + 1)], 1)
        padded = local.new_zeros(x.shape[0], self.basis.n_basis + 2 * self.pad, self.features)
        padded.scatter_(1, self._members(window), local)
        return padded[:, self.pad : self.pad + self.basis.n_basis].reshape(x.shape[0], -1).to(dtype)

    def gradients(self, x: Tensor, grad_members: Tensor) -> tuple[Tensor, Tensor]:
        """sum_c grad_members[:, c, i] * B'[c](x_i), (tokens, in_features), and nothing: splines have no inner numbers."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        padded = torch.nn.functional.pad(grad_members.to(self.dtype).view(x.shape[0], -1, self.features), (0, 0, self.pad, self.pad))
        active = padded.gather(1, self._members(window))
        total = torch.zeros_like(u)
        for r in range(self.order + 1):
            total.addcmul_(active[:, r], self._slope(r, u))
        return total.mul_(self.per_unit), total.new_empty(0)

    def _members(self, window: Tensor) -> Tensor:
        return window.unsqueeze(1) + torch.arange(self.order + 1, device=window.device).view(1, -1, 1)

    def _polynomial(self, r: int, u: Tensor) -> Tensor:
        return _horner(self.factors[r], u)

    def _slope(self, r: int, u: Tensor) -> Tensor:
        return _horner([power * factor for power, factor in enumerate(self.factors[r])][1:] or [0.0], u)


def _horner(factors: Sequence[float], u: Tensor) -> Tensor:
    """The polynomial with these ascending factors at u; nan stays nan."""
    value = u * 0 + factors[-1]
    for factor in reversed(factors[:-1]):
        value = value.mul_(u).add_(factor)
    return value
