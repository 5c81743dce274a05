"""Shared edges: one learned function per group of channels, elementwise. Saves x and the numbers of the functions only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanformer.bases import basis_of
from kanformer.bases.base import Basis
from kanformer.ops.backend import run, triton_kernels, wants_compiled
from kanformer.ops.fused_base import base_pullback, fused_base
from kanformer.ops.plain import needs_gradient, operators_wanted, plain_wanted, without_autocast
from kanformer.ops.reference import reference_edge_functions, work_dtype
from kanformer.ops.registration import direct_function, filled, register_gradients
from kanformer.ops.spline_table import table_gradients, table_values
from kanformer.ops.uniform import chunk_rows, has_table, row_slices

_SUM_ROWS = 2**16  # tokens whose gradients one kernel adds up: float32 sums stay short


def edge_functions(
    x: Tensor,
    coef: Tensor,
    grid: Tensor,
    basis: Basis,
    inner: Tensor | None = None,
    start: Tensor | None = None,
    base: nn.Module | None = None,
) -> Tensor:
    """start + sum_c coef[g(i), c] * B[c](x_i); see `reference_edge_functions` for shapes. Uniform knots are taken to be uniform.

    Args:
        base: an elementwise module; start is then base(x).
    """
    training = needs_gradient(x, start, coef, inner)
    plain = plain_wanted()
    apart = plain or operators_wanted(x)
    compiled = not apart and wants_compiled(x, training) and triton_kernels(x, basis) is None
    fused = fused_base(base, x, coef) if compiled else None
    if base is not None and fused is None:
        start = base(x)
    if plain:
        return reference_edge_functions(x, coef, grid, basis, inner, start)
    if apart:
        return _edge_functions(x, start, coef, grid, inner, basis.spec, training)
    return _direct(x, start, coef, grid, inner, basis.spec, training, fused)


def _forward(
    x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str, training: bool, base: nn.Module | None = None
) -> Tensor:
    with without_autocast(x):
        basis, dtype = basis_of(spec), work_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        first = None if start is None else start.reshape(flat.shape)
        if (kernels := triton_kernels(x, basis)) is not None:
            return kernels.shared_values(flat, first, coef, grid, inner, basis).view(x.shape)
        if wants_compiled(x, training):
            spread, constants = _per_channel(flat, coef, grid, inner, basis, dtype)
            return run(_values, (flat, first, spread, constants), (basis, base), True).view(x.shape)
        y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        if has_table(basis):
            table_values(y, flat, first, coef, grid, basis, dtype)
            return y.view(x.shape)
        spread, constants = _per_channel(flat, coef, grid, inner, basis, dtype)
        for rows in _chunks(flat, basis):
            y[rows] = _values(flat[rows], None if first is None else first[rows], spread, constants, basis, base)
        return y.view(x.shape)


def _backward(
    grad: Tensor,
    x: Tensor,
    coef: Tensor,
    grid: Tensor,
    inner: Tensor | None,
    spec: str,
    needs_x: bool,
    needs_coef: bool,
    base: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        basis, dtype, inner_like = basis_of(spec), work_dtype(x), coef if inner is None else inner
        flat, flat_grad = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, grad))
        if (kernels := triton_kernels(x, basis)) is not None:
            return filled(kernels.shared_gradients(flat, flat_grad, coef, grid, inner, basis, needs_x, needs_coef), x, coef, inner)
        compiled = wants_compiled(x, True)
        if not compiled and has_table(basis):
            grad_x = torch.empty(flat.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
            grad_coef = table_gradients(grad_x, flat, flat_grad, coef, grid, basis, dtype, needs_x, needs_coef)
            return grad_x.view(x.shape) if needs_x else grad_x, grad_coef.to(coef.dtype), coef.new_empty(0)
        spread, constants = _per_channel(flat, coef, grid, inner, basis, dtype)
        pieces = [
            run(_gradients, (flat[rows], flat_grad[rows], spread, constants), (basis, base), compiled)
            for rows in (row_slices(len(flat), _SUM_ROWS) if compiled else _chunks(flat, basis))
        ]
        sums = torch.stack([part for _, part in pieces]).sum(0) if pieces else constants.new_zeros(basis.n_basis + basis.n_inner, flat.shape[1])
        per_group = sums.view(sums.shape[0], coef.shape[0], -1).sum(-1).t()
        grad_coef, grad_inner = per_group[:, : basis.n_basis], per_group[:, basis.n_basis :]
        return (
            _joined([piece for piece, _ in pieces], x) if needs_x else x.new_empty(0),
            grad_coef.to(coef.dtype, copy=True) if needs_coef else coef.new_empty(0),
            grad_inner.to(inner_like.dtype, copy=True) if inner is not None else inner_like.new_empty(0),
        )


_edge_functions = torch.library.custom_op(
    "kanformer::edge_functions",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? start, Tensor coef, Tensor grid, Tensor? inner, str spec, bool training) -> Tensor",
)
_edge_functions_backward = torch.library.custom_op(
    "kanformer::edge_functions_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor coef, Tensor grid, Tensor? inner, str spec, bool needs_x, bool needs_coef) -> (Tensor, Tensor, Tensor)",
)


def _values(x: Tensor, start: Tensor | None, coef: Tensor, constants: Tensor, basis: Basis, base: nn.Module | None) -> Tensor:
    wide = x.to(coef.dtype)
    value = basis.value(wide, coef, constants)
    if base is not None:
        return (base(wide) + value).to(x.dtype)
    return (value if start is None else start.to(coef.dtype) + value).to(x.dtype)


def _gradients(x: Tensor, grad: Tensor, coef: Tensor, constants: Tensor, basis: Basis, base: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(gradient of x, sums over tokens (n_basis + n_inner, channels))."""
    wide, grad = x.to(coef.dtype), grad.to(coef.dtype)
    grad_x, members, inner = basis.pullback(wide, grad, coef, constants)
    if base is not None:
        grad_x = base_pullback(base, wide, grad) + grad_x
    return grad_x.to(x.dtype), torch.stack([part.sum(0) for part in (*members, *inner)])


def _per_channel(x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(coefficients (n_basis, channels), constants (quantities, channels)): one column per channel, whatever the groups."""
    constants = basis.constants(grid.to(dtype), None if inner is None else inner.to(dtype))
    repeats = x.shape[1] // coef.shape[0]
    if repeats == 1:
        return coef.to(dtype).t().contiguous(), constants.contiguous()
    return coef.to(dtype).t().repeat_interleave(repeats, 1), constants.repeat_interleave(repeats, 1).contiguous()


def _chunks(x: Tensor, basis: Basis) -> list[slice]:
    return row_slices(len(x), chunk_rows(x.shape[1] * (basis.n_basis + 4) * 8))


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    if len(pieces) == 1:
        return pieces[0].view(like.shape)
    return torch.cat(pieces).view(like.shape) if pieces else torch.empty_like(like)


@_edge_functions.register_fake
def _(x, start, coef, grid, inner, spec, training):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


register_gradients(_edge_functions, _edge_functions_backward, reference_edge_functions)
_direct = direct_function(_forward, _backward, reference_edge_functions)
