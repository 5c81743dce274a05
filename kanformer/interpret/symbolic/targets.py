"""Each function as numpy and torch source, and the base functions as formulas: what exports are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kanformer.errors import ConfigError
from kanformer.interpret.curves import apply_base
from kanformer.interpret.symbolic.library import families
from kanformer.layers.base_functions import NAMES, base_function

TARGETS = ("numpy", "torch")
HEADERS = {
    "numpy": "import math\nimport warnings\n\nimport numpy as np\n\n_erf = np.vectorize(math.erf, otypes=[float])\n",
    "torch": "import warnings\n\nimport torch\nimport torch.nn.functional as F\n",
}
_CODE = {
    "x^2": ("z * z", "z * z"),
    "x^3": ("z * z * z", "z * z * z"),
    "abs": ("np.abs(z)", "z.abs()"),
    "relu": ("np.maximum(z, 0.0)", "torch.relu(z)"),
    "exp": ("np.exp(z)", "torch.exp(z)"),
    "log": ("np.log(z)", "torch.log(z)"),
    "sqrt": ("np.sqrt(z)", "torch.sqrt(z)"),
    "1/x": ("1 / z", "1 / z"),
    "tanh": ("np.tanh(z)", "torch.tanh(z)"),
    "sin": ("np.sin(z)", "torch.sin(z)"),
    "gauss": ("np.exp(-z * z)", "torch.exp(-z * z)"),
    "softplus": ("np.logaddexp(0.0, z)", "F.softplus(z)"),
    "silu": ("z / (1 + np.exp(-z))", "F.silu(z)"),
    "gelu": ("0.5 * z * (1 + _erf(z / 2**0.5))", "F.gelu(z)"),
    "erf": ("_erf(z)", "torch.erf(z)"),
    "atan": ("np.arctan(z)", "torch.atan(z)"),
    "softsign": ("z / (1 + np.abs(z))", "F.softsign(z)"),
    "identity": ("z", "z"),
    "zero": ("0 * z", "0 * z"),
    "sigmoid": ("1 / (1 + np.exp(-z))", "torch.sigmoid(z)"),
    "elu": ("np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))", "F.elu(z)"),
    "gelu_tanh": ("0.5 * z * (1 + np.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))", "F.gelu(z, approximate='tanh')"),
    "hardswish": ("z * np.clip(z + 3, 0, 6) / 6", "F.hardswish(z)"),
    "leaky_relu": ("np.where(z > 0, z, 0.01 * z)", "F.leaky_relu(z)"),
    "mish": ("z * np.tanh(np.logaddexp(0.0, z))", "F.mish(z)"),
    "quick_gelu": ("z / (1 + np.exp(-1.702 * z))", "z * torch.sigmoid(1.702 * z)"),
    "relu_squared": ("np.maximum(z, 0.0) ** 2", "torch.relu(z) ** 2"),
}
_BASE_FAMILY = {"gelu": "gelu", "gelu_tanh": "gelu", "silu": "silu", "relu": "relu", "tanh": "tanh", "softplus": "softplus", "sigmoid": "tanh", "identity": "x"}
_PROBE = (-6.0, 6.0, 97)


@torch.no_grad()
def base_label(base: nn.Module) -> str:
    """The name in `base_functions` of the function that a module computes, recognised by its values (transformers has classes of its own); or ""."""
    x = torch.linspace(*_PROBE)
    try:
        values = apply_base(base, x)
    except Exception:  # a base that cannot be run outside its model
        return ""
    for name in NAMES:
        if values.shape == x.shape and float((values - base_function(name)(x)).abs().max()) <= 2e-6:
            return name
    return ""


def label_family(label: str) -> str:
    """The family that has this base function among its members ("x" for the identity, both forms of GELU in "gelu"), or ""."""
    return _BASE_FAMILY.get(label, "")


def source(function: str, target: str) -> str:
    """f(z) in numpy or torch, an expression in z.

    Raises:
        ConfigError: an unknown target, or a registered function without a sympy form.
    """
    if target not in TARGETS:
        raise ConfigError("write a formula as code", got=f"target={target!r}", expected=f"one of {', '.join(TARGETS)}")
    if function in _CODE:
        return _CODE[function][TARGETS.index(target)]
    import sympy

    expression = symbolic(function)(sympy.Symbol("z", real=True))
    if target == "numpy":
        from sympy.printing.numpy import NumPyPrinter

        return str(NumPyPrinter({"allow_unknown_functions": False}).doprint(expression)).replace("numpy.", "np.")
    from sympy.printing.pytorch import TorchPrinter

    return str(TorchPrinter({"allow_unknown_functions": False}).doprint(expression))


def symbolic(function: str) -> Callable[[Any], Any]:
    """f as sympy, z -> expression.

    Raises:
        ConfigError: a registered function without one, or a base function that is not known.
    """
    found = next((family.sympy for family in families().values() if family.function == function), None)
    made = found or _BASES.get(function)
    if made is None:
        hint = "Pass sympy_function to kanformer.register_function." if function else "The base function of this model is none that kanformer knows."
        raise ConfigError("write a formula", subject=function or "base", got="a function without a sympy form", hint=hint)
    return made


def _sympy(make: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def build(z: Any) -> Any:
        import sympy

        return make(sympy, z)

    return build


_BASES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "zero": lambda z: 0 * z,
    "sigmoid": _sympy(lambda s, z: 1 / (1 + s.exp(-z))),
    "elu": _sympy(lambda s, z: s.Piecewise((z, z > 0), (s.exp(z) - 1, True))),
    "gelu_tanh": _sympy(lambda s, z: z * (1 + s.tanh(s.sqrt(2 / s.pi) * (z + s.Float("0.044715") * z**3))) / 2),
    "hardswish": _sympy(lambda s, z: z * s.Min(s.Max(z + 3, 0), 6) / 6),
    "leaky_relu": _sympy(lambda s, z: s.Piecewise((z, z > 0), (z / 100, True))),
    "mish": _sympy(lambda s, z: z * s.tanh(s.log(1 + s.exp(z)))),
    "quick_gelu": _sympy(lambda s, z: z / (1 + s.exp(-s.Float("1.702") * z))),
    "relu_squared": _sympy(lambda s, z: s.Max(z, 0) ** 2),
}
