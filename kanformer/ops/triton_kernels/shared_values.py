"""The values of shared edges: one pass, memory read and written once."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch, power_of_two
from kanformer.ops.triton_kernels.members import load_constants, load_weights, value

_TILE = 1024  # numbers of a tile: 8 per thread, so 16 bytes of bf16 in one load
_STEPS = 4  # tiles of a program, one after the other: which functions, and where their grids lie, is found out once


def shared_values(x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis) -> Tensor:
    """start + sum_c coef[g(i), c] * B[c](x_i), as `ops.reference.reference_edge_functions`.

    Args:
        x: (tokens, channels). start: the same shape, or None.
        coef: (groups, n_basis); channel i belongs to group i // (channels // groups).
        grid: (groups, points). inner: (groups, n_inner) or None.

    Returns:
        (tokens, channels) in the dtype of x.
    """
    x, groups = x.contiguous(), coef.shape[0]
    tokens, channels = x.shape
    y = torch.empty_like(x)
    if not x.numel():
        return y
    columns = power_of_two(channels, 16, 128)
    rows = _TILE // columns
    launch(
        _values,
        (cells(tokens, rows * _STEPS), cells(channels, columns)),
        x,
        x if start is None else start.contiguous(),
        coef.contiguous(),
        grid.contiguous(),
        inner_numbers(inner, basis, groups, x),
        y,
        tokens,
        channels,
        channels // groups,
        STARTED=start is not None,
        ROWS=rows,
        COLUMNS=columns,
        STEPS=_STEPS,
        **compiled_for(basis, x),
    )
    return y


@triton.jit(do_not_specialize=["tokens"])
def _values(
    x,
    start,
    coef,
    grid,
    inner,
    y,
    tokens,
    channels,
    size,
    STARTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    top = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = column < channels
    constants = load_constants(grid, inner, column // size, exists, CELLS, ORDER, RATIONAL, WORK)
    weights = load_weights(coef, column // size, exists, CELLS, ORDER, RATIONAL, WORK)
    for step in range(tl.minimum(STEPS, tl.cdiv(tokens - top, ROWS))):
        row = top + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask, place = (row < tokens) & exists, row * channels + column
        total = value(tl.load(x + place, mask=mask, other=0.0).to(WORK), constants, weights, CELLS, ORDER, RATIONAL, WORK)
        if STARTED:
            total += tl.load(start + place, mask=mask, other=0.0).to(WORK)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
