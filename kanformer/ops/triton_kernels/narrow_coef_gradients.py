"""The gradient of the coefficients of full edges with few outputs: a product over the tokens, one factor made in registers."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.dots import Tiles, dot, precision_of, splits_of
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch
from kanformer.ops.triton_kernels.members import load_constants, member


def narrow_coef_gradients(x: Tensor, grad: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis) -> Tensor:
    """sum over tokens of grad[o] * B[c](x_i) in float32, (outputs, n_basis, channels); arguments as `full_gradients`, contiguous and not empty.

    The tokens are split over programs where there are few channels; torch adds their sums.
    """
    (tokens, channels), outputs = x.shape, grad.shape[1]
    tiles = Tiles.of(outputs, grad.dtype)
    blocks = cells(channels, tiles.rows)
    steps = cells(cells(tokens, splits_of(tokens, 512, blocks * basis.n_basis)), tiles.depth)
    splits = cells(tokens, steps * tiles.depth)
    partial = torch.empty(splits, outputs, basis.n_basis, channels, dtype=torch.float32, device=x.device)
    launch(
        _products,
        (blocks, basis.n_basis, splits),
        x,
        grad,
        grid,
        inner_numbers(inner, basis, channels, x),
        partial,
        tokens,
        channels,
        outputs,
        steps,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        DEPTH=tiles.depth,
        **precision_of(grad),
        **compiled_for(basis, x),
        num_stages=3,
    )
    return partial[0] if splits == 1 else partial.sum(0)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _products(
    x,
    grad,
    grid,
    inner,
    partial,
    tokens,
    channels,
    outputs,
    steps,
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
    c, n_basis, split = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    column, output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, OUTPUTS)[None, :]
    constants = load_constants(grid, inner, column, column < channels, CELLS, ORDER, RATIONAL, WORK)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(steps):
        first = (split.to(tl.int64) * steps + step) * DEPTH
        token, depth = first + tl.arange(0, DEPTH)[None, :], first + tl.arange(0, DEPTH)[:, None]
        here = tl.load(x + token * channels + column, mask=(token < tokens) & (column < channels), other=0.0).to(WORK)
        weight = tl.load(grad + depth * outputs + output, mask=(depth < tokens) & (output < outputs), other=0.0)
        plane = member(here, constants, c, CELLS, ORDER, RATIONAL).to(grad.dtype.element_ty)
        total = dot(plane, weight, total, UPCAST, PRECISION)
    place = ((split * outputs + output).to(tl.int64) * n_basis + c) * channels + column
    tl.store(partial + place, total, mask=(column < channels) & (output < outputs))
