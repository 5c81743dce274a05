"""What every basis provides. A basis is a small immutable object; the learned numbers live in the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis(ABC):
    """A family B[0..n_basis) of one-variable functions that spans an edge function.

    Attributes:
        grid_size: G, number of intervals inside the grid range, >= 1.
        spline_order: k, the degree, >= 0 (bases without a degree ignore it).
    """

    grid_size: int = 8
    spline_order: int = 3

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    @abstractmethod
    def n_basis(self) -> int:
        """Number of members, so of coefficients per function."""

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
    def evaluate(self, x: Tensor, grid: Tensor) -> Tensor:
        """All members at x, plainly: the reference that every fast path is compared with.

        Args:
            x: (..., rows) one column per grid row, or any leading shape with rows == 1.
            grid: (rows, grid_points).

        Returns:
            (..., rows, n_basis).
        """

    @abstractmethod
    def derivative(self, x: Tensor, grid: Tensor) -> Tensor:
        """d evaluate / dx, same shapes."""

    def fit(self, y: Tensor, x: Tensor, grid: Tensor) -> Tensor:
        """Coefficients of the least-squares fit to samples y of a function at x.

        Args:
            y, x: (points, rows).
            grid: (rows, grid_points).

        Returns:
            (rows, n_basis), solved in float64 and safe where the samples do not determine them (smallest norm).
        """
        members = self.evaluate(x.double(), grid.double()).transpose(0, 1)
        solution = torch.linalg.lstsq(members.cpu(), y.double().t().unsqueeze(-1).cpu(), driver="gelsd").solution
        return solution.squeeze(-1).to(device=y.device, dtype=y.dtype)
