"""What every basis provides. A basis is a small immutable object; the learned numbers live in the layers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sympy import Expr

EXTRAPOLATIONS = ("zero", "linear")
KNOTS = ("uniform", "free")


@dataclass(frozen=True)
class Basis(ABC):
    """A family B[0..n_basis) of one-variable functions that spans an edge function: phi(x) = sum_c coef[c] * B[c](x).

    A basis may hold learnable numbers of its own, `inner` (rows, n_inner), which every member reads: the denominator of the
    rational functions. Of the other bases n_inner is 0 and `inner` is None.

    Attributes:
        grid_size: G, number of intervals inside the grid range, >= 1.
        spline_order: k, the degree, >= 0 (bases without a degree ignore it).
        knots: "uniform" or "free" (B-splines only: any increasing knots, as a grid update sets them).
        extrapolation: beyond the grid range, "zero" (the members' own course: splines fade to 0) or "linear" (the tangent at the end).
    """

    grid_size: int = 8
    spline_order: int = 3
    knots: str = "uniform"
    extrapolation: str = "zero"

    name: ClassVar[str]
    source: ClassVar[str]
    n_inner: ClassVar[int] = 0
    unbounded: ClassVar[bool] = False  # members that are meant for all x: nothing to extrapolate

    def __post_init__(self) -> None:  # noqa: B027
        """Where a subclass prepares what its formulas read."""

    @property
    def spec(self) -> str:
        """The basis as text: what `bases.basis_of` reads, and what the operators are told."""
        return f"{self.name}:{self.grid_size}:{self.spline_order}:{self.knots}:{self.extrapolation}"

    @property
    @abstractmethod
    def n_basis(self) -> int:
        """Number of members, so of coefficients per function."""

    @property
    @abstractmethod
    def member_flops(self) -> int:
        """Floating-point operations that give all members at one x, counted on the formulas (an exponential or a sine as one)."""

    @abstractmethod
    def make_grid(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Grids with the ranges [lo, hi].

        Args:
            lo, hi: (rows,), lo < hi.

        Returns:
            (rows, grid_points), in the dtype of `lo`.
        """

    @abstractmethod
    def grid_bounds(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The ranges (lo, hi), each (rows,), that `make_grid` was given."""

    @abstractmethod
    def constants(self, grid: Tensor, inner: Tensor | None) -> Tensor:
        """What the members need of grid and inner numbers, one quantity per line: (quantities, rows)."""

    @abstractmethod
    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """Every member at x (..., rows), each in the shape of x, without extrapolation. Elementwise: a compiler makes one pass of it."""

    @abstractmethod
    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """The derivatives of `members`."""

    @abstractmethod
    def sympy_members(self, x: Expr, lo: float, hi: float) -> list[Expr]:
        """Every member on the grid with range [lo, hi] as a formula in x; free knots and inner numbers are the subclass' affair."""

    def inner_slopes(self, x: Tensor, constants: Tensor, value: Tensor) -> list[Tensor]:
        """d value / d inner for value = sum_c w_c * B[c](x) with any weights w, n_inner tensors in the shape of x."""
        return []

    def initial_inner(self, rows: int) -> Tensor | None:
        """The inner numbers that a fresh function starts from, (rows, n_inner), or None."""
        return None

    # The learned function and its derivatives, elementwise over (..., rows); coef is (n_basis, rows).

    def planes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """`members` with the extrapolation that was chosen."""
        if self.extrapolation == "zero":
            return self.members(x, constants)
        inside, beyond = self._clamped(x, constants)
        return [value + slope * beyond for value, slope in zip(self.members(inside, constants), self.slopes(inside, constants), strict=True)]

    def plane_slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """The derivatives of `planes`."""
        return self.slopes(x if self.extrapolation == "zero" else self._clamped(x, constants)[0], constants)

    def value(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        """sum_c coef[c] * B[c](x), where the coefficients have a number per row or one per x."""
        return weighted(self.planes(x, constants), coef)

    def slope(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        """sum_c coef[c] * B'[c](x), the derivative of `value`."""
        return weighted(self.plane_slopes(x, constants), coef)

    def pullback(self, x: Tensor, grad: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The gradients of grad * value: for x, and before summing over tokens for each coefficient and each inner number."""
        planes = self.planes(x, constants)
        inner = self.inner_slopes(x, constants, grad * weighted(planes, coef)) if self.n_inner else []
        return grad * self.slope(x, coef, constants), [grad * plane for plane in planes], inner

    def _clamped(self, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        """x cut to the grid range, and how far it lay beyond."""
        lo, hi = self._bounds(constants)
        inside = torch.minimum(torch.maximum(x, lo), hi)
        return inside, x - inside

    def _bounds(self, constants: Tensor) -> tuple[Tensor, Tensor]:
        """(lo, hi), each (rows,), from `constants`; here for [lo, cells per unit, ...]."""
        return constants[0], constants[0] + self.grid_size / constants[1]

    # The plain reference.

    def evaluate(self, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        """All members at x, plainly: the reference that every fast path is compared with.

        Args:
            x: (..., rows) one column per grid row, or any leading shape with rows == 1.
            grid: (rows, grid_points). inner: (rows, n_inner) or None.

        Returns:
            (..., rows, n_basis).
        """
        return torch.stack(self.planes(x, self.constants(grid, inner)), -1)

    def derivative(self, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        """d evaluate / dx, same shapes."""
        return torch.stack(self.plane_slopes(x, self.constants(grid, inner)), -1)

    def fit(self, y: Tensor, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        """Coefficients of the least-squares fit to samples y of a function at x.

        Args:
            y, x: (points, rows).
            grid: (rows, grid_points). inner: (rows, n_inner) or None, held fixed.

        Returns:
            (rows, n_basis), solved in float64 and safe where the samples do not determine them (smallest norm).
        """
        members = self.evaluate(x.double(), grid.double(), None if inner is None else inner.double()).transpose(0, 1)
        solution = torch.linalg.lstsq(members.cpu(), y.double().t().unsqueeze(-1).cpu(), driver="gelsd").solution
        return solution.squeeze(-1).to(device=y.device, dtype=y.dtype)

    def fit_inner(self, y: Tensor, x: Tensor, grid: Tensor) -> Tensor | None:
        """Inner numbers with which `fit` comes closest to the samples, (rows, n_inner), or None."""
        return None


def weighted(planes: Sequence[Tensor], factors: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum of planes, each times its factor."""
    return sum_up(factors[c] * plane for c, plane in enumerate(planes))


def sum_up(terms: Iterable[Tensor]) -> Tensor:
    """Their sum; unlike a sum that starts from zeros like x, it is not nan where only x is infinite."""
    return functools.reduce(torch.add, terms)


class RangeBasis(Basis):
    """A basis whose grids (rows, 2) are nothing but their bounds."""

    def make_grid(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.stack([lo, hi], -1)

    def grid_bounds(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        return grid[:, 0], grid[:, 1]

    def constants(self, grid: Tensor, inner: Tensor | None) -> Tensor:
        """[lo, cells per unit of x]."""
        lo, hi = self.grid_bounds(grid)
        return torch.stack([lo, self.grid_size / (hi - lo)])
