"""The families of formulas, what makes one simpler than another, and where each is defined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kanformer.errors import ConfigError, did_you_mean
from kanformer.layers.formula_functions import GUARD, add_function, formula_function, remove_function

INFINITE = float("inf")


@dataclass(frozen=True)
class Family:
    """c * f(a * (x - t)) + e * x + d for all numbers that are free.

    Attributes:
        name: of the family. function: of f in `formula_functions`; "" for families without one, None for the module's own base.
        complexity: nodes of the printed expression, roughly; of two formulas that are as good the smaller one wins.
        shape: a coarse label.
        free: which of a and t are fitted ("at", "t", "a" or ""); the others are taken up by c and d.
        mirrored: whether -a gives another function of the family than a.
        domain: open interval of z = a * (x - t) where f is itself; the data must lie in it.
        pole: whether z = 0 is none of it.
        power: p with f(|a| z) = |a|^p f(z), if there is one: then a is printed as +1 or -1.
        sympy: f as a formula, z -> expression; None: no algebra.
    """

    name: str
    function: str | None
    complexity: float
    shape: str
    free: str = "at"
    mirrored: bool = False
    domain: tuple[float, float] = (-INFINITE, INFINITE)
    pole: bool = False
    power: float | None = None
    sympy: Callable[[Any], Any] | None = None


def _named(name: str) -> Callable[[Any], Any]:
    def make(z: Any) -> Any:
        import sympy

        return getattr(sympy, name)(z)

    return make


def _relu(z: Any) -> Any:
    import sympy

    return sympy.Max(z, 0)


def _silu(z: Any) -> Any:
    import sympy

    return z / (1 + sympy.exp(-z))


def _gelu(z: Any) -> Any:
    import sympy

    return z * (1 + sympy.erf(z / sympy.sqrt(2))) / 2


def _softplus(z: Any) -> Any:
    import sympy

    return sympy.log(1 + sympy.exp(z))


def _gauss(z: Any) -> Any:
    import sympy

    return sympy.exp(-(z**2))


CLOSED = (
    Family("const", "", 0.5, "constant", free=""),
    Family("x", "", 1, "linear", free=""),
    Family("base", None, 1.5, "base", free=""),
    Family("base_x", None, 2, "base", free=""),
    Family("x^2", "x^2", 2, "power or exponential", free="t", power=2, sympy=lambda z: z**2),
    Family("cubic", "x^3", 4, "power or exponential", free="t", power=3, sympy=lambda z: z**3),
)
_POSITIVE = (GUARD, INFINITE)
_SEARCHED = (
    Family("x^3", "x^3", 3, "power or exponential", free="t", power=3, sympy=lambda z: z**3),
    Family("abs", "abs", 2, "hinge", free="t", power=1, sympy=_named("Abs")),
    Family("relu", "relu", 2, "hinge", free="t", mirrored=True, power=1, sympy=_relu),
    Family("exp", "exp", 2, "power or exponential", free="a", mirrored=True, domain=(-INFINITE, 30.0), sympy=_named("exp")),
    Family("log", "log", 2, "power or exponential", free="t", mirrored=True, domain=_POSITIVE, sympy=_named("log")),
    Family("sqrt", "sqrt", 2, "power or exponential", free="t", mirrored=True, domain=_POSITIVE, power=0.5, sympy=_named("sqrt")),
    Family("1/x", "1/x", 2, "power or exponential", free="t", pole=True, power=-1, sympy=lambda z: 1 / z),
    Family("tanh", "tanh", 3, "saturating", sympy=_named("tanh")),
    Family("sin", "sin", 3, "oscillating", sympy=_named("sin")),
    Family("gauss", "gauss", 3, "bump", sympy=_gauss),
    Family("softplus", "softplus", 3, "hinge", mirrored=True, sympy=_softplus),
    Family("silu", "silu", 3, "hinge", mirrored=True, sympy=_silu),
    Family("gelu", "gelu", 3, "hinge", mirrored=True, sympy=_gelu),
    Family("erf", "erf", 3, "saturating", sympy=_named("erf")),
    Family("atan", "atan", 3, "saturating", sympy=_named("atan")),
    Family("softsign", "softsign", 3, "saturating", sympy=lambda z: z / (1 + _named("Abs")(z))),
)
_REGISTERED: dict[str, Family] = {}
_ALWAYS = ("const", "x")


def families() -> dict[str, Family]:
    """All families by name: closed forms first, those that users registered last."""
    return {family.name: family for family in (*CLOSED, *_SEARCHED, *_REGISTERED.values())}


def choose(library: Iterable[str] | None) -> tuple[Family, ...]:
    """The families with these names, with "const" and "x", in the library's order; None means all.

    Raises:
        ConfigError: an unknown name.
    """
    known = families()
    if library is None:
        return tuple(known.values())
    wanted = [library] if isinstance(library, str) else list(library)
    for name in wanted:
        if name not in known:
            raise ConfigError("choose a library of formulas", got=repr(name), hint=did_you_mean(str(name), known))
    return tuple(family for name, family in known.items() if name in wanted or name in _ALWAYS)


def register_function(
    name: str,
    function: Callable[[Tensor], Tensor],
    sympy_function: Callable[[Any], Any] | None = None,
    *,
    domain: tuple[float, float] = (-INFINITE, INFINITE),
    complexity: float = 3.0,
    mirrored: bool = True,
    shape: str = "registered",
) -> None:
    """Adds a function of your own to the library, for this process. A model snapped to it needs the same call before it is loaded.

    Args:
        name: a word of at most 32 letters, digits and underscores.
        function: elementwise and differentiable in torch, z -> f(z); must be finite for all finite z (carry on beyond its domain).
        sympy_function: the same for sympy expressions; without it formulas cannot be exported to sympy, LaTeX and numpy.
        domain: open interval of z in which f is meant; only formulas that keep the data in it are considered.
        complexity: > 0; tanh has 3.
        mirrored: False if f(-z) is f(z) or -f(z) up to a constant, which halves the search.

    Raises:
        ConfigError: a name that is taken or no plain word, a function that is not elementwise, or a wrong domain or complexity.
    """
    lo, hi = domain
    if not lo < hi or not complexity > 0:
        raise ConfigError("register a function", subject=name, got=f"domain={domain}, complexity={complexity}", expected="lo < hi and complexity > 0")
    add_function(name, function)
    _REGISTERED[name] = Family(name, name, float(complexity), shape, mirrored=mirrored, domain=(float(lo), float(hi)), sympy=sympy_function)


def unregister_function(name: str) -> None:
    """Forgets a function that `register_function` added."""
    remove_function(name)
    _REGISTERED.pop(name, None)


def valid_ends(family: Family, low: Tensor, high: Tensor) -> Tensor:
    """Where both ends of z's range lie in the family's domain, on one side of its pole."""
    least, most = low.minimum(high), low.maximum(high)
    good = (least > family.domain[0]) & (most < family.domain[1])
    return good & ((least > GUARD) | (most < -GUARD)) if family.pole else good


def both_of(family: Family):
    """z -> (f, f')."""
    assert family.function
    return formula_function(family.function).both
