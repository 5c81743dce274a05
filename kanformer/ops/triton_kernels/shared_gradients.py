"""The gradients of shared edges in two stages: every program writes its partial sums, torch adds them. No atomics, so runs repeat bit for bit."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.ops.triton_kernels.launch import cells, compiled_for, inner_numbers, launch, power_of_two, work_dtype
from kanformer.ops.triton_kernels.members import load_constants, load_weights, member_of, parts, value_slope

_STEPS = 16  # tiles of a program, one after the other into the same sums
_FEW = 32  # channels from which a group has programs of its own


def shared_gradients(
    x: Tensor, grad: Tensor, coef: Tensor, grid: Tensor, inner: Tensor | None, basis: Basis, needs_x: bool, needs_coef: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of sum(grad * shared_values(x, ...)); shapes as there, grad (tokens, channels).

    Returns:
        For x (in its dtype) if needs_x, for coef (groups, n_basis) if needs_coef, for inner (groups, n_inner) if there is any; else None.
        The latter two in float32 (float64 if x is).
    """
    x, groups, n_parts = x.contiguous(), coef.shape[0], basis.n_basis + basis.n_inner
    tokens, channels = x.shape
    grad_x = torch.empty_like(x) if needs_x else None
    tiling = _tiling(channels, groups)
    blocks, needs_sums = cells(tokens, tiling.rows * _STEPS), needs_coef or inner is not None
    last = tiling.programs if tiling.one_group else channels
    partial = torch.empty(blocks if needs_sums else 0, n_parts, last, dtype=work_dtype(x), device=x.device)
    if x.numel() and (needs_x or needs_sums):
        launch(
            _gradients,
            (blocks, tiling.programs),
            x,
            grad.contiguous(),
            coef.contiguous(),
            grid.contiguous(),
            inner_numbers(inner, basis, groups, x),
            x if grad_x is None else grad_x,
            partial,
            tokens,
            channels,
            channels // groups,
            last,
            N_BASIS=basis.n_basis,
            N_PARTS=n_parts,
            NEEDS_X=needs_x,
            NEEDS_SUMS=needs_sums,
            ONE_GROUP=tiling.one_group,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            STEPS=_STEPS,
            **compiled_for(basis, x),
        )
    sums = partial.sum(0).view(n_parts, groups, -1).sum(2).t()
    grad_coef, grad_inner = sums[:, : basis.n_basis].contiguous(), sums[:, basis.n_basis :].contiguous()
    return grad_x, grad_coef if needs_coef else None, None if inner is None else grad_inner


class _Tiling(NamedTuple):
    """How channels are dealt out: `programs` of them, each with tiles of rows x columns, either within one group or across groups."""

    one_group: bool
    rows: int
    columns: int
    programs: int


def _tiling(channels: int, groups: int) -> _Tiling:
    """Groups of 32 channels and more: constants are scalars and a tile's 8 neighbours (one 16-byte load) are summed first; tiles are as
    wide as wastes the fewest columns. Smaller groups: sums per channel, with tiles of half the size, as every thread holds n_basis sums per number."""
    size = channels // groups
    if size >= _FEW:
        columns = min((128, 64, 32), key=lambda width: cells(size, width) * width)
        return _Tiling(True, 1024 // columns, columns, groups * cells(size, columns))
    columns = power_of_two(channels, 16, 64)
    return _Tiling(False, 512 // columns, columns, cells(channels, columns))


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
    size,
    last,
    N_BASIS: tl.constexpr,
    N_PARTS: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    ORDER: tl.constexpr,
    RATIONAL: tl.constexpr,
    WORK: tl.constexpr,
):
    block, across = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if ONE_GROUP:
        per_group = tl.cdiv(size, COLUMNS)
        function = tl.zeros((1, 1), tl.int32) + across // per_group
        within = across % per_group * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        column, exists, known = function * size + within, within < size, function >= 0
    else:
        column = across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        function, exists = column // size, column < channels
        known = exists
    constants = load_constants(grid, inner, function, known, CELLS, ORDER, RATIONAL, WORK)
    weights = load_weights(coef, function, known, CELLS, ORDER, RATIONAL, WORK)
    sums = _zeros(N_PARTS, ROWS, COLUMNS // 8 if ONE_GROUP else COLUMNS, WORK)
    top = block * (ROWS * STEPS)
    for step in range(tl.minimum(STEPS, tl.cdiv(tokens - top, ROWS))):
        row = top + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask, place = (row < tokens) & exists, row * channels + column
        here = tl.load(x + place, mask=mask, other=0.0).to(WORK)
        weight = tl.load(grad + place, mask=mask, other=0.0).to(WORK)
        if NEEDS_X:
            found = weight * value_slope(here, constants, weights, CELLS, ORDER, RATIONAL, WORK)
            tl.store(grad_x + place, found.to(grad_x.dtype.element_ty), mask=mask)
        if NEEDS_SUMS:
            sums = _added(sums, parts(here, weight, constants, weights, CELLS, ORDER, RATIONAL), N_PARTS, ONE_GROUP, ROWS, COLUMNS)
    if NEEDS_SUMS:
        for part in tl.static_range(N_PARTS):
            line = partial + (block * N_PARTS + member_of(part, N_BASIS, ORDER + 1)) * last
            if ONE_GROUP:
                tl.store(line + across, tl.sum(tl.sum(sums[part], 1), 0))
            else:
                tl.store(line + column, tl.sum(sums[part], 0, keep_dims=True), mask=exists)


@triton.jit
def _zeros(N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORK: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(N):
        zeros += (tl.zeros((ROWS, COLUMNS), WORK),)
    return zeros


@triton.jit
def _added(sums, terms, N: tl.constexpr, ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums + terms, tile by tile; within one group eight neighbours, which one thread holds, become one."""
    added = ()
    for n in tl.static_range(N):
        if ONE_GROUP:
            added += (sums[n] + tl.sum(tl.reshape(terms[n], (ROWS, COLUMNS // 8, 8)), 2),)
        else:
            added += (sums[n] + terms[n],)
    return added
