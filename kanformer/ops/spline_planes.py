"""Full edges on uniform splines without a compiler: only k+1 members are not 0 at any x, so those are computed and scattered."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.bspline import BSpline, local_members
from kanformer.ops.uniform import cell_scale, chunk_rows, locate, row_slices


class SplinePlanes:
    """The basis of a chunk in planar layout (tokens, n_basis, in_features)."""

    def __init__(self, grid: Tensor, basis: BSpline, dtype: torch.dtype, features: int) -> None:
        self.basis, self.dtype, self.features = basis, dtype, features
        self.order = basis.spline_order
        self.lo, self.per_unit = cell_scale(grid, basis, dtype)
        self.pad = self.order + 1

    def chunks(self, tokens: int) -> list[slice]:
        bytes_per_token = self.features * (self.basis.n_basis + 2 * self.pad) * (8 if self.dtype == torch.float64 else 4)
        return row_slices(tokens, chunk_rows(bytes_per_token))

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, n_basis * in_features) in the dtype of the GEMM."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        return self._scattered(self._members(window), u, dtype)

    def backward(self, x: Tensor, grad_members: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """(`values` unless dtype is None, sum_c grad_members[:, c, i] * B'[c](x_i) (tokens, in_features), nothing: splines have no inner numbers)."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        members = self._members(window)
        values = None if dtype is None else self._scattered(members, u, dtype)
        if self.order == 0:
            return values, u - u, u.new_empty(0)
        padded = torch.nn.functional.pad(grad_members.to(self.dtype).view(x.shape[0], -1, self.features), (0, 0, self.pad, self.pad))
        active = padded.gather(1, members)
        steps, total = active[:, 1:] - active[:, :-1], torch.zeros_like(u)  # de Boor: differences, and members of one degree less
        for r, member in enumerate(local_members(u, self.order - 1)):
            total.addcmul_(steps[:, r], member)
        return values, total.mul_(self.per_unit), total.new_empty(0)

    def _scattered(self, members: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
        local = torch.stack(local_members(u, self.order), 1)
        padded = local.new_zeros(u.shape[0], self.basis.n_basis + 2 * self.pad, self.features)
        padded.scatter_(1, members, local)
        return padded[:, self.pad : self.pad + self.basis.n_basis].reshape(u.shape[0], -1).to(dtype)

    def _members(self, window: Tensor) -> Tensor:
        return window.unsqueeze(1) + torch.arange(self.order + 1, device=window.device).view(1, -1, 1)
