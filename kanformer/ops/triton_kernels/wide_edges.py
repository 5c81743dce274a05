"""Full edges with many outputs: the basis is written to memory chunk by chunk, and torch's own GEMM multiplies it."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.launch import work_dtype
from kanformer.ops.triton_kernels.planes import plane_gradients, plane_values

CHUNK_BYTES = 256 * 2**20  # of the basis of one chunk: some thousand tokens at d = 4096, enough for a GEMM at its limit
_ROWS = 128  # a chunk is a multiple of what a GEMM's tiles are high


def wide_values(x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis) -> Tensor:
    """As `full_values`, arguments contiguous; the result in the dtype of coef."""
    outputs = coef.shape[0]
    matrix = coef.view(outputs, -1).t()
    base = None if start is None else start.to(coef.dtype)
    y = torch.empty(x.shape[0], outputs, dtype=coef.dtype, device=x.device)
    for rows in _chunks(x, coef):
        planes = plane_values(x[rows], grid, inner, basis, coef.dtype).flatten(1)
        if base is None:
            torch.mm(planes, matrix, out=y[rows])
        else:
            torch.addmm(base[rows], planes, matrix, out=y[rows])
    return y


def wide_gradients(
    x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, needs_x: bool, needs_coef: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `full_gradients`, arguments contiguous, grad in the dtype of coef."""
    matrix, dtype = coef.view(coef.shape[0], -1), work_dtype(x)
    grad_x = torch.empty_like(x) if needs_x else None
    # bf16 sums over many chunks would lose the small ones, so they are added up in the working dtype.
    grad_coef = torch.zeros(matrix.shape, dtype=dtype, device=x.device) if needs_coef else None
    grad_inner = torch.zeros(x.shape[1], basis.n_inner, dtype=dtype, device=x.device) if inner is not None else None
    for rows in _chunks(x, coef):
        if grad_coef is not None:
            _add_product(grad_coef, grad[rows].t(), plane_values(x[rows], grid, inner, basis, coef.dtype).flatten(1))
        if needs_x or grad_inner is not None:
            grad_planes = torch.mm(grad[rows], matrix).view(-1, *coef.shape[1:])
            part = plane_gradients(x[rows], grad_planes, grid, inner, basis, None if grad_x is None else grad_x[rows])
            if grad_inner is not None and part is not None:
                grad_inner += part
    return grad_x, None if grad_coef is None else grad_coef.view(coef.shape), grad_inner


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def _chunks(x: Tensor, coef: Tensor) -> list[slice]:
    step = max(1, CHUNK_BYTES // max(1, coef[0].numel() * coef.element_size()))
    step = max(step // _ROWS * _ROWS, min(step, _ROWS))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)] if x.numel() else []
