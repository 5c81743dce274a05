"""B-splines of any degree on an extended grid, by Cox and de Boor's recursion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor

from kanformer.bases.base import Basis, weighted


class BSpline(Basis):
    """The basis of the KAN paper: G + k B-splines of degree k on G intervals, knots extended by k on each side.

    Inside the grid range the members sum to 1 and reproduce polynomials up to degree k; beyond the extended
    knots they are 0. On uniform knots the members of a cell are fixed polynomials, which a compiler turns into one pass; on
    free knots they come from the recursion.
    """

    name = "bspline"
    source = "Liu et al. 2024, KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756, section 2.2; de Boor 1978, chapter IX"

    def __post_init__(self) -> None:
        for degree in range(max(0, self.spline_order - 1), self.spline_order + 1):
            local_polynomials(degree)

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
        place = self._place(x, constants)
        return place.spread(local_members(place.u, self.spline_order), self.n_basis)

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        k = self.spline_order
        if k == 0:
            return [member - member for member in self.members(x, constants)]
        if self.knots == "free":
            return _recursion_slopes(x, constants, k)
        place = self._place(x, constants)
        lower = [constants[1] * member for member in local_members(place.u, k - 1)]
        return place.spread([-lower[0], *(left - right for left, right in itertools.pairwise(lower)), lower[-1]], self.n_basis)

    def value(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        if not self._windowed:
            return super().value(x, coef, constants)
        place = self._place(x, constants)
        return weighted(local_members(place.u, self.spline_order), place.window(coef, self))

    def slope(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        """By the differences of the coefficients and the members of one degree less (de Boor 1978, chapter X, equation 15)."""
        if not self._windowed or self.spline_order == 0:
            return super().slope(x, coef, constants)
        place = self._place(x, constants)
        steps = [right - left for left, right in itertools.pairwise(place.window(coef, self))]
        return weighted(local_members(place.u, self.spline_order - 1), steps) * constants[1]

    def pullback(self, x: Tensor, grad: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if not self._windowed:
            return super().pullback(x, grad, coef, constants)
        local = [grad * member for member in local_members(self._place(x, constants).u, self.spline_order)]
        return grad * self.slope(x, coef, constants), self._place(x, constants).spread(local, self.n_basis), []

    def _bounds(self, constants: Tensor) -> tuple[Tensor, Tensor]:
        if self.knots == "free":
            return constants[self.spline_order], constants[self.spline_order + self.grid_size]
        return super()._bounds(constants)

    @property
    def _windowed(self) -> bool:
        return self.knots == "uniform" and self.extrapolation == "zero"

    def _place(self, x: Tensor, constants: Tensor) -> _Place:
        position = ((x - constants[0]) * constants[1] + self.spline_order).clamp(-1, self.n_basis + self.spline_order)
        cell = position.floor()
        return _Place(cell, position - cell)

    def sympy_members(self, x, lo, hi):
        from sympy import bspline_basis

        width = (hi - lo) / self.grid_size
        knots = tuple(lo + width * step for step in range(-self.spline_order, self.grid_size + self.spline_order + 1))
        return [bspline_basis(self.spline_order, knots, member, x) for member in range(self.n_basis)]


@dataclass(frozen=True)
class _Place:
    """Where x lies on uniform extended knots: the cell (-1 and the one past the last for all that is outside) and the position in it, in [0, 1)."""

    cell: Tensor
    u: Tensor

    def window(self, coef: Sequence[Tensor] | Tensor, basis: BSpline) -> list[Tensor]:
        """The k + 1 coefficients that count at x, 0 for members that do not exist.

        They are found by halving: each round moves the whole list on by a power of two or not, so that a vector
        machine needs one selection per entry that is still in question, and no look-up.
        """
        k, nothing = basis.spline_order, torch.zeros_like(self.cell)
        entries = [nothing] * (k + 1) + [coef[c] for c in range(basis.n_basis)] + [nothing] * (k + 1)
        start, shift = self.cell + 1, 1 << (basis.n_basis + k + 1).bit_length() - 1
        while shift:
            far = start >= shift
            start = torch.where(far, start - shift, start)
            entries = [torch.where(far, entries[i + shift] if i + shift < len(entries) else nothing, entries[i]) for i in range(min(k + shift, len(entries)))]
            shift //= 2
        return entries

    def spread(self, local: list[Tensor], n_basis: int) -> list[Tensor]:
        """All members from those that live on the cell, (k + 1) from the left; nan where they are."""
        nothing, order = local[-1] - local[-1], len(local) - 1
        here = [self.cell == cell for cell in range(n_basis + order)]
        found = []
        for member in range(n_basis):
            value = nothing
            for r in range(order + 1):
                value = torch.where(here[member + order - r], local[r], value)
            found.append(value)
        return found


def local_members(u: Tensor, degree: int) -> list[Tensor]:
    """The degree + 1 members that are not 0 on a cell of uniform knots, from the left, at the position u in it; nan where u is."""
    mirrored, factors = 1 - u, _POLYNOMIALS[degree]
    right = [_polynomial(factors[r], u) for r in range(degree // 2 + 1, degree + 1)]
    left = [_polynomial(factors[degree - r], mirrored) for r in range(degree // 2 + 1)]
    return left + right


def _polynomial(factors: Sequence[float], u: Tensor) -> Tensor:
    """The polynomial with these ascending factors."""
    if not any(factors[1:]):
        return u - u + factors[0]
    value: Tensor | float = factors[-1]
    for factor in reversed(factors[:-1]):
        value = value * u + factor if factor else value * u
    return cast(Tensor, value)


def _recursion(x: Tensor, knots: Tensor, degree: int) -> list[Tensor]:
    """Cox and de Boor's recursion on knots (points, rows), as a list of members; see `_cox_de_boor`."""
    points = len(knots)
    x = torch.minimum(torch.maximum(x, 2 * knots[0] - knots[-1]), 2 * knots[-1] - knots[0])  # infinities lie outside
    found = [torch.where((x >= knots[i]) & (x < knots[i + 1]), 1.0, 0.0).to(x.dtype) + (x - x) for i in range(points - 1)]
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


_POLYNOMIALS: dict[int, tuple[tuple[float, ...], ...]] = {}  # filled when a basis is made: a compiler that follows the formulas finds numbers here


def local_polynomials(degree: int) -> tuple[tuple[float, ...], ...]:
    """The degree+1 B-splines that live on one cell of a uniform grid, as polynomials of the position u in [0, 1).

    Returns:
        (degree+1, degree+1): row r, column p is the factor of u^p in the r-th member from the left. Exact
        rationals rounded once; row sums over r give the polynomial 1.
    """
    if degree not in _POLYNOMIALS:
        _POLYNOMIALS[degree] = _polynomials(degree)
    return _POLYNOMIALS[degree]


def _polynomials(degree: int) -> tuple[tuple[float, ...], ...]:
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
