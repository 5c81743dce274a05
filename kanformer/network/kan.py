"""The stand-alone network of the KAN paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kanformer.layers.grids import check_input
from kanformer.layers.kan_linear import KANLinear
from kanformer.layers.regrid import GridReport
from kanformer.network.widths import Level, read_widths

if TYPE_CHECKING:
    from kanformer.network.formulas import NetworkFits
    from kanformer.network.history import History


class KAN(nn.Module):
    """A network of learnable one-variable functions: maps of full edges, one after the other.

    Args:
        width: nodes per level, for example [2, 5, 1]; a pair [5, 2] is five nodes that add and two that multiply.
        mult: instead of pairs, the number of multiplication nodes of each level, for example [0, 2, 0].
        mult_arity: factors per multiplication node.
        basis, grid_size, spline_order, grid_range, knots, extrapolation, base, bias: of every map, see `KANLinear`.
        seed: of the random start; None takes torch's own generator. The generator is left as it was.
        dtype: torch.float64 for fits beyond single precision.

    Shapes: (..., inputs) -> (..., outputs). State: `layers.0.kan_coef` and so on, see `KANLinear`.
    Source: arXiv 2404.19756, equation 2.7; multiplication nodes: arXiv 2408.10205, section 3.
    """

    def __init__(
        self,
        width: Sequence[int | Sequence[int]],
        *,
        mult: Sequence[int] | None = None,
        mult_arity: int = 2,
        basis: str = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        knots: str = "uniform",
        extrapolation: str = "zero",
        base: str = "silu",
        bias: bool = True,
        seed: int | None = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.levels = read_widths(width, mult, mult_arity)
        self.settings: dict[str, Any] = {
            "basis": basis,
            "grid_size": grid_size,
            "spline_order": spline_order,
            "grid_range": tuple(grid_range),
            "knots": knots,
            "extrapolation": extrapolation,
            "base": base,
            "bias": bias,
        }
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            pairs = zip(self.levels[:-1], self.levels[1:], strict=True)
            self.layers = nn.ModuleList(KANLinear(a.nodes, b.inner, device=device, dtype=dtype, **self.settings) for a, b in pairs)
        if dtype == torch.float64:
            self._sharpen_grids()

    @torch.no_grad()
    def _sharpen_grids(self) -> None:
        """Knots in double precision: rounded ones would move the functions by 1e-7."""
        for map in self.maps:
            map.kan_grid = map.basis.make_grid(*(bound.double() for bound in map.grid_bounds))

    @property
    def width(self) -> list[int | list[int]]:
        """The width list, a copy."""
        return [level.written() for level in self.levels]

    @property
    def in_features(self) -> int:
        return self.levels[0].nodes

    @property
    def out_features(self) -> int:
        return self.levels[-1].nodes

    @property
    def grid_size(self) -> int:
        """G of the maps."""
        return self.maps[0].basis.grid_size

    @property
    def maps(self) -> list[KANLinear]:
        """The maps in order."""
        return [layer for layer in self.layers if isinstance(layer, KANLinear)]

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x, self.in_features)
        for map, level in zip(self.maps, self.levels[1:], strict=True):
            x = multiply(map(x), level)
        return x

    def steps(self, x: Tensor) -> Iterator[tuple[KANLinear, Tensor, Tensor]]:
        """Every map with what it reads and what it gives, multiplication nodes not yet multiplied."""
        check_input(self, x, self.in_features)
        for map, level in zip(self.maps, self.levels[1:], strict=True):
            y = map(x)
            yield map, x, y
            x = multiply(y, level)

    def fit(self, X, y, X_val=None, y_val=None, **settings: Any) -> History:
        """Trains the network in place and returns the history; the best state is kept. All settings: `kanformer.network.fit.fit`."""
        from kanformer.network.fit import fit

        return fit(self, X, y, X_val, y_val, **settings)

    @torch.no_grad()
    def update_grid(self, x: Tensor, *, grid_eps: float = 0.02, margin: float = 0.01) -> list[GridReport]:
        """Moves every map's grids onto what reaches it from the samples x (n, inputs), map after map, each refitted to its old functions.

        Moving a map's grid changes what the next one reads a little, so the maps are run again in order; see `KANLinear.update_grid`.
        """
        check_input(self, x, self.in_features)
        reports = []
        for map, level in zip(self.maps, self.levels[1:], strict=True):
            reports.append(map.update_grid(x, grid_eps=grid_eps, margin=margin, tolerance=None))
            x = multiply(map(x), level)
        return reports

    def refine(self, grid_size: int, *, tolerance: float | None = None) -> list[GridReport]:
        """Gives every map a finer grid over the same range, its functions refitted (arXiv 2404.19756, section 2.4); optimizers must be made again.

        With a multiple of the present G the functions are kept exactly; otherwise the nearest ones are taken, and a `tolerance` refuses
        a larger relative change. All maps are planned before the first is changed.
        """
        from kanformer.layers.regrid import plan_refinement

        plans = [plan_refinement(map, grid_size, tolerance=tolerance, name=f"layers.{number}") for number, map in enumerate(self.maps)]
        reports = [plan.apply() for plan in plans]
        self.settings["grid_size"] = grid_size
        return reports

    def symbolic(self, X, *, library: Iterable[str] | None = None, **tolerances: float) -> NetworkFits:
        """Finds a formula for every edge, on the samples X (n, inputs), or says that there is none. Changes nothing.

        Args:
            library: names of families, see `kanformer.fit_symbolic`; None: all.
            tolerances: tol_node, r2_min, tie, negligible, likewise; node deviations are measured.
        """
        from kanformer.network.formulas import fit_formulas

        return fit_formulas(self, X, library=library, **tolerances)

    def snap(self, fits: NetworkFits, *, trainable: bool = True) -> int:
        """Puts all accepted formulas in the place of their edges; returns how many. With `trainable`, `fit` trains their numbers on.

        Raises:
            ConfigError: fits of another network. SurgeryError: formulas are there already.
        """
        from kanformer.network.formulas import put_in

        return put_in(self, fits, trainable=trainable)

    def unsnap(self) -> None:
        """Takes all formulas out: the functions are those from before `snap`."""
        for map in self.maps:
            map.kan_formulas = None

    def formula(self, X, *, names: Sequence[str] | None = None, tolerance: float = 1e-3, simplify: bool = True) -> list[Any]:
        """A sympy expression per output of a network whose edges are all formulas, rounded to as few digits and simplified as far as
        it agrees with the network on X, samples that no training saw: rms difference over the output's deviation at most `tolerance`.

        Raises:
            ConfigError: edges without a formula, which are named.
        """
        from kanformer.network.formulas import formula

        return formula(self, X, names=names, tolerance=tolerance, simplify=simplify)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, both or none; `KAN.load(folder)` gives the network back, bit for bit."""
        from kanformer.network.files import save

        save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, device=None) -> KAN:
        """A network that `save` wrote.

        Raises:
            CheckpointError: no such folder, or files that are damaged or of another kind.
        """
        from kanformer.network.files import load

        return load(folder, device=device)

    def extra_repr(self) -> str:
        return f"width={self.width}, grid_size={self.grid_size}, parameters={sum(parameter.numel() for parameter in self.parameters()):,}"


def multiply(values: Tensor, level: Level) -> Tensor:
    """The nodes of a level from what the map before it gives: sums as they are, products of `arity` neighbours."""
    if not level.products:
        return values
    factors = values[..., level.sums :].unflatten(-1, (level.products, level.arity))
    product = factors[..., 0]
    for number in range(1, level.arity):  # torch.prod's second derivative fails at zeros
        product = product * factors[..., number]
    return torch.cat([values[..., : level.sums], product], -1)
