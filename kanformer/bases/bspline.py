"""B-splines of any degree on an extended grid, by Cox and de Boor's recursion."""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
from torch import Tensor

from kanformer.bases.base import Basis


class BSpline(Basis):
    """The basis of the KAN paper: G + k B-splines of degree k on G intervals, knots extended by k on each side.

    Inside the grid range the members sum to 1 and reproduce polynomials up to degree k; beyond the extended
    knots they are 0.
    """

    name = "bspline"
    source = "Liu et al. 2024, KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756, section 2.2; de Boor 1978, chapter IX"

    @property
    def n_basis(self) -> int:
        return self.grid_size + self.spline_order

    def make_grid(self, lo: Tensor, hi: Tensor) -> Tensor:
        k, cells = self.spline_order, self.grid_size
        steps = torch.arange(-k, cells + k + 1, dtype=lo.dtype, device=lo.device) / cells
        return lo.unsqueeze(-1) + (hi - lo).unsqueeze(-1) * steps

    def grid_bounds(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        return grid[:, self.spline_order], grid[:, self.spline_order + self.grid_size]

    def evaluate(self, x: Tensor, grid: Tensor) -> Tensor:
        return _cox_de_boor(x, grid, self.spline_order)

    def derivative(self, x: Tensor, grid: Tensor) -> Tensor:
        k = self.spline_order
        if k == 0:
            return torch.zeros(*x.shape, self.n_basis, dtype=x.dtype, device=x.device)
        lower = _cox_de_boor(x, grid, k - 1)
        slopes = k / (grid[:, k:-1] - grid[:, : -k - 1]), k / (grid[:, k + 1 :] - grid[:, 1:-k])
        return slopes[0] * lower[..., :-1] - slopes[1] * lower[..., 1:]


def _cox_de_boor(x: Tensor, grid: Tensor, degree: int) -> Tensor:
    """All B-splines of `degree` on the knots `grid` (rows, points) at x (..., rows): (..., rows, points - degree - 1)."""
    x = x.unsqueeze(-1)
    outside = (x < grid[:, :1]) | (x >= grid[:, -1:])
    x = torch.where(outside, grid[:, -1:].to(x.dtype), x)  # the last knot: every member is 0, infinities too
    members = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
    members = torch.where(x.isnan(), x, members)
    for k in range(1, degree + 1):
        left = (x - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
        right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
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
