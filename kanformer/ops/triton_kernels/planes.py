"""The basis as a matrix (tokens, n_basis, channels), and what flows back through it: the elementwise half of full edges with many outputs."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch, power_of_two, work_dtype
from kanformer.ops.triton_kernels.members import inner_parts, load_constants, member, slope

_TILE = 1024  # numbers of x of a program: 8 per thread, so 16 bytes of bf16 in one load


def plane_values(x: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, dtype: torch.dtype) -> Tensor:
    """B[c](x_i) in `dtype`, (tokens, n_basis, channels), for x (tokens, channels), contiguous and not empty."""
    tokens, channels = x.shape
    planes = torch.empty(tokens, basis.n_basis, channels, dtype=dtype, device=x.device)
    columns = power_of_two(channels, 16, 128)
    rows = _TILE // columns
    launch(
        _planes,
        (cells(tokens, rows), cells(channels, columns)),
        x,
        grid,
        inner_numbers(inner, basis, channels, x),
        planes,
        tokens,
        channels,
        N_BASIS=basis.n_basis,
        ROWS=rows,
        COLUMNS=columns,
        **compiled_for(basis, x),
    )
    return planes


def plane_gradients(x: Tensor, grad_planes: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, grad_x: Tensor | None) -> Tensor | None:
    """Fills grad_x, if given, with sum_c grad_planes[:, c] * B'[c](x), and returns the gradient of inner (channels, n_inner) in the working
    dtype if there is any. grad_planes: (tokens, n_basis, channels)."""
    tokens, channels = x.shape
    columns = power_of_two(channels, 16, 128)
    rows = _TILE // columns
    blocks = cells(tokens, rows)
    partial = torch.empty(blocks, basis.n_inner, channels, dtype=work_dtype(x), device=x.device)
    launch(
        _gradients,
        (blocks, cells(channels, columns)),
        x,
        grad_planes,
        grid,
        inner_numbers(inner, basis, channels, x),
        x if grad_x is None else grad_x,
        partial,
        tokens,
        channels,
        N_BASIS=basis.n_basis,
        N_INNER=basis.n_inner,
        NEEDS_X=grad_x is not None,
        ROWS=rows,
        COLUMNS=columns,
        **compiled_for(basis, x),
    )
    return None if inner is None else partial.sum(0).t()


@triton.jit(do_not_specialize=["tokens"])
def _planes(
    x,
    grid,
    inner,
    planes,
    tokens,
    channels,
    N_BASIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < tokens) & (column < channels)
    constants = load_constants(grid, inner, column, column < channels, CELLS, ORDER, RATIONAL, WORK)
    here = tl.load(x + row * channels + column, mask=mask, other=0.0).to(WORK)
    for c in range(N_BASIS):
        plane = member(here, constants, c, CELLS, ORDER, RATIONAL)
        tl.store(planes + (row * N_BASIS + c) * channels + column, plane.to(planes.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _gradients(
    x,
    grad_planes,
    grid,
    inner,
    grad_x,
    partial,
    tokens,
    channels,
    N_BASIS: tl.constexpr,
    N_INNER: tl.constexpr,
    NEEDS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row, column = block * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < tokens) & (column < channels)
    constants = load_constants(grid, inner, column, column < channels, CELLS, ORDER, RATIONAL, WORK)
    here = tl.load(x + row * channels + column, mask=mask, other=0.0).to(WORK)
    total, grad_value = tl.zeros((ROWS, COLUMNS), WORK), tl.zeros((ROWS, COLUMNS), WORK)
    for c in range(N_BASIS):
        weight = tl.load(grad_planes + (row * N_BASIS + c) * channels + column, mask=mask, other=0.0).to(WORK)
        if NEEDS_X:
            total += weight * slope(here, constants, c, CELLS, ORDER, RATIONAL)
        if N_INNER > 0:
            grad_value += weight * member(here, constants, c, CELLS, ORDER, RATIONAL)
    if NEEDS_X:
        tl.store(grad_x + row * channels + column, total.to(grad_x.dtype.element_ty), mask=mask)
    if N_INNER > 0:
        parts = inner_parts(here, grad_value, constants)
        for i in tl.static_range(N_INNER):
            tl.store(partial + (block * N_INNER + i) * channels + column, tl.sum(parts[i], 0, keep_dims=True), mask=column < channels)
