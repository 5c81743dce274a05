"""Uniform B-splines in registers: at most k + 1 members are not 0 at any x, and each is a polynomial of x's position in its cell."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton import constexpr_function

NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@constexpr_function
def cardinal_weight(order, power, term):
    """The factor of max(distance - term, 0)^power in the cardinal spline of degree `order` (power == order) or its slope (order - 1)."""
    return (-1) ** term * math.comb(order + 1, term) / math.factorial(power)


@triton.jit
def spline_constants(grid, row, mask, CELLS: tl.constexpr, ORDER: tl.constexpr, WORK: tl.constexpr):
    """(lo, cells per unit of x) of these rows of the grid (rows, CELLS + 2 * ORDER + 1); rows that are masked get a harmless grid."""
    first = grid + row * (CELLS + 2 * ORDER + 1) + ORDER
    lo = tl.load(first, mask=mask, other=0.0).to(WORK)
    hi = tl.load(first + CELLS, mask=mask, other=1.0).to(WORK)
    return lo, CELLS / (hi - lo)


@triton.jit
def spline_position(x, constants, CELLS: tl.constexpr, ORDER: tl.constexpr):
    """Position of x in cells from the first knot, cut to one cell beyond the last: infinities fall where all members are 0, nan stays."""
    return tl.clamp((x - constants[0]) * constants[1] + ORDER, -1.0, CELLS + 2 * ORDER + 1.0, propagate_nan=NAN_STAYS)


@triton.jit
def spline_member(x, constants, c, CELLS: tl.constexpr, ORDER: tl.constexpr):
    """B[c](x) in closed form for all x; c may be a runtime number."""
    along = spline_position(x, constants, CELLS, ORDER) - c
    distance = tl.minimum(along, ORDER + 1 - along)
    total = _power(tl.maximum(distance, 0.0, propagate_nan=NAN_STAYS), ORDER) * cardinal_weight(ORDER, ORDER, 0)
    for term in tl.static_range(1, (ORDER + 2) // 2):
        total += _power(tl.maximum(distance - term, 0.0), ORDER) * cardinal_weight(ORDER, ORDER, term)
    return total


@triton.jit
def spline_slope(x, constants, c, CELLS: tl.constexpr, ORDER: tl.constexpr):
    """B'[c](x), from the right at the knots."""
    along = spline_position(x, constants, CELLS, ORDER) - c
    if ORDER == 1:
        steepness = tl.where((along >= 0) & (along < 2), 1.0, 0.0) + 0 * along
    else:
        distance = tl.minimum(along, ORDER + 1 - along)
        steepness = _power(tl.maximum(distance, 0.0, propagate_nan=NAN_STAYS), ORDER - 1) * cardinal_weight(ORDER, ORDER - 1, 0)
        for term in tl.static_range(1, (ORDER + 2) // 2):
            steepness += _power(tl.maximum(distance - term, 0.0), ORDER - 1) * cardinal_weight(ORDER, ORDER - 1, term)
    return tl.where(2 * along < ORDER + 1, steepness, -steepness) * constants[1]


@triton.jit
def spline_cell(position):
    """(the cell as a whole number of the working dtype, the position in it in [0, 1)); nan: a cell without members, and nan."""
    cell = tl.floor(tl.maximum(position, -1.0))
    return cell, position - cell


@triton.jit
def spline_value(x, constants, weights, CELLS: tl.constexpr, ORDER: tl.constexpr, WORK: tl.constexpr):
    """sum_c coef[c] * B[c](x) over the members that live on x's cell; `weights` see `spline_weights`."""
    cell, u = spline_cell(spline_position(x, constants, CELLS, ORDER))
    first, total = cell.to(tl.int32) - ORDER, tl.zeros_like(u)
    for r in tl.static_range(ORDER + 1):
        total += _weight(weights, first, r, CELLS + ORDER, WORK) * _local(u, r, ORDER, 0)
    return total


@triton.jit
def spline_value_slope(x, constants, weights, CELLS: tl.constexpr, ORDER: tl.constexpr, WORK: tl.constexpr):
    """The derivative of `spline_value`."""
    cell, u = spline_cell(spline_position(x, constants, CELLS, ORDER))
    first, total = cell.to(tl.int32) - ORDER, tl.zeros_like(u)
    for r in tl.static_range(ORDER + 1):
        total += _weight(weights, first, r, CELLS + ORDER, WORK) * _local(u, r, ORDER, 1)
    return total * constants[1]


@triton.jit
def spline_parts(x, grad, constants, CELLS: tl.constexpr, ORDER: tl.constexpr):
    """grad * B[c](x) for every c, in the order of `member_of(., CELLS + ORDER, ORDER + 1)`.

    Every (ORDER+1)-th member: their supports tile the line, so one value serves all of them and a comparison says whose it is.
    """
    width: tl.constexpr = ORDER + 1
    cell, u = spline_cell(spline_position(x, constants, CELLS, ORDER))
    tiles = tl.floor(cell * (1.0 / width) + 0.5 / width) * width  # half a cell: away from rounding
    rest, parts = cell - tiles, ()
    for q in tl.static_range(ORDER + 1):
        if q < CELLS + ORDER:
            value = _local(u, (q + ORDER) % width, ORDER, 0)
            for shift in tl.static_range(1, ORDER + 1):
                value = tl.where(rest == shift, _local(u, (q + ORDER - shift) % width, ORDER, 0), value)
            value *= grad
            nothing, begun = value * 0, tiles if q == 0 else tl.where(rest >= q, tiles, tiles - width)
            for c in tl.static_range(q, CELLS + ORDER, ORDER + 1):
                parts += (tl.where(begun == c - q, value, nothing),)
    return parts


@triton.jit
def spline_weights(coef, row, mask, CELLS: tl.constexpr, ORDER: tl.constexpr):
    """Where the coefficients of these functions begin; masked rows get the first. They stay in cache: k + 1 loads per x."""
    return coef + tl.where(mask, row, 0) * (CELLS + ORDER)


@triton.jit
def _weight(weights, first, r: tl.constexpr, N_BASIS: tl.constexpr, WORK: tl.constexpr):
    exists = (first + r).to(tl.uint32) < N_BASIS  # negative numbers are large ones
    return tl.load(weights + first + r, mask=exists, other=0.0).to(WORK)


@constexpr_function
def local_factor(order, r, slope, power):
    """The factor of u^power in the r-th member on a cell, or in its slope per cell; the same numbers as `bases.bspline.local_polynomials`.

    They are those of sum_j (-1)^j C(order + 1, j) (u + order - r - j)^order / order!.
    """
    if slope:
        return local_factor(order, r, 0, power + 1) * (power + 1)
    terms = [(-1) ** j * math.comb(order + 1, j) * (order - r - j) ** (order - power) for j in range(order - r + 1)]
    return math.comb(order, power) * sum(terms) / math.factorial(order)


@triton.jit
def _local(u, r: tl.constexpr, ORDER: tl.constexpr, SLOPE: tl.constexpr):
    """The r-th of the members on a cell at position u in it, or its slope per cell: a polynomial by Horner's scheme.

    Measured from the nearer end of its support, where it vanishes: few terms cancel, and the outermost members are mere powers.
    """
    if 2 * r < ORDER:
        value = _horner(1 - u, ORDER - r, ORDER, SLOPE)
        value = -value if SLOPE else value
    else:
        value = _horner(u, r, ORDER, SLOPE)
    return value


@triton.jit
def _horner(t, r: tl.constexpr, ORDER: tl.constexpr, SLOPE: tl.constexpr):
    top: tl.constexpr = ORDER - SLOPE
    if top == 0:
        total = 0 * t + local_factor(ORDER, r, SLOPE, 0)
    else:
        total = t * local_factor(ORDER, r, SLOPE, top)
        for step in tl.static_range(1, top + 1):
            if local_factor(ORDER, r, SLOPE, top - step) != 0:
                total += local_factor(ORDER, r, SLOPE, top - step)
            if step < top:
                total *= t
    return total


@triton.jit
def _power(x, POWER: tl.constexpr):
    if POWER == 0:
        value = 0 * x + 1
    else:
        value = x
        for _ in tl.static_range(POWER - 1):
            value *= x
    return value
