"""The one-variable functions that formulas are made of, with their derivatives: plain torch, defined for every x."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.errors import ConfigError, did_you_mean

GUARD = 1e-3  # how near to a pole or to the end of a domain an argument is followed; beyond, the function carries on from there
_LARGEST = 30.0  # of the argument of exp
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")

Function = Callable[[Tensor], Tensor]
Pair = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FormulaFunction:
    """f(z), elementwise.

    Attributes:
        value: f, finite for every finite z.
        both: (f, f') in one go.
    """

    name: str
    value: Function
    both: Pair


def _cube(z: Tensor) -> tuple[Tensor, Tensor]:
    square = z * z
    return square * z, 3 * square


def _exp(z: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.exp(z.clamp(max=_LARGEST))
    return value, value


def _log(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clamp(min=GUARD)
    return torch.log(z), 1 / z


def _sqrt(z: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.sqrt(z.clamp(min=GUARD**2))
    return value, 0.5 / value


def _reciprocal(z: Tensor) -> tuple[Tensor, Tensor]:
    size = z.abs().clamp(min=GUARD)
    value = torch.where(z < 0, -1 / size, 1 / size)
    return value, -value * value


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(z)
    return value, 1 - value * value


def _gauss(z: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.exp(-z * z)
    return value, -2 * z * value


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(z)
    value = z * gate
    return value, gate + value * (1 - gate)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    gate = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return z * gate, gate + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _softsign(z: Tensor) -> tuple[Tensor, Tensor]:
    share = 1 / (1 + z.abs())
    return z * share, share * share


_BOTH: dict[str, Pair] = {
    "x^2": lambda z: (z * z, 2 * z),
    "x^3": _cube,
    "abs": lambda z: (z.abs(), z.sign()),
    "relu": lambda z: (torch.relu(z), (z > 0).to(z.dtype)),
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "1/x": _reciprocal,
    "tanh": _tanh,
    "sin": lambda z: (torch.sin(z), torch.cos(z)),
    "gauss": _gauss,
    "softplus": lambda z: (F.softplus(z), torch.sigmoid(z)),
    "silu": _silu,
    "gelu": _gelu,
    "erf": lambda z: (torch.erf(z), torch.exp(-z * z) * (2 / math.sqrt(math.pi))),
    "atan": lambda z: (torch.atan(z), 1 / (1 + z * z)),
    "softsign": _softsign,
}


def _first(both: Pair) -> Function:
    return lambda z: both(z)[0]


_VALUES: dict[str, Function] = {  # where f alone is cheaper than with its derivative
    "x^2": torch.square,
    "abs": torch.abs,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "gauss": lambda z: torch.exp(-z * z),
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "erf": torch.erf,
    "atan": torch.atan,
    "softsign": F.softsign,
}
_FUNCTIONS = {name: FormulaFunction(name, _VALUES.get(name, _first(both)), both) for name, both in _BOTH.items()}
BUILT_IN = tuple(_FUNCTIONS)


def formula_function(name: str) -> FormulaFunction:
    """The function called `name`.

    Raises:
        ConfigError: there is none; one that a user registered must be registered again in each process.
    """
    if name not in _FUNCTIONS:
        hint = f"{did_you_mean(name, _FUNCTIONS)} A function of your own must be registered before the model is loaded: kanformer.register_function(...)."
        raise ConfigError("find the function of a formula", got=repr(name), hint=hint)
    return _FUNCTIONS[name]


def known_functions() -> tuple[str, ...]:
    """The names of all functions, those that were registered last."""
    return tuple(_FUNCTIONS)


def add_function(name: str, function: Function) -> FormulaFunction:
    """Makes a user's elementwise torch function known under a name of its own; the derivative comes from autograd.

    Raises:
        ConfigError: a name that is taken or no plain word, or a function that is not elementwise, differentiable and finite at 0.5.
    """
    action = "register a function"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(action, got=repr(name), expected="a word of at most 32 letters, digits and _, a letter first")
    if name in _FUNCTIONS or name in ("const", "x", "base", "base_x", "cubic", "0"):
        raise ConfigError(action, got=repr(name), expected="a name that is not taken", hint="Remove your own with kanformer.unregister_function(name).")
    probe = torch.full((2, 3), 0.5, dtype=torch.float64)
    try:
        found = function(probe)
        good = isinstance(found, Tensor) and found.shape == probe.shape and bool(found.isfinite().all())
        slope = _by_autograd(function)(probe)[1]
    except Exception as error:  # whatever a user's function does
        raise ConfigError(action, subject=name, got=f"{type(error).__name__}: {error}", expected="an elementwise, differentiable torch function") from error
    if not good or not bool(slope.isfinite().all()):
        raise ConfigError(action, subject=name, got="values of another shape, or not finite at 0.5", expected="an elementwise torch function")
    _FUNCTIONS[name] = FormulaFunction(name, function, _by_autograd(function))
    return _FUNCTIONS[name]


def remove_function(name: str) -> None:
    """Forgets a function that a user registered."""
    if name in BUILT_IN or name not in _FUNCTIONS:
        raise ConfigError("unregister a function", got=repr(name), expected="one that was registered")
    del _FUNCTIONS[name]


def _by_autograd(function: Function) -> Pair:
    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            value = function(leaf)
            slope = torch.autograd.grad(value.sum(), leaf)[0]
        return value.detach(), slope

    return both
