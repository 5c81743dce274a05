"""Moving and refining the grids of learned functions: plan, check, then change. Behind `GridModule.update_grid` and `refine_grid`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kanformer.bases import make_basis
from kanformer.bases.base import Basis
from kanformer.bases.bspline import BSpline
from kanformer.errors import ConfigError
from kanformer.layers.density import Density
from kanformer.layers.knots import cell_points, grid_for, refined_grid
from kanformer.layers.transfer import Changes, chunks, even_weights, fit_transfer, planes_of
from kanformer.ops.spread import is_sharded

if TYPE_CHECKING:
    from kanformer.layers.grids import GridModule


@dataclass(frozen=True)
class GridReport:
    """What a change of grids did. Ranges are (rows,) float64 tensors, one row per function group or input.

    Attributes:
        tokens: number of tokens that the new grid was made from; 0 for a refinement.
        old_lo, old_hi, lo, hi: the ranges before and after.
        outside_before, outside_after: fraction of the values outside them, or None for a refinement.
        change: root mean square of new minus old function over the data inside the new range, relative to the old function, of the
            row that changed most; the spline part only, in float64. With a refinement over the whole range, evenly.
        rounded_change: the same after the coefficients were rounded to the parameter's dtype.
        even_change: the same as `change`, evenly over the new range: how much the functions changed where there are few data or none.
    """

    tokens: int
    old_lo: Tensor
    old_hi: Tensor
    lo: Tensor
    hi: Tensor
    outside_before: float | None
    outside_after: float | None
    change: float
    rounded_change: float
    even_change: float


@dataclass
class Regrid:
    """A planned change of one module's grids; nothing is changed before `apply`.

    Attributes:
        basis: the basis afterwards. grid: (rows, points), as it will be stored, on the CPU.
        transfer: (rows, n_new, n_old) float64, or None where the coefficients stay.
    """

    module: GridModule
    basis: Basis
    grid: Tensor
    transfer: Tensor | None
    report: GridReport

    @torch.no_grad()
    def apply(self) -> GridReport:
        """Changes the module: in place, except that another number of coefficients is a new parameter."""
        module, grid = self.module, self.grid.to(self.module.kan_grid.device)
        coef = module.kan_coef
        if self.transfer is not None and self.basis.n_basis != module.basis.n_basis:
            shape = list(coef.shape)
            shape[1] = self.basis.n_basis
            coef = nn.Parameter(coef.new_empty(shape), requires_grad=coef.requires_grad)
        if self.transfer is not None:
            source, target = planes_of(module.kan_coef), planes_of(coef)
            for rows in chunks(len(source), source[0].numel()):
                target[rows] = (self.transfer[rows] @ source[rows].double().cpu()).to(device=target.device, dtype=target.dtype)
        if coef is not module.kan_coef:
            module.kan_coef, module.basis, module.kan_grid = coef, self.basis, grid
        else:
            module.kan_grid.copy_(grid)
        return self.report


@torch.no_grad()
def plan_update(module: GridModule, density: Density, *, grid_eps: float, margin: float, tolerance: float | None, name: str) -> Regrid:
    """Plans what `GridModule.update_grid` does; `name` is for messages."""
    _check_module(module, "update the grid", name)
    _check_numbers("update the grid", name, tolerance, grid_eps=grid_eps, margin=margin)
    basis, old = module.basis, module.kan_grid.detach().cpu()
    grid = grid_for(basis, old, density, grid_eps, margin)
    old_lo, old_hi, lo, hi = (bound.double() for bound in (*basis.grid_bounds(old), *basis.grid_bounds(grid)))
    before = density.share_outside(old_lo, old_hi) if density.outside is None else density.outside
    after = density.share_outside(lo, hi)
    if basis.n_inner:  # its members do not read the grid
        return Regrid(module, basis, grid, None, GridReport(density.tokens, old_lo, old_hi, lo, hi, before, after, 0.0, 0.0, 0.0))
    density = density.thinned()
    even = cell_points(basis, grid)
    nodes = torch.cat([density.nodes, even], 1)
    data = torch.cat([density.inside(lo, hi), torch.zeros_like(even)], 1)
    transfer, changes = fit_transfer(module, basis, grid, nodes, data, even_weights(data, even))
    _check_change(module, basis, changes, tolerance, "update the grid", name)
    return Regrid(module, basis, grid, transfer, GridReport(density.tokens, old_lo, old_hi, lo, hi, before, after, *changes))


@torch.no_grad()
def plan_refinement(module: GridModule, grid_size: int, *, tolerance: float | None, name: str) -> Regrid:
    """Plans what `GridModule.refine_grid` does; `name` is for messages."""
    action, basis = "refine the grid", module.basis
    _check_module(module, action, name)
    _check_numbers(action, name, tolerance)
    if basis.n_inner:
        raise ConfigError(action, subject=name, got=f"basis {basis.name!r}", expected="a basis with a grid", hint="It has no grid to refine.")
    if not isinstance(grid_size, int) or isinstance(grid_size, bool) or grid_size < basis.grid_size:
        hint = "A coarser grid cannot hold the function: patch the original model anew with that grid_size."
        raise ConfigError(action, subject=name, got=f"grid_size={grid_size!r}", expected=f"an integer >= {basis.grid_size}, the present one", hint=hint)
    finer = make_basis(basis.name, grid_size, basis.spline_order, knots=basis.knots, extrapolation=basis.extrapolation)
    old = module.kan_grid.detach().cpu()
    lo, hi = (bound.double() for bound in basis.grid_bounds(old))
    grid = old if finer == basis else refined_grid(basis, finer, old)
    nodes = cell_points(finer, grid)
    even = even_weights(torch.zeros_like(nodes), nodes)
    transfer, changes = fit_transfer(module, finer, grid, nodes, even, even)
    _check_change(module, finer, changes, tolerance, action, name)
    return Regrid(module, finer, grid, transfer, GridReport(0, lo, hi, lo, hi, None, None, *changes))


def _check_module(module: GridModule, action: str, name: str) -> None:
    if module.kan_grid.is_meta or module.kan_coef.is_meta:
        raise ConfigError(action, subject=name, got="a module on the meta device", hint="Load its weights first.")
    if is_sharded(module.kan_coef):
        raise ConfigError(action, subject=name, got="coefficients sharded over processes (DTensor)", hint="Do it before the model is wrapped or sharded.")


def _check_numbers(action: str, name: str, tolerance: float | None, **fractions: float) -> None:
    for key, value in fractions.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1 or (key == "grid_eps" and value == 0):
            raise ConfigError(action, subject=name, got=f"{key}={value!r}", expected="a number in (0, 1]" if key == "grid_eps" else "a number in [0, 1]")
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ConfigError(action, subject=name, got=f"tolerance={tolerance!r}", expected="None or a number >= 0")


def _check_change(module: GridModule, basis: Basis, changes: Changes, tolerance: float | None, action: str, name: str) -> None:
    change = changes.change
    if math.isfinite(change) and (tolerance is None or change <= tolerance):
        return
    if not math.isfinite(change):
        raise ConfigError(action, subject=name, got="coefficients that are not finite", hint="The function is broken already; the grid is as it was.")
    hint = "The grid is as it was. Pass tolerance=None to accept the nearest fit"
    if isinstance(basis, BSpline) and tolerance:
        hint += f", or {_way_out(module.basis, basis, change / tolerance, action)}"
    raise ConfigError(
        action, subject=name, got=f"a fit that changes the function by {change:.1e} of its size", expected=f"at most {tolerance:g}", hint=hint + "."
    )


def _way_out(old: Basis, new: Basis, factor: float, action: str) -> str:
    """What makes the change smaller by `factor`: the error at a knot of a spline of degree k falls as the (k + 1/2)-th power of the cell."""
    if action.startswith("refine"):
        return f"take a multiple of {old.grid_size}, such as {old.grid_size * math.ceil(new.grid_size / old.grid_size)}"
    if new.knots == "free":
        return "refine first and use a larger grid_eps"
    finer = math.ceil(1.5 * factor ** (1 / (new.spline_order + 0.5)))
    return f"refine to about grid_size={new.grid_size * finer} first"
