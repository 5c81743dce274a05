"""One formula with its validity range: text, sympy, LaTeX, numpy and torch code, and short constants where the tolerance allows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kanformer.errors import ConfigError
from kanformer.interpret.symbolic.fits import OUTCOMES, UNSNAPPABLE, MapFits
from kanformer.interpret.symbolic.library import families
from kanformer.interpret.symbolic.targets import HEADERS, base_label, source, symbolic
from kanformer.layers import EdgeFunctions
from kanformer.layers.base_functions import NAMES, base_function
from kanformer.layers.formula_functions import BUILT_IN, formula_function
from kanformer.layers.kan_linear import KANLinear

_PARTS = ("a", "t", "c", "e", "d")
_ROUND_NUMBERS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, math.pi, -math.pi)
_LOOSE = 1e4  # condition number above which a and t are told apart by rounding only


@dataclass(frozen=True)
class Formula:
    """c * f(a * (x - t)) + e * x + d for x in [low, high].

    Attributes:
        family, function: as in `Family`; the function of "base" and "base_x" is the base's label, "" if it is none that is known.
        nrmse, r2: of the fit. outcome, equivalent: see `fit_symbolic`.
        condition: of (a, t). shortened: which of the numbers were replaced by 0, +-1, 1/2, 2 or pi, or rounded.
    """

    family: str
    function: str
    a: float
    t: float
    c: float
    e: float
    d: float
    low: float
    high: float
    nrmse: float = 0.0
    r2: float = 1.0
    outcome: str = "unique"
    equivalent: tuple[str, ...] = ()
    condition: float = 1.0
    shortened: tuple[str, ...] = ()

    def values(self, x: Tensor) -> Tensor:
        """The formula at x, in x's dtype."""
        y = self.e * x + self.d
        return y if self.family in ("const", "x") else y + self.c * self._torch()(self.a * (x - self.t))

    def _torch(self) -> Callable[[Tensor], Tensor]:
        if self.family in ("base", "base_x") and self.function in NAMES:
            return base_function(self.function)
        return formula_function(self.function).value

    def normalised(self) -> Formula:
        """The same function with a = 1 or -1 where the family's c and d can take up the rest."""
        power = next((family.power for name, family in families().items() if name == self.family), None)
        size = abs(self.a)
        if self.family == "log":
            return replace(self, a=math.copysign(1.0, self.a), d=self.d + self.c * math.log(size))
        return self if power is None else replace(self, a=math.copysign(1.0, self.a), c=self.c * size**power)

    def sympy(self, x: Any = "x", *, piecewise: bool = False) -> Any:
        """The formula in x (a name, or an expression); `piecewise`: nan outside [low, high]."""
        import sympy

        x = sympy.Symbol(x, real=True) if isinstance(x, str) else x
        a, t, c, e, d = (_exact(getattr(self, name)) for name in _PARTS)
        y = e * x + d
        if self.family not in ("const", "x"):
            y = y + c * symbolic(self.function)(a * (x - t))
        return sympy.Piecewise((y, (x >= self.low) & (x <= self.high)), (sympy.nan, True)) if piecewise else y

    def latex(self, x: str = "x", digits: int = 4) -> str:
        """The formula and its range as LaTeX, numbers with so many digits."""
        import sympy

        short = sympy.N(self.sympy(x), digits)
        return sympy.latex(short) + rf", \quad {self.low:.{digits}g} \le {sympy.latex(sympy.Symbol(x))} \le {self.high:.{digits}g}"

    def code(self, target: str = "numpy", name: str = "formula", *, outside: str = "warn", header: bool = True) -> str:
        """Source of a function x -> y for arrays or tensors of any shape, which needs numpy or torch only.

        Args:
            target: "numpy" or "torch". name: of the function.
            outside: what it does where x leaves [low, high]: "warn", "raise" or "ignore".
            header: whether the imports are written above it.
        """
        if not name.isidentifier() or outside not in ("warn", "raise", "ignore"):
            raise ConfigError("write a formula as code", got=f"name={name!r}, outside={outside!r}", expected="an identifier, and warn, raise or ignore")
        lines = [f"def {name}(x):", f'    """{self.text()}"""']
        lines += ["    x = np.asarray(x, dtype=float)"] if target == "numpy" else []
        if outside != "ignore":
            message = f'"{name}: x outside its range [{self.low!r}, {self.high!r}]"'
            act = f"raise ValueError({message})" if outside == "raise" else f"warnings.warn({message}, stacklevel=2)"
            lines += [f"    if ((x < {self.low!r}) | (x > {self.high!r})).any():", f"        {act}"]
        y = f"{self.e!r} * x + {self.d!r}"
        if self.family not in ("const", "x"):
            lines.append(f"    z = {self.a!r} * (x - {self.t!r})")
            y = f"{self.c!r} * ({source(self.function, target)}) + {y}"
        elif target not in HEADERS:
            source("x^2", target)  # says which targets there are
        lines.append(f"    return {y}")
        return (HEADERS[target] + "\n\n" if header else "") + "\n".join(lines) + "\n"

    def traits(self) -> dict[str, float]:
        """What the data determine even where a and t are not: slope and curvature in the middle of the range."""
        x = torch.tensor((self.low + self.high) / 2, dtype=torch.float64)
        step = max((self.high - self.low) * 1e-3, 1e-12)
        left, middle, right = (float(self.values(x + shift)) for shift in (-step, 0.0, step))
        return {"slope": (right - left) / (2 * step), "curvature": (right - 2 * middle + left) / step**2}

    def text(self) -> str:
        """One line: the formula, where it is valid, how good it is, and what else would do."""
        a, t, c, e, d = (f"{getattr(self, name):.4g}" for name in _PARTS)
        inner = "x" if (a, t) == ("1", "0") else f"{a}*(x - {t})"
        label = {"base": self.function or "base", "base_x": self.function or "base", "cubic": "cube", "x^2": "square", "x^3": "cube", "1/x": "reciprocal"}
        curved = "" if self.family in ("const", "x") else f"{c}*{label.get(self.family, self.family)}({inner}) + "
        linear = f"{e}*x + " if self.family in ("x", "base_x", "cubic") else ""
        found = f"{curved}{linear}{d} for {self.low:.4g} <= x <= {self.high:.4g} (R2 {self.r2:.6f}, NRMSE {self.nrmse:.2g}, {self.outcome})"
        if len(self.equivalent) > 1:
            found += f"; {' ~ '.join(self.equivalent)} ({len(self.equivalent)} equivalent)"
        if self.condition > _LOOSE:
            traits = self.traits()
            found += f"; a and t are not determined, slope {traits['slope']:.3g} and curvature {traits['curvature']:.3g} in the middle are"
        return found + (f"; shortened: {', '.join(self.shortened)}" if self.shortened else "")

    def __str__(self) -> str:
        return self.text()


def formula_of(fits: MapFits, place: int, nice: bool = False) -> Formula:
    """The chosen formula of the function at `place`.

    Raises:
        ConfigError: the function has none (its outcome is "unsnappable").
    """
    if int(fits.outcome[place]) == UNSNAPPABLE:
        near = fits.families[int(fits.family[place])]
        subject = f"{fits.path}, {fits.map}, input {int(fits.input[place])}" + ("" if fits.shared else f", output {int(fits.output[place])}")
        got = f"no family within the tolerances (nearest: {near}, R2 {float(fits.r2[place]):.4f})"
        raise ConfigError("write a formula", subject=subject, got=got, hint="Loosen tol_node or r2_min, or leave the spline.")
    name = fits.families[int(fits.family[place])]
    function = fits.base if name in ("base", "base_x") else families()[name].function or ""
    numbers = dict(zip(_PARTS, fits.numbers[place].tolist(), strict=True))
    made = Formula(
        name,
        function,
        **numbers,
        low=float(fits.low[place]),
        high=float(fits.high[place]),
        nrmse=float(fits.nrmse[place]),
        r2=float(fits.r2[place]),
        outcome=OUTCOMES[int(fits.outcome[place])],
        equivalent=tuple(fits.equivalence(place)),
        condition=float(fits.condition[place]),
    )
    return _shortened(made, fits, place) if nice else made


def formula_of_row(module: EdgeFunctions | KANLinear, place: int) -> Formula:
    """The formula that stands in a snapped module at `place` of its index; its range is the grid's."""
    formulas = module.kan_formulas
    if formulas is None:
        raise ConfigError("read a formula", subject=type(module).__name__, got="a module without formulas", hint="Snap it first.")
    name = next(name for name, part in formulas.parts() if part.start <= place < part.stop)
    function = base_label(module.base) if name in ("base", "base_x") else families()[name].function or ""
    numbers = dict(zip(_PARTS, formulas.kan_numbers[:, place].tolist(), strict=True))
    low, high = (float(bound[int(formulas.kan_index[place, 0])]) for bound in module.grid_bounds)
    return Formula(name, function, **numbers, low=low, high=high)


def _shortened(formula: Formula, fits: MapFits, place: int) -> Formula:
    """With constants from {0, +-1, 1/2, 2, pi}, or with fewer digits, as long as the node's error stays within the tolerance."""
    x = fits.nodes[int(fits.input[place])]
    exact = formula.values(x)
    own = float(fits.std[place]) if fits.shared else float(fits.std[place] / fits.weight[place].clamp(min=1e-300))
    room = max(0.0, min(fits.settings["tol_node"], 1.0) - formula.nrmse)

    def good(candidate: Formula) -> bool:
        change = (candidate.values(x) - exact).square().mean().sqrt()
        return bool(change <= room * max(own, 1e-300))

    current, done = formula.normalised(), []
    for name in _PARTS:
        value = getattr(current, name)
        nearest = min(_ROUND_NUMBERS, key=lambda number: abs(number - value))
        rounded = [float(f"{value:.{digits}g}") for digits in range(2, 7)]
        for number in ([nearest] if abs(nearest - value) <= 0.1 * max(1.0, abs(value)) else []) + rounded:
            if number != value and good(replace(current, **{name: number})):
                current = replace(current, **{name: number})
                done.append(name)
                break
    change = float((current.values(x) - exact).square().mean().sqrt()) / max(own, 1e-300)
    return replace(current, shortened=tuple(done), nrmse=formula.nrmse + change)


def _exact(value: float) -> Any:
    """A sympy number: integers, halves and pi as such, others as floats of full precision."""
    import sympy

    if abs(value) == math.pi:
        return sympy.pi if value > 0 else -sympy.pi
    doubled = value * 2
    return sympy.Rational(int(doubled), 2) if doubled == int(doubled) and abs(doubled) < 1e6 else sympy.Float(value, 17)


def is_registered(function: str) -> bool:
    """Whether a user added it, so that another process does not know it."""
    return function not in BUILT_IN and function not in NAMES
