"""Which base functions a compiled kernel may compute along with the learned part, so that they cost no pass of their own."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

_KNOWN = ("torch.nn.modules.activation", "torch.nn.modules.linear", "transformers.activations", "kanformer.layers.base_functions")

_standing_for: dict[Hashable, nn.Module] = {}


def fused_base(base: nn.Module | None, x: Tensor, coef: Tensor) -> nn.Module | None:
    """A module that computes what `base` does, the same one for all that are alike (each costs a compilation), or None.

    None for bases with parameters, hooks or an origin that a compiler may stumble over, and for functions whose learned
    part is still zero: then the base runs as torch's own kernel, and a freshly patched block equals its MLP to the bit.
    """
    if base is None or x.device.type != "cpu" or not bool(coef.any()):
        return None
    key = _likeness(base)
    return None if key is None else _standing_for.setdefault(key, base)


def _likeness(base: nn.Module) -> Hashable | None:
    attributes = vars(base)
    if type(base).__module__ not in _KNOWN or "forward" in attributes:
        return None
    if any(value for name, value in attributes.items() if name.startswith("_") and isinstance(value, dict)):
        return None  # parameters, children, hooks
    settings = {name: value for name, value in attributes.items() if not name.startswith("_") and name != "training"}
    if any(callable(value) and not str(getattr(value, "__module__", None) or "torch").startswith("torch") for value in settings.values()):
        return None
    try:
        key = (type(base), tuple(sorted(settings.items(), key=lambda item: item[0])))
        hash(key)
    except TypeError:
        return None
    return key


def base_pullback(base: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x for grad * base(x)."""
    pullback = torch.func.vjp(base, x)[1]
    return pullback(grad)[0]
