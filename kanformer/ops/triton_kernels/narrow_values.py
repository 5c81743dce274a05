"""Full edges with few outputs: the basis is made in registers and goes straight into the product."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.dots import Tiles, dot, precision_of, splits_of
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch
from kanformer.ops.triton_kernels.members import load_constants, member


def narrow_values(x: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis) -> Tensor:
    """sum_{c,i} coef[o, c, i] * B[c](x_i) in float32, (tokens, outputs); arguments as `full_values`, contiguous and not empty.

    Where there are few tokens, the input channels are split over programs; torch adds their sums.
    """
    (tokens, channels), outputs = x.shape, coef.shape[0]
    tiles = Tiles.of(outputs, coef.dtype)
    blocks = cells(tokens, tiles.rows)
    steps = cells(cells(channels, splits_of(channels, 128, blocks)), tiles.depth)
    splits = cells(channels, steps * tiles.depth)
    partial = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    launch(
        _products,
        (blocks, splits),
        x,
        coef,
        grid,
        inner_numbers(inner, basis, channels, x),
        partial,
        tokens,
        channels,
        outputs,
        steps,
        N_BASIS=basis.n_basis,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        DEPTH=tiles.depth,
        **precision_of(coef),
        **compiled_for(basis, x),
        num_stages=3,
    )
    return partial[0] if splits == 1 else partial.sum(0)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _products(
    x,
    coef,
    grid,
    inner,
    partial,
    tokens,
    channels,
    outputs,
    steps,
    N_BASIS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    split = tl.program_id(1)
    row, output = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, OUTPUTS)[None, :]
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    # One loop over channels and members, the members innermost: x comes from the cache, and the coefficients are fetched ahead.
    for step in range(steps * N_BASIS):
        c, first = step % N_BASIS, (split * steps + step // N_BASIS) * DEPTH
        column, depth = first + tl.arange(0, DEPTH)[None, :], first + tl.arange(0, DEPTH)[:, None]
        constants = load_constants(grid, inner, column, column < channels, CELLS, ORDER, RATIONAL, WORK)
        here = tl.load(x + row * channels + column, mask=(row < tokens) & (column < channels), other=0.0).to(WORK)
        matrix = tl.load(coef + output * (N_BASIS * channels) + c * channels + depth, mask=(depth < channels) & (output < outputs), other=0.0)
        plane = member(here, constants, c, CELLS, ORDER, RATIONAL).to(coef.dtype.element_ty)
        total = dot(plane, matrix, total, UPCAST, PRECISION)
    tl.store(partial + (split.to(tl.int64) * tokens + row) * outputs + output, total, mask=(row < tokens) & (output < outputs))
