"""The bases that the kernels know, under one set of names. Which of them it is, is known when a kernel is compiled."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton import constexpr_function

from kanformer.ops.triton_kernels.bspline_members import (
    spline_constants,
    spline_member,
    spline_parts,
    spline_slope,
    spline_value,
    spline_value_slope,
    spline_weights,
)
from kanformer.ops.triton_kernels.rational_members import (
    rational_constants,
    rational_inner_parts,
    rational_member,
    rational_parts,
    rational_slope,
    rational_value,
    rational_value_slope,
    rational_weights,
)


@constexpr_function
def member_of(part, n_basis, width):
    """The member that comes as the part-th where members are taken width by width: 0, width, 2 * width, ..., 1, 1 + width, ..."""
    return [c for first in range(width) for c in range(first, n_basis, width)][part] if part < n_basis else part


@triton.jit
def load_constants(grid, inner, row, mask, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr, WORK: tl.constexpr):
    """What the members need of grid (rows, points) and inner (rows, n_inner), a tuple of tensors in the shape of `row`."""
    if RATIONAL:
        return rational_constants(inner, row, mask, WORK)
    else:
        return spline_constants(grid, row, mask, CELLS, ORDER, WORK)


@triton.jit
def load_weights(coef, row, mask, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr, WORK: tl.constexpr):
    """What `value`, `value_slope` and `parts` need of coef (rows, n_basis)."""
    if RATIONAL:
        return rational_weights(coef, row, mask, WORK)
    else:
        return spline_weights(coef, row, mask, CELLS, ORDER)


@triton.jit
def member(x, constants, c, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr):
    """B[c](x)."""
    if RATIONAL:
        return rational_member(x, constants, c)
    else:
        return spline_member(x, constants, c, CELLS, ORDER)


@triton.jit
def slope(x, constants, c, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr):
    """B'[c](x)."""
    if RATIONAL:
        return rational_slope(x, constants, c)
    else:
        return spline_slope(x, constants, c, CELLS, ORDER)


@triton.jit
def value(x, constants, weights, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr, WORK: tl.constexpr):
    """sum_c coef[c] * B[c](x)."""
    if RATIONAL:
        return rational_value(x, constants, weights)
    else:
        return spline_value(x, constants, weights, CELLS, ORDER, WORK)


@triton.jit
def value_slope(x, constants, weights, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr, WORK: tl.constexpr):
    """The derivative of `value`."""
    if RATIONAL:
        return rational_value_slope(x, constants, weights)
    else:
        return spline_value_slope(x, constants, weights, CELLS, ORDER, WORK)


@triton.jit
def parts(x, grad, constants, weights, CELLS: tl.constexpr, ORDER: tl.constexpr, RATIONAL: tl.constexpr):
    """The gradients of grad * value before they are summed: n_basis for the coefficients (see `member_of`), n_inner for the inner numbers."""
    if RATIONAL:
        return rational_parts(x, grad, constants, weights)
    else:
        return spline_parts(x, grad, constants, CELLS, ORDER)


@triton.jit
def inner_parts(x, grad_value, constants):
    """The same for the inner numbers alone, from grad * value. Only rational functions have any."""
    return rational_inner_parts(x, grad_value, constants)
