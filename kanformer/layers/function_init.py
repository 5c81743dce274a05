"""Where learned functions start: at zero, from noise, or as near as they can be to a function that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, did_you_mean
from kanformer.layers.base_functions import BaseFunction, base_function, base_values, normal_quantiles

if TYPE_CHECKING:
    from kanformer.layers.grids import GridModule

FUNCTION_INITS = ("zero", "noise", "fit")
_POINTS = 513  # of the range, to which a function is fitted


@torch.no_grad()
def init_functions(module: GridModule, init: str, std: float, function: BaseFunction | None) -> None:
    """See `GridModule.init_functions`."""
    if init not in FUNCTION_INITS:
        raise ConfigError("start the learned functions", got=f"init={init!r}", hint=did_you_mean(str(init), FUNCTION_INITS))
    if (init == "fit") != (function is not None):
        raise ConfigError("start the learned functions", got=f"init={init!r}, function={function!r}", expected="a function with init='fit', and only there")
    if module.kan_inner is not None:
        start = module.basis.initial_inner(module.kan_inner.shape[0])
        assert start is not None
        module.kan_inner.copy_(start)
    if init == "zero":
        nn.init.zeros_(module.kan_coef)
    elif init == "noise":
        nn.init.normal_(module.kan_coef)
        module.kan_coef.mul_(module.per_member(_noise_scales(module).to(module.kan_coef) * std))
    elif function is not None and not module.kan_grid.is_meta:
        _fit(module, base_function(function))


def _noise_scales(module: GridModule) -> Tensor:
    """Deviations of random coefficients, (n_basis, 1), that make all members alike over the range and their sum of variance 1 for unit-normal input."""
    if module.kan_grid.is_meta:
        return torch.ones(module.basis.n_basis, 1)
    grid = module.kan_grid[:1].detach().cpu().double()
    lo, hi = (float(bound) for bound in module.basis.grid_bounds(grid))
    even, normal = torch.linspace(lo, hi, 1024, dtype=torch.float64), normal_quantiles()
    over_range, over_normal = (module.basis.evaluate(x.unsqueeze(-1), grid)[:, 0].square().mean(0) for x in (even, normal))
    scales = over_range.clamp(min=1e-12).rsqrt()
    return (scales / (scales.square() * over_normal).sum().sqrt()).unsqueeze(-1)


def _fit(module: GridModule, function: Callable[[Tensor], Tensor]) -> None:
    grids, place = torch.unique(module.kan_grid.detach().cpu().double(), dim=0, return_inverse=True)  # the same fit for the same grid
    lo, hi = module.basis.grid_bounds(grids)
    x = lo + (hi - lo) * torch.linspace(0, 1, _POINTS, dtype=torch.float64).unsqueeze(-1)
    y = (function(x) - base_values(module.base, x)).to(x)
    inner = module.basis.fit_inner(y, x, grids)
    coef = module.basis.fit(y, x, grids, inner)
    if inner is not None and module.kan_inner is not None:
        module.kan_inner.copy_(inner[place])
    module.kan_coef.copy_(module.per_member(coef[place].t().to(module.kan_coef)) * module.function_weight)
