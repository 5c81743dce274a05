"""Where x lies on a uniform spline grid: the cell and the position in it. Shared by the fast paths of B-splines."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline, local_polynomials

CHUNK_BYTES = 16 * 2**20  # of the largest buffer of one chunk: stays in cache, below glibc's 32 MiB mmap threshold


def has_table(basis: Basis) -> TypeGuard[BSpline]:
    """Whether x finds its cell by one multiplication, so that a path without a compiler touches only the members that are not 0."""
    return isinstance(basis, BSpline) and basis.knots == "uniform" and basis.extrapolation == "zero"


def chunk_rows(bytes_per_row: int) -> int:
    """How many rows of a batch to work on at once."""
    return max(1, CHUNK_BYTES // max(1, bytes_per_row))


def row_slices(rows: int, step: int) -> list[slice]:
    """The rows of a batch, `step` at a time."""
    return [slice(start, start + step) for start in range(0, rows, step)]


def cell_scale(grid: Tensor, basis: BSpline, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lo, cells per unit of x), each (rows,), of the uniform grids (rows, points)."""
    lo, hi = (bound.to(dtype) for bound in basis.grid_bounds(grid))
    return lo, basis.grid_size / (hi - lo)


def locate(x: Tensor, lo: Tensor, per_unit: Tensor, basis: BSpline) -> tuple[Tensor, Tensor]:
    """Window numbers and positions of x.

    Window w covers the cell on which the padded members w .. w+k live, where the members are padded by k+1
    zeros on both sides; so the first and the last window are identically 0 and take everything outside.

    Args:
        x: (..., rows) in the working dtype.
        lo, per_unit: (rows,), see `cell_scale`.

    Returns:
        window (..., rows) int64 in [0, G + 2k + 2), and u (..., rows) in [0, 1], nan where x is.
    """
    windows = basis.grid_size + 2 * basis.spline_order + 2
    position = ((x - lo) * per_unit + (basis.spline_order + 1)).clamp_(0, windows)
    window = position.floor().clamp_(max=windows - 1)
    u = position.sub_(window)
    return window.nan_to_num_(nan=basis.spline_order + 1).long(), u


def local_matrix(basis: BSpline, like: Tensor) -> Tensor:
    """`local_polynomials` of the basis' degree as a tensor (k+1 members, k+1 powers)."""
    return torch.tensor(local_polynomials(basis.spline_order), dtype=like.dtype, device=like.device)
