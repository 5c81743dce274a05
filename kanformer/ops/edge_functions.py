"""Shared edges: one learned function per group of channels, elementwise. Saves x and the coefficients only."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline
from kanformer.ops.reference import reference_edge_functions, work_dtype
from kanformer.ops.uniform import cell_scale, chunk_rows, local_matrix, locate


def edge_functions(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis) -> Tensor:
    """sum_c coef[g(i), c] * B[c](x_i); see `reference_edge_functions` for shapes. B-spline grids must be uniform."""
    if isinstance(basis, BSpline):
        return cast(Tensor, _SplineFunctions.apply(x, coef, grid, basis))
    return reference_edge_functions(x, coef, grid, basis)


class _SplineFunctions(torch.autograd.Function):
    """Piecewise polynomials looked up per cell: (groups, cells, degree+1) numbers instead of (tokens, channels, n_basis)."""

    @staticmethod
    def forward(ctx, x: Tensor, coef: Tensor, grid: Tensor, basis: BSpline) -> Tensor:
        ctx.save_for_backward(x, coef, grid)
        ctx.basis = basis
        flat = x.reshape(-1, x.shape[-1])
        y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        table = _Table(coef, grid, basis, work_dtype(x), x.shape[-1])
        for rows in table.chunks(flat.shape[0]):
            _, u, polynomial = table.lookup(flat[rows])
            y[rows] = _horner(polynomial, u)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, coef, grid = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        table = _Table(coef, grid, ctx.basis, work_dtype(x), x.shape[-1])
        grad_x = torch.empty(flat.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        moments = torch.zeros_like(table.polynomials) if ctx.needs_input_grad[1] else None
        for rows in table.chunks(flat.shape[0]):
            index, u, polynomial = table.lookup(flat[rows])
            chunk = grad[rows].to(table.dtype)
            if grad_x is not None:
                grad_x[rows] = _horner_slope(polynomial, u).mul_(table.per_unit).mul_(chunk)
            if moments is not None:
                _add_moments(moments, index, u, chunk)
        grad_coef = None if moments is None else table.fold(moments).to(coef.dtype)
        return None if grad_x is None else grad_x.view(x.shape), grad_coef, None, None


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
