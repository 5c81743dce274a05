"""Full edges: one function per edge, as one GEMM over the basis. Saves x and the coefficients; the basis lives one chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline, local_polynomials
from kanformer.ops.reference import reference_full_edges, work_dtype
from kanformer.ops.uniform import cell_scale, chunk_rows, locate


def full_edges(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis) -> Tensor:
    """sum_i sum_c coef[o, c, i] * B[c](x_i); see `reference_full_edges` for shapes. B-spline grids must be uniform."""
    if isinstance(basis, BSpline):
        return cast(Tensor, _SplineEdges.apply(x, coef, grid, basis))
    return reference_full_edges(x, coef, grid, basis)


class _SplineEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, coef: Tensor, grid: Tensor, basis: BSpline) -> Tensor:
        ctx.save_for_backward(x, coef, grid)
        ctx.basis = basis
        flat = x.reshape(-1, x.shape[-1])
        planes = _Planes(grid, basis, work_dtype(x), x.shape[-1])
        matrix = coef.reshape(coef.shape[0], -1).t()
        y = torch.empty(flat.shape[0], coef.shape[0], dtype=coef.dtype, device=x.device)
        for rows in planes.chunks(flat.shape[0]):
            torch.mm(planes.basis_values(flat[rows]).to(coef.dtype), matrix, out=y[rows])
        return y.to(x.dtype).view(*x.shape[:-1], coef.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, coef, grid = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, coef.shape[0]).to(coef.dtype)
        planes = _Planes(grid, ctx.basis, work_dtype(x), x.shape[-1])
        matrix = coef.reshape(coef.shape[0], -1)
        grad_x = torch.empty(flat.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        # bf16 sums over many chunks would lose the small ones, so they are added up in the working dtype.
        grad_coef = torch.zeros(matrix.shape, dtype=planes.dtype, device=x.device) if ctx.needs_input_grad[1] else None
        for rows in planes.chunks(flat.shape[0]):
            if grad_coef is not None:
                grad_coef += torch.mm(grad[rows].t(), planes.basis_values(flat[rows]).to(coef.dtype))
            if grad_x is not None:
                grad_x[rows] = planes.input_gradient(flat[rows], torch.mm(grad[rows], matrix).to(planes.dtype))
        grad_coef = None if grad_coef is None else grad_coef.to(coef.dtype).view(coef.shape)
        return None if grad_x is None else grad_x.view(x.shape), grad_coef, None, None


class _Planes:
    """The basis of a chunk in planar layout (tokens, n_basis, in_features): only k+1 members are not 0 at any x."""

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

    def basis_values(self, x: Tensor) -> Tensor:
        """(tokens, n_basis * in_features)."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        local = torch.stack([self._polynomial(r, u) for r in range(self.order + 1)], 1)
        padded = local.new_zeros(x.shape[0], self.basis.n_basis + 2 * self.pad, self.features)
        padded.scatter_(1, self._members(window), local)
        return padded[:, self.pad : self.pad + self.basis.n_basis].reshape(x.shape[0], -1)

    def input_gradient(self, x: Tensor, grad_members: Tensor) -> Tensor:
        """sum_c grad_members[:, c, i] * B'[c](x_i): (tokens, in_features)."""
        window, u = locate(x.to(self.dtype), self.lo, self.per_unit, self.basis)
        padded = torch.nn.functional.pad(grad_members.view(x.shape[0], -1, self.features), (0, 0, self.pad, self.pad))
        active = padded.gather(1, self._members(window))
        total = torch.zeros_like(u)
        for r in range(self.order + 1):
            total.addcmul_(active[:, r], self._slope(r, u))
        return total.mul_(self.per_unit)

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
