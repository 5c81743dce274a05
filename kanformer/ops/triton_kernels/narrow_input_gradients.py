"""The gradients of x and of the inner numbers of full edges with few outputs: n_basis products, folded into x as they come."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.dots import Tiles, dot, precision_of
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch
from kanformer.ops.triton_kernels.members import inner_parts, load_constants, member, slope


def narrow_input_gradients(
    x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for x (in its dtype) if needs_x, and for inner (channels, n_inner) in float32 if there is any; arguments as
    `full_gradients`, contiguous and not empty, grad in the dtype of coef."""
    (tokens, channels), outputs = x.shape, coef.shape[0]
    tiles = Tiles.of(outputs, coef.dtype)
    piece = tiles.outputs if coef.dtype.itemsize == 2 else min(tiles.outputs, 32)
    columns = tiles.rows // 2 if basis.n_inner else tiles.rows  # more to hold per number
    blocks = cells(tokens, tiles.rows)
    grad_x = torch.empty_like(x) if needs_x else None
    partial = torch.empty(blocks, basis.n_inner, channels, dtype=torch.float32, device=x.device)
    launch(
        _gradients,
        (blocks, cells(channels, columns)),
        x,
        grad,
        coef,
        grid,
        inner_numbers(inner, basis, channels, x),
        x if grad_x is None else grad_x,
        partial,
        tokens,
        channels,
        outputs,
        N_BASIS=basis.n_basis,
        N_INNER=basis.n_inner,
        NEEDS_X=needs_x,
        ROWS=tiles.rows,
        COLUMNS=columns,
        PIECE=piece,
        PIECES=tiles.outputs // piece,
        **precision_of(coef),
        **compiled_for(basis, x),
        num_stages=2,
    )
    return grad_x, None if inner is None else partial.sum(0).t().contiguous()


@triton.jit(do_not_specialize=["tokens"])
def _gradients(
    x,
    grad,
    coef,
    grid,
    inner,
    grad_x,
    partial,
    tokens,
    channels,
    outputs,
    N_BASIS: tl.constexpr,
    N_INNER: tl.constexpr,
    NEEDS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row, column = block * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask, place = (row < tokens) & (column < channels), row * channels + column
    constants = load_constants(grid, inner, column, column < channels, CELLS, ORDER, RATIONAL, WORK)
    here = tl.load(x + place, mask=mask, other=0.0).to(WORK)
    weights = ()
    for p in tl.static_range(PIECES):
        across = p * PIECE + tl.arange(0, PIECE)[None, :]
        weights += (tl.load(grad + row * outputs + across, mask=(row < tokens) & (across < outputs), other=0.0),)
    total, grad_value = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for c in range(N_BASIS):
        grad_member = tl.zeros((ROWS, COLUMNS), tl.float32)
        for p in tl.static_range(PIECES):
            down = p * PIECE + tl.arange(0, PIECE)[:, None]
            matrix = tl.load(coef + (down * N_BASIS + c) * channels + column, mask=(down < outputs) & (column < channels), other=0.0)
            grad_member = dot(weights[p], matrix, grad_member, UPCAST, PRECISION)
        if NEEDS_X:
            total += grad_member * slope(here, constants, c, CELLS, ORDER, RATIONAL)
        if N_INNER > 0:
            grad_value += grad_member * member(here, constants, c, CELLS, ORDER, RATIONAL)
    if NEEDS_X:
        tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask=mask)
    if N_INNER > 0:
        parts = inner_parts(here, grad_value, constants)
        for i in tl.static_range(N_INNER):
            tl.store(partial + (block * N_INNER + i) * channels + column, tl.sum(parts[i], 0, keep_dims=True), mask=column < channels)
