"""The grid buffer that every spline layer carries: its check, its precision, its range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kanformer.bases.base import Basis
from kanformer.errors import ConfigError, ShapeError
from kanformer.layers.base_functions import BaseFunction
from kanformer.layers.function_init import init_functions

if TYPE_CHECKING:
    from kanformer.layers.density import Density
    from kanformer.layers.formulas import Formulas
    from kanformer.layers.regrid import GridReport


class GridModule(nn.Module):
    """A module with `basis` and one persistent `kan_grid` (rows, grid_points), kept in float32 when the model is cast to less."""

    basis: Basis
    base: nn.Module
    kan_coef: nn.Parameter
    kan_grid: Tensor
    kan_inner: nn.Parameter | None
    kan_formulas: Formulas | None  # instead of some of the functions; their coefficients stay where they are, unused

    def _register_functions(self, basis: Basis, rows: int, grid_range: tuple[float, float], device, dtype) -> None:
        """The grid and the basis' inner numbers (rows, n_inner), which most bases do not have."""
        self._register_grid(basis, rows, grid_range, device)
        inner = torch.empty(rows, basis.n_inner, device=device, dtype=dtype)
        self.kan_inner = nn.Parameter(inner) if basis.n_inner else None
        self.register_module("kan_formulas", None)

    def init_functions(self, init: str, *, std: float = 0.1, function: BaseFunction | None = None) -> None:
        """Starts the learned functions anew; base and weights stay.

        Args:
            init: "zero" (what is left is the base), "noise" (random functions of deviation `std` for unit-normal input), or "fit":
                base and learned part together are as near to `function` as the basis can come on the grid's range
                (full edges: base_weight times `function`).
            function: for "fit": a name as in `base_function`, an elementwise function or module.

        Raises:
            ConfigError: an unknown name, or a function that is missing or not wanted.
        """
        init_functions(self, init, std, function)

    def per_member(self, numbers: Tensor) -> Tensor:
        """Numbers (n_basis, rows or 1) in the shape in which they broadcast over `kan_coef`."""
        return numbers.t()

    @property
    def function_weight(self) -> Tensor | float:
        """What the base is multiplied by, in the shape in which it broadcasts over `kan_coef`."""
        return 1.0

    def _register_grid(self, basis: Basis, rows: int, grid_range: tuple[float, float], device) -> None:
        lo, hi = torch.tensor(grid_range, dtype=torch.float32, device="cpu").tolist()
        if not (lo < hi and math.isfinite(hi - lo)):
            raise ConfigError("make a grid", got=f"range {grid_range}", expected="two finite numbers lo < hi, different in float32")
        self.basis = basis
        ends = [torch.full((rows,), float(bound), dtype=torch.float32, device=device) for bound in (lo, hi)]
        self.register_buffer("kan_grid", basis.make_grid(*ends))

    @property
    def grid_channels(self) -> int:
        """Number of input channels."""
        return getattr(self, "channels", self.kan_grid.shape[0])

    @property
    def grid_bounds(self) -> tuple[Tensor, Tensor]:
        """(lo, hi) of the grids, each (rows,)."""
        return self.basis.grid_bounds(self.kan_grid)

    @torch.no_grad()
    def set_grid_range(self, lo: Tensor, hi: Tensor) -> None:
        """Moves the grids to the ranges [lo, hi], each (rows,). The coefficients stay, so call it before they are trained.

        Raises:
            ShapeError: wrong shapes, or somewhere not lo < hi, both finite, in float32.
        """
        rows = self.kan_grid.shape[0]
        lo, hi = lo.to(torch.float32), hi.to(torch.float32)
        if lo.shape != (rows,) or hi.shape != (rows,) or not bool(((lo < hi) & (hi - lo).isfinite()).all()):
            raise ShapeError(
                "set the range of a grid", got=f"lo {tuple(lo.shape)}, hi {tuple(hi.shape)}", expected=f"two finite tensors ({rows},) with lo < hi"
            )
        grid = self.basis.make_grid(lo, hi)
        self.kan_grid.copy_(grid.to(device=self.kan_grid.device))

    def update_grid(self, data: Tensor | Density, *, grid_eps: float = 0.02, margin: float = 0.01, tolerance: float | None = 1e-5) -> GridReport:
        """Moves the grids onto the data and refits the coefficients, so that the learned functions stay what they are.

        Each range becomes mean +- 4 standard deviations cut to what was seen, widened by `margin`. With knots="free" the knots inside it are
        grid_eps * even + (1 - grid_eps) * quantiles of the data in the range, extended by k even steps. The coefficients are the least-squares
        fit of the old functions (the spline part, extrapolation included) under the density of the data, in float64; zero stays exactly zero.
        A row whose data are constant keeps its range, moved onto them if it does not hold them. Outside the new range the functions may change.
        For a basis that does not read its grid (rational) only the range that figures show is moved.

        Args:
            data: samples of the input (..., channels), or a `Density`.
            grid_eps: in (0, 1]; 1 gives even knots. Does nothing with uniform knots.
            margin: in [0, 1], of the range's width, on each side.
            tolerance: largest relative change of the functions over the data, see `GridReport.change`; None accepts the nearest fit.

        Raises:
            ConfigError: the fit would change the functions by more than `tolerance` (uniform splines keep, in general, only what is
                polynomial or nests), or a wrong setting. DataError, ShapeError: unusable samples. Nothing is changed then.
        Source: knots as in the KAN paper's code (pykan, `update_grid_from_samples`).
        """
        from kanformer.layers.density import Density, warn_outside
        from kanformer.layers.regrid import plan_update

        name = type(self).__name__
        if isinstance(data, Tensor):
            check_input(self, data, self.grid_channels)
            data = Density.of_samples(data, self.kan_grid.shape[0])
        report = plan_update(self, data, grid_eps=grid_eps, margin=margin, tolerance=tolerance, name=name).apply()
        warn_outside(name, report.outside_after)
        return report

    def refine_grid(self, grid_size: int, *, tolerance: float | None = 1e-6) -> GridReport:
        """Gives the functions a finer grid over the same range: `kan_coef` becomes a new parameter, so an optimizer must be made again.

        B-splines keep their functions inside the range when `grid_size` is a multiple of the present one (beyond it they fade over k of the new,
        smaller cells); so do Chebyshev and Fourier functions, everywhere, with any larger one. The rest is the nearest fit.

        Args:
            grid_size: G', at least the present one.
            tolerance: largest relative change of the functions, root mean square over the range; None accepts the nearest fit.

        Raises:
            ConfigError: G' too small, no grid to refine (rational), or a change beyond `tolerance`. Nothing is changed then.
        """
        from kanformer.layers.regrid import plan_refinement

        return plan_refinement(self, grid_size, tolerance=tolerance, name=type(self).__name__).apply()

    def _apply(self, fn, recurse: bool = True):
        before = self.kan_grid
        super()._apply(fn, recurse)
        if self.kan_grid.dtype.itemsize < 4 and (self.kan_grid.is_meta or not before.is_meta):
            # Half a mantissa would move the knots: every path evaluates the spline argument in float32.
            self.kan_grid = before.to(device=self.kan_grid.device, dtype=torch.float32)
        return self


def check_input(module: nn.Module, x: Tensor, features: int) -> None:
    """Raises ShapeError unless x is floating point with `features` in its last dimension."""
    if not x.is_floating_point():
        raise ShapeError(f"apply {type(module).__name__}", got=f"input of dtype {x.dtype}", expected="a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ShapeError(f"apply {type(module).__name__}", got=f"input of shape {tuple(x.shape)}", expected=f"(..., {features})")


def check_sizes(module: nn.Module, **sizes: int) -> None:
    """Raises ConfigError unless every size is an integer >= 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"make {type(module).__name__}", got=f"{name}={value!r}", expected="an integer >= 1")
