"""Full edges: one function per edge, as one GEMM over the basis. Saves x and the numbers of the functions; the basis lives one chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases import basis_of
from kanformer.bases.base import Basis
from kanformer.ops.backend import run, triton_kernels, wants_compiled
from kanformer.ops.plain import autocast_matrix, needs_gradient, operators_wanted, plain_wanted, without_autocast
from kanformer.ops.reference import reference_full_edges, work_dtype
from kanformer.ops.registration import direct_function, filled, register_gradients
from kanformer.ops.spline_planes import SplinePlanes
from kanformer.ops.uniform import chunk_rows, has_table, row_slices


def full_edges(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis, inner: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """start + sum_i sum_c coef[o, c, i] * B[c](x_i); see `reference_full_edges` for shapes. Uniform knots are taken to be uniform."""
    coef = autocast_matrix(x, coef)
    if plain_wanted():
        return reference_full_edges(x, coef, grid, basis, inner, start)
    training = needs_gradient(x, start, coef, inner)
    if operators_wanted(x):
        return _full_edges(x, start, coef, grid, inner, basis.spec, training)
    return _direct(x, start, coef, grid, inner, basis.spec, training, None)


def _forward(x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, training: bool, base: None = None) -> Tensor:
    shape = (*x.shape[:-1], coef.shape[0])
    if start is None:
        y = torch.empty(shape, dtype=coef.dtype, device=x.device)
    else:
        y = start.to(coef.dtype, copy=True).reshape(shape).contiguous()
    add_splines(y, x, coef, grid, inner, spec, training, fresh=start is None)
    return y.to(x.dtype if start is None else start.dtype)


def add_splines(y: Tensor, x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, training: bool, fresh: bool = False) -> None:
    """y (..., out), contiguous and in the dtype of coef, += the learned functions of x (..., in); `fresh`: they replace what is there."""
    with without_autocast(x):
        flat, outputs = x.reshape(-1, x.shape[-1]), coef.shape[0]
        total, matrix = y.view(-1, outputs), coef.reshape(outputs, -1).t()
        if (kernels := triton_kernels(x, basis_of(spec))) is not None:
            total.copy_(kernels.full_values(flat, None if fresh else total, coef, grid, inner, basis_of(spec)))
            return
        planes = _planes(x, grid, inner, spec, wants_compiled(x, training))
        for rows in planes.chunks(flat.shape[0]):
            total[rows].addmm_(planes.values(flat[rows], coef.dtype), matrix, beta=0 if fresh else 1)


def spline_gradients(
    grad: Tensor, x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, needs_x: bool, needs_coef: bool, base: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, coef and inner for `grad` (..., out); empty tensors for those that are not needed."""
    with without_autocast(x):
        flat = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, coef.shape[0]).to(coef.dtype)
        if (kernels := triton_kernels(x, basis_of(spec))) is not None:
            return filled(kernels.full_gradients(flat, grad, coef, grid, inner, basis_of(spec), needs_x, needs_coef), x, coef, inner)
        dtype, matrix = work_dtype(x), coef.reshape(coef.shape[0], -1)
        planes = _planes(x, grid, inner, spec, wants_compiled(x, True))
        grad_x = torch.empty(flat.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
        # bf16 sums over many chunks would lose the small ones, so they are added up in the working dtype.
        grad_coef: Tensor | None = None
        grad_inner = torch.zeros((0,) if inner is None else inner.shape, dtype=dtype, device=x.device)
        for rows in planes.chunks(flat.shape[0]):
            if needs_x or inner is not None:
                values, piece, part = planes.backward(flat[rows], torch.mm(grad[rows], matrix), coef.dtype if needs_coef else None)
                if needs_x:
                    grad_x[rows] = piece
                if inner is not None:
                    grad_inner += part
            else:
                values = planes.values(flat[rows], coef.dtype)
            if values is not None:
                grad_coef = _added(grad_coef, grad[rows].t(), values, dtype)
        if grad_coef is None:
            grad_coef = torch.zeros(matrix.shape if needs_coef else (0,), dtype=coef.dtype, device=x.device)
        return (
            grad_x.view(x.shape) if needs_x else grad_x,
            grad_coef.to(coef.dtype).view(coef.shape) if needs_coef else coef.new_empty(0),
            grad_inner.to(coef.dtype if inner is None else inner.dtype),
        )


_full_edges = torch.library.custom_op(
    "kanformer::full_edges",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? start, Tensor coef, Tensor grid, Tensor? inner, str spec, bool training) -> Tensor",
)
_full_edges_backward = torch.library.custom_op(
    "kanformer::full_edges_backward",
    spline_gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor coef, Tensor grid, Tensor? inner, str spec, bool needs_x, bool needs_coef) -> (Tensor, Tensor, Tensor)",
)


def _added(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, in `dtype`."""
    if total is None:
        return torch.mm(left, right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(torch.mm(left, right))


class _ElementwisePlanes:
    """The basis of a chunk in planar layout (tokens, n_basis, in_features), by the basis' own elementwise formulas."""

    def __init__(self, basis: Basis, grid: Tensor, inner: Tensor | None, dtype: torch.dtype, compiled: bool) -> None:
        self.basis, self.compiled = basis, compiled
        self.constants = basis.constants(grid.to(dtype), None if inner is None else inner.to(dtype)).contiguous()
        self.bytes_per_token = grid.shape[0] * basis.n_basis * dtype.itemsize * (1 if compiled else 2)

    def chunks(self, tokens: int) -> list[slice]:
        return row_slices(tokens, chunk_rows(self.bytes_per_token))

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, n_basis * in_features) in the dtype of the GEMM."""
        return run(_plane_values, (x, self.constants), (self.basis, dtype), self.compiled).view(x.shape[0], -1)

    def backward(self, x: Tensor, grad_members: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """(`values` unless dtype is None, sum_c grad_members[:, c, i] * B'[c](x_i) (tokens, in_features), the gradient of the inner numbers)."""
        members = grad_members.view(x.shape[0], -1, x.shape[1])
        values, total, inner = run(_plane_backward, (x, members, self.constants), (self.basis, dtype), self.compiled)
        return None if dtype is None else values.view(x.shape[0], -1), total, inner


def _plane_values(x: Tensor, constants: Tensor, basis: Basis, dtype: torch.dtype) -> Tensor:
    return torch.stack([plane.to(dtype) for plane in basis.planes(x.to(constants.dtype), constants)], 1)


def _plane_backward(x: Tensor, grad_members: Tensor, constants: Tensor, basis: Basis, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    values = x if dtype is None else _plane_values(x, constants, basis, dtype)
    x = x.to(constants.dtype)
    members = grad_members.unbind(1)
    total = basis.slope(x, members, constants)
    if not basis.n_inner:
        return values, total, total.new_zeros(0)
    return values, total, torch.stack([part.sum(0) for part in basis.inner_slopes(x, constants, basis.value(x, members, constants))], -1)


def _planes(x: Tensor, grid: Tensor, inner: Tensor | None, spec: str, compiled: bool) -> _ElementwisePlanes | SplinePlanes:
    basis = basis_of(spec)
    if not compiled and has_table(basis):
        return SplinePlanes(grid, basis, work_dtype(x), x.shape[-1])
    return _ElementwisePlanes(basis, grid, inner, work_dtype(x), compiled)


@_full_edges.register_fake
def _(x, start, coef, grid, inner, spec, training):
    return torch.empty((*x.shape[:-1], coef.shape[0]), dtype=x.dtype if start is None else start.dtype, device=x.device)


register_gradients(_full_edges, _full_edges_backward, reference_full_edges)
_direct = direct_function(_forward, spline_gradients, reference_full_edges)
