"""Shared edges on uniform splines without a compiler: piecewise polynomials looked up per cell, chunk by chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.bases.bspline import BSpline
from kanformer.ops.uniform import cell_scale, chunk_rows, local_matrix, locate, row_slices


def table_values(y: Tensor, x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype) -> None:
    """Fills y (tokens, channels) with start + the functions of x; see `reference_edge_functions`."""
    table = _Table(coef, grid, basis, dtype, x.shape[-1])
    for rows in table.chunks(x.shape[0]):
        index, u = table.locate(x[rows])
        value = table.horner(table.polynomials, index, u)
        y[rows] = value if start is None else value.add_(start[rows])


def table_gradients(
    grad_x: Tensor, x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype, needs_x: bool, needs_coef: bool
) -> Tensor:
    """Fills grad_x if needed and returns the gradient of the coefficients, (groups, n_basis) or empty."""
    table = _Table(coef, grid, basis, dtype, x.shape[-1])
    slopes = table.slopes() if needs_x else None
    moments = torch.zeros_like(table.polynomials)
    for rows in table.chunks(x.shape[0]):
        index, u = table.locate(x[rows])
        chunk = grad[rows].to(dtype)
        if slopes is not None:
            grad_x[rows] = table.horner(slopes, index, u).mul_(table.per_unit).mul_(chunk)
        if needs_coef:
            _add_moments(moments, index, u, chunk)
    return table.fold(moments).contiguous() if needs_coef else moments.new_empty(0)


class _Table:
    """The functions of all groups as polynomials per cell, one line per power (degree+1, groups * windows), and where a batch falls in them."""

    def __init__(self, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype, channels: int) -> None:
        self.basis, self.dtype, self.groups = basis, dtype, coef.shape[0]
        self.order = basis.spline_order
        self.matrix = local_matrix(basis, torch.empty(0, dtype=dtype, device=coef.device))
        padded = F.pad(coef.to(dtype), (self.order + 1, self.order + 1))
        windows = padded.unfold(1, self.order + 1, 1)
        self.n_windows = windows.shape[1]
        self.polynomials = (windows @ self.matrix).reshape(-1, self.order + 1).t().contiguous()
        repeats = channels // self.groups
        lo, per_unit = cell_scale(grid, basis, dtype)
        self.lo, self.per_unit = lo.repeat_interleave(repeats), per_unit.repeat_interleave(repeats)
        self.offset = torch.arange(self.groups, device=coef.device).repeat_interleave(repeats) * self.n_windows

    def chunks(self, tokens: int) -> list[slice]:
        return row_slices(tokens, chunk_rows(self.lo.numel() * 4 * self.polynomials.element_size()))

    def locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the table and in the cell, both (tokens, channels)."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        return window.add_(self.offset), u

    def slopes(self) -> Tensor:
        """The derivatives of the polynomials for u, (degree or 1, groups * windows)."""
        powers = torch.arange(1, self.order + 1, dtype=self.dtype, device=self.polynomials.device)
        return self.polynomials[1:] * powers.unsqueeze(1) if self.order else torch.zeros_like(self.polynomials)

    @staticmethod
    def horner(lines: Tensor, index: Tensor, u: Tensor) -> Tensor:
        """The polynomials with these factors, one line per power, at u; nan stays nan."""
        place = index.view(-1)
        value = lines[-1].index_select(0, place).view(u.shape)
        if len(lines) == 1:
            return value.addcmul_(u, u.new_zeros(()))
        for line in lines[:-1].flip(0):
            value = value.mul_(u).add_(line.index_select(0, place).view(u.shape))  # addcmul takes three times as long
        return value

    def fold(self, moments: Tensor) -> Tensor:
        """Gradients of the table (degree+1, groups * windows) turned into gradients of the coefficients (groups, n_basis)."""
        members = moments.t().reshape(self.groups, self.n_windows, self.order + 1) @ self.matrix.t()
        total = members.new_zeros(self.groups, self.n_windows + self.order)
        for r in range(self.order + 1):
            total[:, r : r + self.n_windows] += members[..., r]
        return total[:, self.order + 1 : self.order + 1 + self.basis.n_basis]


def _add_moments(moments: Tensor, index: Tensor, u: Tensor, grad: Tensor) -> None:
    """moments[p, index] += grad * u^p, where u^0 = 1."""
    flat, weight, powers = index.view(-1), grad.reshape(-1), u.view(-1)
    for power in range(moments.shape[0]):
        moments[power] += torch.zeros_like(moments[power]).scatter_add_(0, flat, weight)
        if power + 1 < moments.shape[0]:
            weight = weight * powers
