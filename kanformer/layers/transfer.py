"""The least-squares fit of functions in one basis and grid by another.

Such a fit is linear in what it fits. So the new coefficients are T @ old, where T (n_new, n_old) fits the old members by
the new ones, and the cost does not depend on the number of outputs or of tokens. Everything is solved in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.layers.knots import exact_grid

if TYPE_CHECKING:
    from kanformer.layers.grids import GridModule

_EVEN_WEIGHT = 1e-4  # of the even sample against the data: determines what the data leave open, and no more
_CHUNK_ELEMENTS = 2**22
_FAINT = 1e-6  # of the mean square over a module's functions: below, a function's change is counted against this


class Changes(NamedTuple):
    """By how much a fit changes functions, as in `GridReport`."""

    change: float
    rounded_change: float
    even_change: float


def planes_of(coef: Tensor) -> Tensor:
    """A view of the coefficients as (rows, n_basis, outputs): of `EdgeFunctions` (groups, n_basis), of `KANLinear` (out, n_basis, in)."""
    coef = coef.detach()
    return coef.unsqueeze(-1) if coef.dim() == 2 else coef.permute(2, 1, 0)


def even_weights(data: Tensor, even: Tensor) -> Tensor:
    """Weights in the shape of `data` (rows, points) for the last of the points, which are the even sample, (rows, fewer points)."""
    weights = torch.zeros_like(data)
    weights[:, data.shape[1] - even.shape[1] :] = 1 / even.shape[1]
    return weights


def fit_transfer(module: GridModule, basis: Basis, grid: Tensor, nodes: Tensor, data: Tensor, even: Tensor) -> tuple[Tensor, Changes]:
    """The transfer (rows, n_new, n_old) and how much it changes the functions.

    Args:
        grid: the new grid. nodes, data, even: (rows, points) and their weights under the data and evenly over the range.
    """
    old_basis, coef = module.basis, planes_of(module.kan_coef)
    exact, exact_old = exact_grid(basis, grid), exact_grid(old_basis, module.kan_grid.detach().cpu())
    kept = (exact == exact_old).all(1) if basis == old_basis else torch.zeros(len(grid), dtype=torch.bool)
    transfers, sums = [], []
    for rows in chunks(len(grid), nodes.shape[1] * basis.n_basis * 4 + coef[0].numel() * 4):
        x = nodes[rows].t()
        new, old = (one.evaluate(x, knots[rows]).transpose(0, 1) for one, knots in ((basis, exact), (old_basis, exact_old)))
        transfer = _nested(old_basis, basis, len(new))
        if transfer is None:
            root = (data[rows] + _EVEN_WEIGHT * even[rows]).sqrt().unsqueeze(-1)
            transfer = torch.linalg.lstsq(root * new, root * old, driver="gelsd").solution
        transfer[kept[rows]] = torch.eye(basis.n_basis, old_basis.n_basis, dtype=torch.float64)
        transfers.append(transfer)
        before = coef[rows].double().cpu()
        after = transfer @ before
        rounded = after.to(coef.dtype).double()
        both = torch.cat([new, old], -1)
        factors = [torch.linalg.qr(weights[rows].sqrt().unsqueeze(-1) * both, mode="r").R for weights in (data, even)]
        values = [(0 * after, before), (after, -before), (rounded, -before)]
        sums.append(torch.stack([(factor @ torch.cat(pair, 1)).square().sum((1, 2)) for factor in factors for pair in values]))
    scale, change, rounded_change, even_scale, even_change, _ = torch.cat(sums, 1)
    return torch.cat(transfers), Changes(_worst(change, scale), _worst(rounded_change, scale), _worst(even_change, even_scale))


def _worst(change: Tensor, scale: Tensor) -> float:
    """The largest relative change over the rows; both are sums of squares."""
    floor = _FAINT * scale.mean()
    relative = torch.where(change > 0, change / torch.maximum(scale, floor).clamp(min=1e-300), change)
    return math.sqrt(float(relative.amax())) if not bool(relative.isnan().any()) else math.nan


def _nested(old: Basis, new: Basis, rows: int) -> Tensor | None:
    """The transfer where each old member is one of the new ones, or None."""
    if new.n_basis == old.n_basis or not hasattr(old, "nested_members"):
        return None
    transfer = torch.zeros(rows, new.n_basis, old.n_basis, dtype=torch.float64)
    transfer[:, old.nested_members(new.grid_size), torch.arange(old.n_basis)] = 1.0  # type: ignore[attr-defined]
    return transfer


def chunks(rows: int, elements: int) -> Iterator[slice]:
    """Slices of the rows that hold a bounded number of elements."""
    step = max(1, _CHUNK_ELEMENTS // max(1, elements))
    return (slice(first, first + step) for first in range(0, rows, step))
