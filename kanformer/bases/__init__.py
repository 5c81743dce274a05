"""What an edge function is: one file per basis. A file that defines a `Basis` subclass with a `name` is found by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from kanformer.errors import ConfigError, did_you_mean


def available() -> tuple[str, ...]:
    """Names of the bases, sorted: the names of this folder's files."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base"))


@functools.cache
def _basis_class(name: str):
    from kanformer.bases.base import Basis

    if name not in available():
        raise ConfigError("find a basis", got=repr(name), hint=did_you_mean(name, available()))
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Basis) and getattr(value, "name", None) == name:
            return value
    raise ConfigError("find a basis", subject=module.__name__, expected=f"a Basis subclass with name = {name!r}")


def make_basis(name: str, grid_size: int = 8, spline_order: int = 3, *, knots: str = "uniform", extrapolation: str = "zero"):
    """The basis called `name` with G = grid_size intervals and degree k = spline_order; the rest as in `Basis`.

    Raises:
        ConfigError: an unknown name, sizes that make no grid, or an option that this basis does not have.
    """
    from kanformer.bases.base import EXTRAPOLATIONS, KNOTS

    if not (isinstance(grid_size, int) and isinstance(spline_order, int) and grid_size >= 1 and spline_order >= 0):
        raise ConfigError(
            "make a basis", got=f"grid_size={grid_size!r}, spline_order={spline_order!r}", expected="integers grid_size >= 1 and spline_order >= 0"
        )
    for option, value, known in (("knots", knots, KNOTS), ("extrapolation", extrapolation, EXTRAPOLATIONS)):
        if value not in known:
            raise ConfigError("make a basis", got=f"{option}={value!r}", hint=did_you_mean(str(value), known))
    made = _basis_class(name)(grid_size=grid_size, spline_order=spline_order, knots=knots, extrapolation=extrapolation)
    if knots == "free" and name != "bspline":
        raise ConfigError("make a basis", got=f"knots='free' with basis {name!r}", hint="Only B-splines have knots to set free.")
    if extrapolation == "linear" and made.unbounded:
        raise ConfigError("make a basis", got=f"extrapolation='linear' with basis {name!r}", hint="Its members are meant for all x.")
    return made


@functools.lru_cache(maxsize=256)
def basis_of(spec: str):
    """The basis that `Basis.spec` describes."""
    name, grid_size, spline_order, knots, extrapolation = spec.split(":")
    return make_basis(name, int(grid_size), int(spline_order), knots=knots, extrapolation=extrapolation)
