"""A KAN map whose edges share one learned function per group of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.layers.base_functions import BaseFunction
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.grids import check_input, check_sizes
from kanformer.layers.initialization import preserve_variance_


class SharedKANLinear(nn.Module):
    """y[o] = bias[o] + sum_i weight[o, i] * psi_g(i)(x_i): the cost of a linear map plus one elementwise pass.

    Args:
        in_features, out_features: widths.
        groups: number of functions psi; None means one per input. Must divide `in_features`.
        basis, grid_size, spline_order, grid_range, knots, extrapolation, base: see `EdgeFunctions`.
        bias: whether to add one number per output.

    Shapes: input (..., in_features), output (..., out_features).
    State: `kan_weight` (out, in), `kan_bias` (out,), `kan_functions.kan_coef` (groups, n_basis), `kan_functions.kan_grid`.
    Source: GR-KAN, arXiv 2409.10594, section 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int | None = None,
        *,
        basis: str = "bspline",
        grid_size: int = 8,
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
        self.kan_functions = EdgeFunctions(
            in_features,
            groups,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            knots=knots,
            extrapolation=extrapolation,
            base=base,
            device=device,
            dtype=dtype,
        )
        self.kan_weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.kan_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights for unit output variance, functions at their base, zero bias."""
        self.kan_functions.reset_parameters()
        preserve_variance_(self.kan_weight, self.kan_functions.base)
        if self.kan_bias is not None:
            nn.init.zeros_(self.kan_bias)

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x, self.in_features)
        return F.linear(self.kan_functions(x), self.kan_weight, self.kan_bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.kan_bias is not None}"
