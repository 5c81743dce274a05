"""Learned one-variable functions applied elementwise, one per group of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanformer.bases import make_basis
from kanformer.errors import ConfigError
from kanformer.layers.base_functions import BaseFunction, base_function, has_parameters
from kanformer.layers.formulas import Formulas
from kanformer.layers.grids import GridModule, check_input, check_sizes
from kanformer.ops import edge_functions


class EdgeFunctions(GridModule):
    """psi_g(x) = b(x) + sum_c coef[g, c] * B[c](x), where channel i belongs to group g = i // (channels // groups).

    Args:
        channels: number of channels, the last dimension of the input.
        groups: number of functions; None means one per channel. Must divide `channels`.
        basis, grid_size, spline_order, grid_range, knots, extrapolation: see `KANConfig`.
        base: b, see `base_function`.

    Shapes: input and output (..., channels). `kan_coef` (groups, n_basis) starts at zero, so psi starts as b.
    Source: GR-KAN's group-wise functions, arXiv 2409.10594, with the KAN paper's splines.
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        *,
        basis: str = "bspline",
        grid_size: int = 8,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-4.0, 4.0),
        knots: str = "uniform",
        extrapolation: str = "zero",
        base: BaseFunction = "silu",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        groups = channels if groups is None else groups
        check_sizes(self, channels=channels, groups=groups)
        if channels % groups:
            raise ConfigError("make EdgeFunctions", got=f"{groups} groups for {channels} channels", expected="groups that divide the channels")
        self.channels, self.groups = channels, groups
        made = make_basis(basis, grid_size, spline_order, knots=knots, extrapolation=extrapolation)
        self._register_functions(made, groups, grid_range, device, dtype)
        self.kan_coef = nn.Parameter(torch.empty(groups, self.basis.n_basis, device=device, dtype=dtype))
        self.base = base_function(base)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the coefficients to zero: psi is the base function."""
        self.init_functions("zero")

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x, self.channels)
        if self.kan_formulas is not None:
            return self._partly_formulas(x, self.kan_formulas)
        if has_parameters(self.base):  # which autograd must see: the operator differentiates for x alone
            return self.base(x) + self.spline(x)
        return edge_functions(x, self.kan_coef, self.kan_grid, self.basis, self.kan_inner, base=self.base)

    def _partly_formulas(self, x: Tensor, formulas: Formulas) -> Tensor:
        """The formulas for their groups and splines for the rest; shapes depend on nothing but the number of formulas."""
        snapped = formulas.kan_index[:, 0]
        taken = torch.zeros(self.groups, dtype=torch.int8, device=snapped.device).index_fill(0, snapped, 1)
        rest = taken.argsort(stable=True)[: self.groups - len(formulas)]
        grouped = x.unflatten(-1, (self.groups, -1))
        pieces = [formulas.grouped(grouped.index_select(-2, snapped), self.base)]
        if len(formulas) < self.groups:
            others, inner = grouped.index_select(-2, rest).flatten(-2), None if self.kan_inner is None else self.kan_inner[rest]
            base = None if has_parameters(self.base) else self.base
            y = edge_functions(others, self.kan_coef[rest], self.kan_grid[rest], self.basis, inner, base=base)
            y = y if base is not None else self.base(others) + y
            pieces.insert(0, y.unflatten(-1, (len(rest), -1)))
        order = torch.cat([rest, snapped]).argsort()
        return torch.cat(pieces, -2).index_select(-2, order).flatten(-2)

    def spline(self, x: Tensor) -> Tensor:
        """The learned part alone, (..., channels)."""
        return edge_functions(x, self.kan_coef, self.kan_grid, self.basis, self.kan_inner)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, basis={self.basis.name}, grid_size={self.basis.grid_size}, spline_order={self.basis.spline_order}"
