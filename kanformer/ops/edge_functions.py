"""Shared edges: one learned function per group of channels, elementwise. Saves x and the numbers of the functions only."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases import basis_of
from kanformer.bases.base import Basis
from kanformer.ops.backend import run, wants_compiled
from kanformer.ops.plain import needs_gradient, plain_wanted, without_autocast
from kanformer.ops.reference import reference_edge_functions, work_dtype
from kanformer.ops.registration import register_gradients
from kanformer.ops.spline_table import table_gradients, table_values
from kanformer.ops.uniform import chunk_rows, has_table

_SUM_ROWS = 4096  # tokens whose gradients one kernel adds up: float32 sums stay short


def edge_functions(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis, inner: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """start + sum_c coef[g(i), c] * B[c](x_i); see `reference_edge_functions` for shapes. Uniform knots are taken to be uniform."""
    if plain_wanted():
        return reference_edge_functions(x, coef, grid, basis, inner, start)
    return _edge_functions(x, start, coef, grid, inner, basis.spec, needs_gradient(x, start, coef, inner))


@torch.library.custom_op("kanformer::edge_functions", mutates_args=())
def _edge_functions(x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, training: bool) -> Tensor:
    with without_autocast(x):
        basis, dtype = basis_of(spec), work_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        base = None if start is None else start.reshape(flat.shape)
        y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        compiled = wants_compiled(x, training)
        if not compiled and has_table(basis):
            table_values(y, flat, base, coef, grid, basis, dtype)
            return y.view(x.shape)
        spread, constants = _per_channel(flat, coef, grid, inner, basis, dtype)
        for rows in _chunks(flat, basis, compiled):
            y[rows] = run(_values, (flat[rows], None if base is None else base[rows], spread, constants), (basis,), compiled)
        return y.view(x.shape)


@torch.library.custom_op("kanformer::edge_functions_backward", mutates_args=())
def _edge_functions_backward(
    grad: Tensor, x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, needs_x: bool, needs_coef: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        basis, dtype = basis_of(spec), work_dtype(x)
        flat, flat_grad = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, grad))
        grad_x = torch.empty(flat.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
        compiled = wants_compiled(x, True)
        if not compiled and has_table(basis):
            grad_coef = table_gradients(grad_x, flat, flat_grad, coef, grid, basis, dtype, needs_x, needs_coef)
            return grad_x.view(x.shape) if needs_x else grad_x, grad_coef.to(coef.dtype), coef.new_empty(0)
        spread, constants = _per_channel(flat, coef, grid, inner, basis, dtype)
        sums = torch.zeros(basis.n_basis + basis.n_inner, flat.shape[1], dtype=dtype, device=x.device)
        for rows in _chunks(flat, basis, compiled):
            piece, part = run(_gradients, (flat[rows], flat_grad[rows], spread, constants), (basis,), compiled)
            sums += part
            if needs_x:
                grad_x[rows] = piece
        per_group = sums.view(sums.shape[0], coef.shape[0], -1).sum(-1).t()
        grad_coef, grad_inner = per_group[:, : basis.n_basis], per_group[:, basis.n_basis :]
        inner_like = coef if inner is None else inner
        return (
            grad_x.view(x.shape) if needs_x else grad_x,
            grad_coef.to(coef.dtype, copy=True) if needs_coef else coef.new_empty(0),
            grad_inner.to(inner_like.dtype, copy=True) if inner is not None else inner_like.new_empty(0),
        )


def _values(x: Tensor, start: Tensor | None, coef: Tensor, constants: Tensor, basis: Basis) -> Tensor:
    value = basis.value(x.to(coef.dtype), coef, constants)
    return (value if start is None else start.to(coef.dtype) + value).to(x.dtype)


def _gradients(x: Tensor, grad: Tensor, coef: Tensor, constants: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """(gradient of x, sums over tokens (n_basis + n_inner, channels))."""
    grad_x, members, inner = basis.pullback(x.to(coef.dtype), grad.to(coef.dtype), coef, constants)
    return grad_x.to(x.dtype), torch.stack([part.sum(0) for part in (*members, *inner)])


def _per_channel(x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(coefficients (n_basis, channels), constants (quantities, channels)): one column per channel, whatever the groups."""
    constants = basis.constants(grid.to(dtype), None if inner is None else inner.to(dtype))
    repeats = x.shape[1] // coef.shape[0]
    return coef.to(dtype).t().repeat_interleave(repeats, 1), constants.repeat_interleave(repeats, 1).contiguous()


def _chunks(x: Tensor, basis: Basis, compiled: bool) -> list[slice]:
    step = _SUM_ROWS if compiled else chunk_rows(x.shape[1] * (basis.n_basis + 4) * 8)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


@_edge_functions.register_fake
def _(x, start, coef, grid, inner, spec, training):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


register_gradients(_edge_functions, _edge_functions_backward, reference_edge_functions)
