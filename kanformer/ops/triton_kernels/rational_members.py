"""Safe rational functions in registers: x^m / Q(x), m = 0..5, with Q = 1 + sum_i |b_i| |x|^i, i = 1..4; see `bases.rational`."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

DEGREE = tl.constexpr(5)


@triton.jit
def rational_constants(inner, row, mask, WORK: tl.constexpr):
    """(b_1, ..., b_4) of these rows of inner (rows, 4); rows that are masked get a denominator of 1."""
    first = inner + row * 4
    b1 = tl.load(first, mask=mask, other=0.0).to(WORK)
    b2 = tl.load(first + 1, mask=mask, other=0.0).to(WORK)
    b3 = tl.load(first + 2, mask=mask, other=0.0).to(WORK)
    b4 = tl.load(first + 3, mask=mask, other=0.0).to(WORK)
    return b1, b2, b3, b4


@triton.jit
def rational_weights(coef, row, mask, WORK: tl.constexpr):
    """The coefficients (a_0, ..., a_5) of these functions."""
    weights = ()
    for m in tl.static_range(DEGREE + 1):
        weights += (tl.load(coef + row * (DEGREE + 1) + m, mask=mask, other=0.0).to(WORK),)
    return weights


@triton.jit
def rational_member(x, constants, c):
    """x^c / Q(x); c may be a runtime number."""
    value = 1 / _denominator(x, constants)
    for m in tl.static_range(DEGREE):
        value *= tl.where(c > m, x, 1.0)
    return value


@triton.jit
def rational_slope(x, constants, c):
    """(c x^(c-1) - x^c Q'/Q) / Q."""
    reciprocal = 1 / _denominator(x, constants)
    ratio = _rising(x, constants) * reciprocal
    before = reciprocal
    for m in tl.static_range(1, DEGREE):
        before *= tl.where(c > m, x, 1.0)
    return tl.where(c > 0, before * (c - x * ratio), -ratio * reciprocal)


@triton.jit
def rational_value(x, constants, weights):
    """sum_m a_m x^m / Q(x)."""
    return _numerator(x, weights) / _denominator(x, constants)


@triton.jit
def rational_value_slope(x, constants, weights):
    """The derivative of `rational_value`."""
    reciprocal = 1 / _denominator(x, constants)
    rising = weights[DEGREE] * DEGREE
    for m in tl.static_range(1, DEGREE):
        rising = rising * x + weights[DEGREE - m] * (DEGREE - m)
    return (rising - _numerator(x, weights) * reciprocal * _rising(x, constants)) * reciprocal


@triton.jit
def rational_parts(x, grad, constants, weights):
    """grad * B[m](x) for m = 0..5, then grad * d value / d b_i for i = 1..4."""
    part = grad / _denominator(x, constants)
    parts = (part,)
    for _ in tl.static_range(DEGREE):
        part *= x
        parts += (part,)
    return parts + rational_inner_parts(x, grad * rational_value(x, constants, weights), constants)


@triton.jit
def rational_inner_parts(x, value, constants):
    """d value / d b_i = -value |x|^i sign(b_i) / Q, i = 1..4, where sign(0) is +1."""
    part = -value / _denominator(x, constants)
    parts = ()
    for i in tl.static_range(4):
        part *= tl.abs(x)
        parts += (tl.where(constants[i] < 0, -part, part),)
    return parts


@triton.jit
def _numerator(x, weights):
    total = weights[DEGREE]
    for m in tl.static_range(1, DEGREE + 1):
        total = total * x + weights[DEGREE - m]
    return total


@triton.jit
def _denominator(x, constants):
    size = tl.abs(x)
    return (((tl.abs(constants[3]) * size + tl.abs(constants[2])) * size + tl.abs(constants[1])) * size + tl.abs(constants[0])) * size + 1


@triton.jit
def _rising(x, constants):
    """Q'(x)."""
    size = tl.abs(x)
    rising = ((4 * tl.abs(constants[3]) * size + 3 * tl.abs(constants[2])) * size + 2 * tl.abs(constants[1])) * size + tl.abs(constants[0])
    return tl.where(x < 0, -rising, rising)
