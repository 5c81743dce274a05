"""What every launch needs: what a kernel is compiled for, and tiles by one small rule each, so that nothing is tuned at run time."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline
from kanformer.bases.rational import Rational

INTERPRETED: bool = knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was first imported: kernels run in numpy


def supports(basis: Basis) -> bool:
    """Whether the kernels know this basis: uniform B-splines of degree >= 1 that fade to 0 beyond the grid, and rational functions."""
    if isinstance(basis, Rational):
        return True
    return isinstance(basis, BSpline) and basis.knots == "uniform" and basis.extrapolation == "zero" and basis.spline_order >= 1


def work_dtype(x: Tensor) -> torch.dtype:
    """As `ops.reference.work_dtype`: float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compiled_for(basis: Basis, x: Tensor) -> dict[str, Any]:
    """The constants of every kernel: which members, and the dtype of the arithmetic. Rational functions have neither cells nor degree."""
    rational = isinstance(basis, Rational)
    return {
        "CELLS": 0 if rational else basis.grid_size,
        "ORDER": 0 if rational else basis.spline_order,
        "RATIONAL": rational,
        "WORK": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


def launch(kernel: Any, programs: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` on the device of x, its first argument. Multiplications and additions are fused, whatever triton's default."""
    with torch.cuda.device_of(x):
        kernel[programs](x, *arguments, **constants, enable_fp_fusion=True)


def inner_numbers(inner: Tensor | None, basis: Basis, rows: int, x: Tensor) -> Tensor:
    """`inner` as the kernels read it, (rows, n_inner): what a fresh function starts from if None; never read where there is none."""
    if inner is not None:
        return inner.contiguous()
    initial = basis.initial_inner(rows)
    return x if initial is None else initial.to(x.device)


def power_of_two(size: int, least: int, most: int) -> int:
    """The power of two from `size` upwards, within these bounds."""
    return max(least, min(most, 1 << (size - 1).bit_length() if size > 1 else 1))


def cells(size: int, width: int) -> int:
    """How many tiles of this width cover `size`."""
    return -(-size // width)
