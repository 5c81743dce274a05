"""Grids from data and from coarser grids: where the knots go, and points that see every cell."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline
from kanformer.layers.density import Density, fill_constant, too_narrow


def exact_grid(basis: Basis, grid: Tensor) -> Tensor:
    """The knots in float64: of a uniform grid the even ones that its range stands for, not their roundings, since that is what the fast paths compute."""
    if basis.knots == "free":
        return grid.double()
    return basis.make_grid(*(bound.double() for bound in basis.grid_bounds(grid)))


def grid_for(basis: Basis, old: Tensor, density: Density, grid_eps: float, margin: float) -> Tensor:
    """The grid for these data, in the dtype of the old one."""
    room = margin * (density.hi - density.lo)
    wanted = density.lo - room, density.hi + room
    old_lo, old_hi = (bound.double() for bound in basis.grid_bounds(old))
    lo, hi = (bound.to(old.dtype).double() for bound in fill_constant(*wanted, old_lo, old_hi, cells=old.shape[1]))
    even = basis.make_grid(lo, hi).to(old.dtype)
    if basis.knots == "uniform":
        return even
    levels = torch.arange(1, basis.grid_size, dtype=torch.float64) / basis.grid_size
    inner = torch.cat([lo.unsqueeze(1), density.quantiles(levels, lo, hi), hi.unsqueeze(1)], 1)
    straight = cells(basis, basis.make_grid(lo, hi))
    free = _free_grid(basis, grid_eps * straight + (1 - grid_eps) * inner).to(old.dtype)
    constant = too_narrow(*wanted, cells=old.shape[1])
    held = constant & (lo == old_lo) & (hi == old_hi)
    usable = (free.diff(dim=1) > 0).all(1) & ~constant
    return torch.where(held.unsqueeze(1), old, torch.where(usable.unsqueeze(1), free, even))


def refined_grid(basis: Basis, finer: Basis, old: Tensor) -> Tensor:
    """The grid of `finer` over the ranges of the grid `old` of `basis`: free knots stay, with others evenly between them."""
    if basis.knots == "free":
        return _free_grid(finer, _subdivide(cells(basis, old), finer.grid_size)).to(old.dtype)
    lo, hi = (bound.double() for bound in basis.grid_bounds(old))
    return finer.make_grid(lo, hi).to(old.dtype)


def cells(basis: Basis, grid: Tensor) -> Tensor:
    """The ends of the cells inside the range, (rows, grid_size + 1) in float64."""
    if isinstance(basis, BSpline):
        return grid[:, basis.spline_order : basis.spline_order + basis.grid_size + 1].double()
    lo, hi = (bound.double().unsqueeze(1) for bound in basis.grid_bounds(grid))
    return lo + (hi - lo) * torch.arange(basis.grid_size + 1, dtype=torch.float64) / basis.grid_size


def _free_grid(basis: Basis, inner: Tensor) -> Tensor:
    """Knots inside the range, (rows, grid_size + 1), extended by k even steps on each side."""
    step = (inner[:, -1:] - inner[:, :1]) / basis.grid_size
    beyond = step * torch.arange(1, basis.spline_order + 1, dtype=inner.dtype)
    return torch.cat([inner[:, :1] - beyond.flip(1), inner, inner[:, -1:] + beyond], 1)


def _subdivide(ends: Tensor, parts: int) -> Tensor:
    """`parts` + 1 points that run through the cells' ends (rows, cells + 1) at an even pace."""
    pace = torch.arange(parts + 1, dtype=torch.float64) * ((ends.shape[1] - 1) / parts)
    left = pace.floor().long().clamp(max=ends.shape[1] - 2)
    return torch.lerp(ends[:, left], ends[:, left + 1], (pace - left).expand(len(ends), -1))


def cell_points(basis: Basis, grid: Tensor) -> Tensor:
    """Evenly spaced points inside every cell, (rows, points): enough to determine the coefficients (Schoenberg and Whitney)."""
    per_cell = max(4, basis.spline_order + 2)
    return _subdivide(cells(basis, grid), 2 * per_cell * basis.grid_size)[:, 1::2]
