"""B-splines of any degree on an extended grid, by Cox and de Boor's recursion."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from kanformer.bases.base import Basis, sum_up


class BSpline(Basis):
    """The basis of the KAN paper: G + k B-splines of degree k on G intervals, knots extended by k on each side.

    Inside the grid range the members sum to 1 and reproduce polynomials up to degree k; beyond the extended
    knots they are 0. On uniform knots the members have a closed form, which a compiler turns into one pass; on free
    knots they come from the recursion.
    """

    name = "bspline"
    source = "Liu et al. 2024, KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756, section 2.2; de Boor 1978, chapter IX"

    @property
    def n_basis(self) -> int:
        return self.grid_size + self.spline_order

    @property
    def member_flops(self) -> int:
        """Cell and position (3), then Horner for the k + 1 members that are not 0."""
        return 3 + (self.spline_order + 1) * 2 * self.spline_order

    def make_grid(self, lo: Tensor, hi: Tensor) -> Tensor:
        k, cells = self.spline_order, self.grid_size
        steps = torch.arange(-k, cells + k + 1, dtype=lo.dtype, device=lo.device) / cells
        return lo.unsqueeze(-1) + (hi - lo).unsqueeze(-1) * steps

    def grid_bounds(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        return grid[:, self.spline_order], grid[:, self.spline_order + self.grid_size]

    # The reference, for any knots.

    def evaluate(self, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        if self.extrapolation == "zero":
            return _cox_de_boor(x, grid, self.spline_order)
        inside, beyond = self._inside(x, grid)
        return _cox_de_boor(inside, grid, self.spline_order) + beyond.unsqueeze(-1) * self._slopes_at(inside, grid)

    def derivative(self, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        return self._slopes_at(x if self.extrapolation == "zero" else self._inside(x, grid)[0], grid)

    def _slopes_at(self, x: Tensor, grid: Tensor) -> Tensor:
        k = self.spline_order
        if k == 0:
            return torch.zeros(*x.shape, self.n_basis, dtype=x.dtype, device=x.device)
        lower = _cox_de_boor(x, grid, k - 1)
        rising, falling = (_reciprocal(width) * k for width in (grid[:, k:-1] - grid[:, : -k - 1], grid[:, k + 1 :] - grid[:, 1:-k]))
        return rising * lower[..., :-1] - falling * lower[..., 1:]

    def _inside(self, x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = self.grid_bounds(grid)
        inside = torch.minimum(torch.maximum(x, lo), hi)
        return inside, x - inside

    # The fast paths, elementwise.

    def constants(self, grid: Tensor, inner: Tensor | None) -> Tensor:
        if self.knots == "free":
            return grid.t()
        lo, hi = self.grid_bounds(grid)
        return torch.stack([lo, self.grid_size / (hi - lo)])

    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        if self.knots == "free":
            return _recursion(x, constants, self.spline_order)
        return [_cardinal(distance, self.spline_order, inside) for _, distance, inside in self._distances(x, constants)]

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        k = self.spline_order
        if k == 0:
            return [0 * member for member in self.members(x, constants)]
        if self.knots == "free":
            return _recursion_slopes(x, constants, k)
        return [constants[1] * torch.where(left, 1.0, -1.0) * _cardinal_slope(distance, k) for left, distance, _ in self._distances(x, constants)]

    def _distances(self, x: Tensor, constants: Tensor):
        """For each member: whether x is left of its middle, the distance to the nearer of its ends in cells (negative outside), whether x is in it."""
        half = (self.spline_order + 1) / 2
        position = ((x - constants[0]) * constants[1] + self.spline_order).clamp(-1, self.n_basis + self.spline_order + 1)
        for member in range(self.n_basis):
            from_middle = position - (member + half)
            yield from_middle < 0, half - from_middle.abs(), (from_middle >= -half) & (from_middle < half)

    def _bounds(self, constants: Tensor) -> tuple[Tensor, Tensor]:
        if self.knots == "free":
            return constants[self.spline_order], constants[self.spline_order + self.grid_size]
        return super()._bounds(constants)

    def value(self, x: Tensor, coef: Tensor, constants: Tensor) -> Tensor:
        if not self._folded:
            return super().value(x, coef, constants)
        return sum_up(fold.pick(coef) * _cardinal(fold.distance, self.spline_order) for fold in self._folds(x, constants))

    def pullback(self, x: Tensor, grad: Tensor, coef: Tensor, constants: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if not self._folded:
            return super().pullback(x, grad, coef, constants)
        slopes, parts = [], [x] * self.n_basis
        for fold in self._folds(x, constants):
            steepness = _cardinal_slope(fold.distance, self.spline_order)
            slopes.append(fold.pick(coef) * torch.where(fold.left, steepness, -steepness))
            weighted = grad * _cardinal(fold.distance, self.spline_order)
            for member, here in zip(fold.members, fold.here, strict=True):
                parts[member] = torch.where(here, weighted, weighted * 0)
        return grad * (sum_up(slopes) * constants[1]), parts, []

    @property
    def _folded(self) -> bool:
        return self.knots == "uniform" and self.extrapolation == "zero" and self.spline_order > 0

    def _folds(self, x: Tensor, constants: Tensor):
        """Every (k+1)-th member: their supports tile the line, so at any x at most one of them is not 0, and one evaluation serves all."""
        width = self.spline_order + 1
        position = ((x - constants[0]) * constants[1] + self.spline_order).clamp(-1, self.n_basis + width)
        for first in range(min(width, self.n_basis)):
            turns = (position - first) / width
            number = turns.floor()
            offset = (turns - number - 0.5) * width
            yield _Fold(range(first, self.n_basis, width), number, offset < 0, width / 2 - offset.abs())

    def sympy_members(self, x, lo, hi):
        from sympy import bspline_basis

        width = (hi - lo) / self.grid_size
        knots = tuple(lo + width * step for step in range(-self.spline_order, self.grid_size + self.spline_order + 1))
        return [bspline_basis(self.spline_order, knots, member, x) for member in range(self.n_basis)]


class _Fold:
    """The members of one residue class: which of them is at hand (`here`), and where in it."""

    def __init__(self, members: range, number: Tensor, left: Tensor, distance: Tensor) -> None:
        self.members, self.left, self.distance = members, left, distance
        self.here = [number == turn for turn in range(len(members))]

    def pick(self, coef: Tensor) -> Tensor:
        """The coefficient of the member at hand, 0 where there is none."""
        picked = torch.zeros((), dtype=coef.dtype, device=coef.device)
        for member, here in zip(self.members, self.here, strict=True):
            picked = torch.where(here, coef[member], picked)
        return picked


def _cardinal(distance: Tensor, degree: int, inside: Tensor | None = None) -> Tensor:
    """The B-spline of `degree` on unit cells at `distance` from the nearer end of its support, 0 where that is negative; nan stays nan."""
    if degree == 0:
        assert inside is not None
        return torch.where(inside, 1.0, 0.0).to(distance.dtype) + 0 * distance
    return _alternating(distance, degree, degree + 1, 1 / math.factorial(degree))


def _cardinal_slope(distance: Tensor, degree: int) -> Tensor:
    """Its slope towards the middle."""
    if degree == 1:
        return torch.where(distance > 0, 1.0, 0.0).to(distance.dtype) + 0 * distance
    return _alternating(distance, degree - 1, degree + 1, 1 / math.factorial(degree - 1))


def _alternating(distance: Tensor, power: int, terms: int, scale: float) -> Tensor:
    """scale * sum_j (-1)^j C(terms, j) max(distance - j, 0)^power over the terms that can be reached: distance <= terms / 2."""
    total = _power(distance.clamp(min=0), power) * scale
    for j in range(1, (terms + 1) // 2):
        total = total + _power((distance - j).clamp(min=0), power) * ((-1) ** j * math.comb(terms, j) * scale)
    return total


def _power(x: Tensor, power: int) -> Tensor:
    value = x
    for _ in range(power - 1):
        value = value * x
    return value


def _recursion(x: Tensor, knots: Tensor, degree: int) -> list[Tensor]:
    """Cox and de Boor's recursion on knots (points, rows), as a list of members; see `_cox_de_boor`."""
    points = len(knots)
    x = torch.minimum(torch.maximum(x, 2 * knots[0] - knots[-1]), 2 * knots[-1] - knots[0])  # infinities lie outside
    found = [torch.where((x >= knots[i]) & (x < knots[i + 1]), 1.0, 0.0).to(x.dtype) + 0 * x for i in range(points - 1)]
    for k in range(1, degree + 1):
        widths = [_reciprocal(knots[i + k] - knots[i]) for i in range(points - k)]
        found = [(x - knots[i]) * widths[i] * found[i] + (knots[i + k + 1] - x) * widths[i + 1] * found[i + 1] for i in range(points - k - 1)]
    return found


def _recursion_slopes(x: Tensor, knots: Tensor, degree: int) -> list[Tensor]:
    lower = _recursion(x, knots, degree - 1)
    widths = [degree * _reciprocal(knots[i + degree] - knots[i]) for i in range(len(knots) - degree)]
    return [widths[i] * lower[i] - widths[i + 1] * lower[i + 1] for i in range(len(knots) - degree - 1)]


def _reciprocal(width: Tensor) -> Tensor:
    """1 / width, and 0 for knots that coincide, as the recursion wants it."""
    return torch.where(width > 0, 1 / width, 0.0)


def _cox_de_boor(x: Tensor, grid: Tensor, degree: int) -> Tensor:
    """All B-splines of `degree` on the knots `grid` (rows, points) at x (..., rows): (..., rows, points - degree - 1)."""
    x = x.unsqueeze(-1)
    outside = (x < grid[:, :1]) | (x >= grid[:, -1:])
    x = torch.where(outside, grid[:, -1:].to(x.dtype), x)  # the last knot: every member is 0, infinities too
    members = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
    members = torch.where(x.isnan(), x, members)
    for k in range(1, degree + 1):
        left = (x - grid[:, : -k - 1]) * _reciprocal(grid[:, k:-1] - grid[:, : -k - 1])
        right = (grid[:, k + 1 :] - x) * _reciprocal(grid[:, k + 1 :] - grid[:, 1:-k])
        members = left * members[..., :-1] + right * members[..., 1:]
    return members


@functools.cache
def local_polynomials(degree: int) -> tuple[tuple[float, ...], ...]:
    """The degree+1 B-splines that live on one cell of a uniform grid, as polynomials of the position u in [0, 1).

    Returns:
        (degree+1, degree+1): row r, column p is the factor of u^p in the r-th member from the left. Exact
        rationals rounded once; row sums over r give the polynomial 1.
    """
    pieces: list[list[Fraction]] = [[Fraction(1)]]  # pieces[i]: the spline on its i-th cell, ascending powers of u
    for k in range(1, degree + 1):
        zero = [Fraction(0)] * k
        grown = []
        for i in range(k + 1):
            old, before = (pieces[i] if i < k else zero), (pieces[i - 1] if i > 0 else zero)
            rising = _times_linear(old, Fraction(i, k), Fraction(1, k))
            falling = _times_linear(before, Fraction(k + 1 - i, k), Fraction(-1, k))
            grown.append([a + b for a, b in zip(rising, falling, strict=True)])
        pieces = grown
    return tuple(tuple(float(value) for value in piece) for piece in reversed(pieces))


def _times_linear(polynomial: list[Fraction], constant: Fraction, slope: Fraction) -> list[Fraction]:
    product = [constant * value for value in polynomial] + [Fraction(0)]
    for power, value in enumerate(polynomial):
        product[power + 1] += slope * value
    return product
