"""Full edges, one function per edge: fused where there are few outputs, the basis in memory and torch's GEMM where there are many."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.dots import is_narrow
from kanformer.ops.triton_kernels.narrow_coef_gradients import narrow_coef_gradients
from kanformer.ops.triton_kernels.narrow_input_gradients import narrow_input_gradients
from kanformer.ops.triton_kernels.narrow_values import narrow_values
from kanformer.ops.triton_kernels.wide_edges import wide_gradients, wide_values


def full_values(x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis) -> Tensor:
    """start + sum_{c,i} coef[o, c, i] * B[c](x_i), as `ops.reference.reference_full_edges`.

    Args:
        x: (tokens, channels). start: (tokens, outputs) or None.
        coef: (outputs, n_basis, channels).
        grid: (channels, points). inner: (channels, n_inner) or None.

    Returns:
        (tokens, outputs) in the dtype of start if given, else of x. The basis is rounded to the dtype of coef, as the reference's is.
    """
    x, coef, grid, inner = _contiguous(x, coef, grid, inner)
    dtype = x.dtype if start is None else start.dtype
    if not x.numel():
        return torch.zeros(x.shape[0], coef.shape[0], dtype=dtype, device=x.device) if start is None else start.clone()
    if not is_narrow(x, coef):
        return wide_values(x, start, coef, grid, inner, basis).to(dtype)
    total = narrow_values(x, coef, grid, inner, basis)
    return (total if start is None else start + total).to(dtype)


def full_gradients(
    x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, needs_x: bool, needs_coef: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of sum(grad * full_values(x, ...)); shapes as there, grad (tokens, outputs).

    Returns:
        For x (in its dtype) if needs_x, for coef (outputs, n_basis, channels) if needs_coef, for inner (channels, n_inner) if there
        is any; else None. The latter two in float32 (float64 if x is).
    """
    x, coef, grid, inner = _contiguous(x, coef, grid, inner)
    grad = grad.to(coef.dtype).contiguous()
    if not is_narrow(x, coef) or not x.numel():
        return wide_gradients(x, grad, coef, grid, inner, basis, needs_x, needs_coef)
    grad_coef = narrow_coef_gradients(x, grad, grid, inner, basis) if needs_coef else None
    if not needs_x and inner is None:
        return None, grad_coef, None
    grad_x, grad_inner = narrow_input_gradients(x, grad, coef, grid, inner, basis, needs_x)
    return grad_x, grad_coef, grad_inner


def _contiguous(x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return x.contiguous(), coef.contiguous(), grid.contiguous(), None if inner is None else inner.contiguous()
