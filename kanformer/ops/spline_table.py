"""Shared edges on uniform splines without a compiler: piecewise polynomials looked up per cell, chunk by chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.bases.bspline import BSpline
from kanformer.ops.uniform import cell_scale, chunk_rows, local_matrix, locate


def table_values(y: Tensor, x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype) -> None:
    """Fills y (tokens, channels) with start + the functions of x; see `reference_edge_functions`."""
    table = _Table(coef, grid, basis, dtype, x.shape[-1])
    for rows in table.chunks(x.shape[0]):
        _, u, polynomial = table.lookup(x[rows])
        value = _horner(polynomial, u)
        y[rows] = value if start is None else value.add_(start[rows])


def table_gradients(
    grad_x: Tensor, x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype, needs_x: bool, needs_coef: bool
) -> Tensor:
    """Fills grad_x if needed and returns the gradient of the coefficients, (groups, n_basis) or empty."""
    table = _Table(coef, grid, basis, dtype, x.shape[-1])
    moments = torch.zeros_like(table.polynomials)
    for rows in table.chunks(x.shape[0]):
        index, u, polynomial = table.lookup(x[rows])
        chunk = grad[rows].to(dtype)
        if needs_x:
            grad_x[rows] = _horner_slope(polynomial, u).mul_(table.per_unit).mul_(chunk)
        if needs_coef:
            _add_moments(moments, index, u, chunk)
    return table.fold(moments).contiguous() if needs_coef else moments.new_empty(0)


class _Table:
    """The functions of all groups as polynomials per cell, and where a batch falls in them."""

    def __init__(self, coef: Tensor, grid: Tensor, basis: BSpline, dtype: torch.dtype, channels: int) -> None:
        self.basis, self.dtype, self.groups = basis, dtype, coef.shape[0]
        self.order = basis.spline_order
        self.matrix = local_matrix(basis, torch.empty(0, dtype=dtype, device=coef.device))
        padded = F.pad(coef.to(dtype), (self.order + 1, self.order + 1))
        windows = padded.unfold(1, self.order + 1, 1)
        self.n_windows = windows.shape[1]
        self.polynomials = (windows @ self.matrix).reshape(-1, self.order + 1)
        repeats = channels // self.groups
        lo, per_unit = cell_scale(grid, basis, dtype)
        self.lo, self.per_unit = lo.repeat_interleave(repeats), per_unit.repeat_interleave(repeats)
        self.offset = torch.arange(self.groups, device=coef.device).repeat_interleave(repeats) * self.n_windows

    def chunks(self, tokens: int):
        bytes_per_token = self.lo.numel() * (self.order + 1) * self.polynomials.element_size()
        step = chunk_rows(bytes_per_token)
        return [slice(start, start + step) for start in range(0, tokens, step)]

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flat table rows (tokens, channels), positions u, and the polynomials there (tokens, channels, degree+1)."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        index = window.add_(self.offset)
        return index, u, F.embedding(index, self.polynomials)

    def fold(self, moments: Tensor) -> Tensor:
        """Gradients of the table (groups * windows, degree+1) turned into gradients of the coefficients (groups, n_basis)."""
        members = moments.view(self.groups, self.n_windows, self.order + 1) @ self.matrix.t()
        total = members.new_zeros(self.groups, self.n_windows + self.order)
        for r in range(self.order + 1):
            total[:, r : r + self.n_windows] += members[..., r]
        return total[:, self.order + 1 : self.order + 1 + self.basis.n_basis]


def _horner(polynomial: Tensor, u: Tensor) -> Tensor:
    degree = polynomial.shape[-1] - 1
    value = polynomial[..., degree] + 0 * u if degree == 0 else polynomial[..., degree]
    for power in range(degree - 1, -1, -1):
        value = torch.addcmul(polynomial[..., power], value, u)
    return value


def _horner_slope(polynomial: Tensor, u: Tensor) -> Tensor:
    degree = polynomial.shape[-1] - 1
    value = degree * polynomial[..., degree] + (0 * u if degree <= 1 else 0)
    for power in range(degree - 1, 0, -1):
        value = torch.addcmul(power * polynomial[..., power], value, u)
    return value


def _add_moments(moments: Tensor, index: Tensor, u: Tensor, grad: Tensor) -> None:
    """moments[index, p] += grad * u^p, where u^0 = 1."""
    flat, weight = index.reshape(-1), grad.reshape(-1)
    powers = u.reshape(-1)
    for power in range(moments.shape[1]):
        column = torch.zeros(moments.shape[0], dtype=moments.dtype, device=moments.device)
        moments[:, power] += column.scatter_add_(0, flat, weight)
        if power + 1 < moments.shape[1]:
            weight = weight * powers
