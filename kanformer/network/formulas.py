"""From learned functions to a formula of the whole network: fit, put in place, train the numbers, write down, check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelRecorder
from kanformer.errors import ConfigError, SurgeryError
from kanformer.interpret.symbolic.fit import fit_module
from kanformer.interpret.symbolic.fits import OUTCOMES, MapFits
from kanformer.interpret.symbolic.formula import formula_of_row
from kanformer.layers.formulas import make_formulas
from kanformer.network.data import inputs_for
from kanformer.network.kan import KAN, multiply
from kanformer.surgery.tables import table

_DIGITS = range(3, 18)


@dataclass(frozen=True)
class NetworkFits:
    """Formulas for the edges of a network: `maps` holds a `MapFits` per map."""

    maps: tuple[MapFits, ...]

    def open_edges(self) -> list[tuple[int, int, int]]:
        """(map, input, output) of the edges without an acceptable formula."""
        found = []
        for number, one in enumerate(self.maps):
            found += [(number, int(one.input[place]), int(one.output[place])) for place in (~one.accepted).nonzero().flatten()]
        return found

    def __str__(self) -> str:
        rows = []
        for number, one in enumerate(self.maps):
            for place in range(len(one)):
                names = " ~ ".join(one.equivalence(place)) or f"nearest: {one.families[int(one.family[place])]}"
                edge = f"{number}: {int(one.input[place])} -> {int(one.output[place])}"
                rows.append((edge, OUTCOMES[int(one.outcome[place])], names, f"{float(one.r2[place]):.6f}", f"{float(one.nrmse[place]):.2g}"))
        return table(("map: edge", "outcome", "families, the simplest first", "R2", "NRMSE"), rows, right=(3, 4))


@torch.no_grad()
def fit_formulas(network: KAN, X: Any, *, library: Iterable[str] | None = None, **tolerances: float) -> NetworkFits:
    """See `KAN.symbolic`."""
    x, found = inputs_for(network, X, "fit formulas to a KAN"), []
    for map, level in zip(network.maps, network.levels[1:], strict=True):
        y = map(x)
        recorder = ChannelRecorder(map.in_features, map.in_features, *map.grid_bounds)
        recorder.add(x)
        node = y.double().std(0, correction=0).cpu()
        found.append(fit_module(map, recorder.finish(), library=library, node_std=node.clamp(min=1e-300), **tolerances))
        x = multiply(y, level)
    return NetworkFits(tuple(found))


@torch.no_grad()
def put_in(network: KAN, fits: NetworkFits, *, trainable: bool = True) -> int:
    """See `KAN.snap`."""
    action = "snap a KAN"
    if len(fits.maps) != len(network.maps) or any(one.n_functions != map.kan_base_weight.numel() for one, map in zip(fits.maps, network.maps, strict=True)):
        raise ConfigError(action, got="fits of another network", hint="Call network.symbolic(X) again.")
    if any(map.kan_formulas is not None for map in network.maps):
        raise SurgeryError(action, got="a network with formulas", hint="Call network.unsnap() first.")
    count = 0
    for map, one in zip(network.maps, fits.maps, strict=True):
        places = (one.accepted & one.numbers.float().isfinite().all(1)).nonzero().flatten()
        if not len(places):
            continue
        index = torch.stack([one.input[places], one.output[places]], 1)
        settings: dict[str, Any] = {"trainable": trainable, "device": map.kan_grid.device, "dtype": map.kan_grid.dtype}
        map.kan_formulas = make_formulas(index, one.numbers[places], one.family[places], one.families, **settings)
        count += len(places)
    return count


def expressions(network: KAN, inputs: Sequence[Any]) -> list[Any]:
    """The outputs as sympy expressions with the numbers as they are.

    Raises:
        ConfigError: edges without formulas, by name.
    """
    import sympy

    values = list(inputs)
    _check_closed(network)
    for map, level in zip(network.maps, network.levels[1:], strict=True):
        assert map.kan_formulas is not None
        bias = [0.0] * map.out_features if map.kan_bias is None else map.kan_bias.tolist()
        terms: list[list[Any]] = [[sympy.Float(value, 17)] for value in bias]
        for place, (source, target) in enumerate(map.kan_formulas.kan_index.tolist()):
            terms[target].append(formula_of_row(map, place).sympy(values[source]))
        sums = [sympy.Add(*some) for some in terms]
        factors = sums[level.sums :]
        values = sums[: level.sums] + [sympy.Mul(*factors[i : i + level.arity]) for i in range(0, len(factors), level.arity)]
    return values


def formula(network: KAN, X: Any, *, names: Sequence[str] | None = None, tolerance: float = 1e-3, simplify: bool = True) -> list[Any]:
    """See `KAN.formula`."""
    import sympy

    x = inputs_for(network, X, "write a KAN as a formula")
    names = [f"x{i}" for i in range(network.in_features)] if names is None else list(names)
    if len(names) != network.in_features:
        raise ConfigError("write a KAN as a formula", got=f"{len(names)} names", expected=f"{network.in_features}, one per input")
    symbols = [sympy.Symbol(name, real=True) for name in names]
    with torch.no_grad():
        wanted = network(x).double().cpu()
    found = []
    for number, exact in enumerate(expressions(network, symbols)):
        check = _Check(symbols, x.double().cpu(), wanted[:, number], tolerance)
        exact = check(exact)
        if exact is None:
            raise ConfigError(
                "write a KAN as a formula", subject=f"output {number}", got="an expression that differs from the network on X by more than the tolerance",
                hint="The samples leave the formulas' domains; give others, or a larger tolerance.",
            )  # fmt: skip
        candidates = [exact]
        if simplify:
            candidates = [simple for digits in (12, 6) if (simple := check(sympy.simplify(_rounded(exact, digits)))) is not None] + candidates
        best = min(candidates, key=sympy.count_ops)
        short = next((rounded for digits in _DIGITS if (rounded := check(_rounded(best, digits))) is not None), best)
        found.append(short)
    return found


def _check_closed(network: KAN) -> None:
    missing = []
    for number, map in enumerate(network.maps):
        have = set() if map.kan_formulas is None else {tuple(pair) for pair in map.kan_formulas.kan_index.tolist()}
        missing += [f"layers.{number} {i} -> {o}" for i in range(map.in_features) for o in range(map.out_features) if (i, o) not in have]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        hint = "Fit them (network.symbolic(X), network.snap(fits)), loosen tol_node or r2_min, register a function, or train with regularization."
        raise ConfigError("write a KAN as a formula", got=f"edges without a formula: {shown}", hint=hint)


class _Check:
    """Gives an expression back if it agrees with the network on the samples."""

    def __init__(self, symbols: Sequence[Any], x: Tensor, wanted: Tensor, tolerance: float) -> None:
        self.symbols, self.x, self.wanted = symbols, x.numpy(), wanted
        self.limit = tolerance * max(float(wanted.std(correction=0)), 1e-12)

    def __call__(self, expression: Any) -> Any:
        import numpy as np
        import sympy

        with np.errstate(all="ignore"):
            values = sympy.lambdify(self.symbols, expression, "scipy")(*self.x.T)
        values = torch.as_tensor(np.broadcast_to(np.asarray(values, dtype=np.float64), self.wanted.shape).copy())
        error = float((values - self.wanted).square().mean().sqrt())
        return expression if error <= self.limit else None


def _rounded(expression: Any, digits: int) -> Any:
    """Numbers with so many significant digits; whole ones and multiples of pi that are as near become exact."""
    import sympy

    def short(number: Any) -> Any:
        value, close = float(number), 10.0**-digits
        for unit, exact in ((1.0, sympy.Integer(1)), (torch.pi, sympy.pi)):
            for parts in (1, 2, 3, 4):
                whole = round(value / unit * parts)
                if whole and abs(value / unit * parts / whole - 1) < close:
                    return sympy.Rational(whole, parts) * exact
        return sympy.Integer(0) if abs(value) < close * 1e-2 else sympy.Float(f"{value:.{digits}g}")

    return expression.xreplace({number: short(number) for number in expression.atoms(sympy.Float)})
