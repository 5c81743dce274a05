"""A KAN map with a function on every edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kanformer.bases import make_basis
from kanformer.layers.base_functions import BaseFunction, base_function, has_parameters
from kanformer.layers.grids import GridModule, check_input, check_sizes
from kanformer.layers.initialization import preserve_variance_
from kanformer.layers.masks import live
from kanformer.ops import full_edges, kan_linear

_NOISE_SHARE = 0.01  # of the variance of a fresh map


class KANLinear(GridModule):
    """y[o] = bias[o] + sum_i (base_weight[o, i] * b(x_i) + sum_c coef[o, c, i] * B[c](x_i)).

    Args:
        in_features, out_features: widths.
        basis, grid_size, spline_order, grid_range, knots, extrapolation: see `KANConfig`; one grid per input.
        base: b, see `base_function`.
        bias: whether to add one number per output.

    Shapes: input (..., in_features), output (..., out_features), in the input's dtype.
    State: `kan_base_weight` (out, in), `kan_coef` (out, n_basis, in), `kan_bias` (out,), `kan_grid` (in, points),
        and `kan_inner` (in, n_inner) for a basis with inner numbers; where edges were taken out, `kan_mask` (out, in), bool: which are alive.
    Source: arXiv 2404.19756, equations 2.10-2.11, the scale w_s folded into the coefficients.
    """

    kan_mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: str = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-4.0, 4.0),
        knots: str = "uniform",
        extrapolation: str = "zero",
        base: BaseFunction = "silu",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(self, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        made = make_basis(basis, grid_size, spline_order, knots=knots, extrapolation=extrapolation)
        self._register_functions(made, in_features, grid_range, device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.kan_base_weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.kan_coef = nn.Parameter(torch.empty(out_features, self.basis.n_basis, in_features, **factory))
        self.kan_bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.base = base_function(base)
        self.register_buffer("kan_mask", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit output variance for unit-normal input: nearly all of it from the base weights, the rest from noise on the functions; zero bias."""
        preserve_variance_(self.kan_base_weight, self.base, 1 - _NOISE_SHARE)
        self.init_functions("noise", std=math.sqrt(_NOISE_SHARE / self.in_features))
        if self.kan_bias is not None:
            nn.init.zeros_(self.kan_bias)

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x, self.in_features)
        mask = self.kan_mask
        weight, coef = live(self.kan_base_weight, mask), live(self.kan_coef, None if mask is None else mask.unsqueeze(1))
        if self.kan_formulas is None:
            return self._splines(x, weight, coef)
        source, target = self.kan_formulas.kan_index.unbind(1)
        flat = torch.zeros(self.out_features * self.in_features, dtype=torch.int8, device=source.device)
        taken = flat.index_fill(0, target * self.in_features + source, 1).view(self.out_features, self.in_features).bool()
        y = self._splines(x, weight.masked_fill(taken, 0), coef.masked_fill(taken.unsqueeze(1), 0))
        return y + self.kan_formulas.summed(x, self.out_features, self.base).to(y.dtype)

    def _splines(self, x: Tensor, weight: Tensor, coef: Tensor) -> Tensor:
        if has_parameters(self.base):  # which autograd must see: the operator differentiates for x alone
            y = nn.functional.linear(self.base(x), weight, self.kan_bias)
            return y + full_edges(x, coef, self.kan_grid, self.basis, self.kan_inner)
        return kan_linear(x, self.base, weight, self.kan_bias, coef, self.kan_grid, self.basis, self.kan_inner)

    def spline(self, x: Tensor) -> Tensor:
        """The sum of the learned parts alone, (..., out_features)."""
        return full_edges(x, self.kan_coef, self.kan_grid, self.basis, self.kan_inner)

    def per_member(self, numbers: Tensor) -> Tensor:
        return numbers

    @property
    def function_weight(self) -> Tensor:
        return self.kan_base_weight.unsqueeze(1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.kan_bias is not None}, "
            f"basis={self.basis.name}, grid_size={self.basis.grid_size}, spline_order={self.basis.spline_order}"
        )
