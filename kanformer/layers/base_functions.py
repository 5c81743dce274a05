"""The fixed part b(x) of an edge function, by name or as the caller's own module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, did_you_mean


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's GELU."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, Primer's activation (arXiv 2109.08668)."""
    return torch.relu(x).square()


_BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "quick_gelu": lambda: FunctionModule(quick_gelu),
    "relu": nn.ReLU,
    "relu_squared": lambda: FunctionModule(relu_squared),
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "zero": lambda: FunctionModule(torch.zeros_like),
}

NAMES = tuple(_BY_NAME)

BaseFunction = str | Callable[[Tensor], Tensor] | nn.Module


class FunctionModule(nn.Module):
    """A plain function as a module, so that it shows in `print(model)` and moves with it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def base_function(base: BaseFunction) -> nn.Module:
    """The module that computes b(x), elementwise.

    Args:
        base: a name (elu, gelu, gelu_tanh, hardswish, identity, leaky_relu, mish, quick_gelu, relu, relu_squared, sigmoid, silu, softplus, tanh,
            zero), an elementwise function or module.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(base, nn.Module):
        return base
    if callable(base):
        return FunctionModule(base)
    if base not in _BY_NAME:
        raise ConfigError("find a base function", got=repr(base), hint=did_you_mean(str(base), _BY_NAME))
    return _BY_NAME[base]()


def has_parameters(base: nn.Module) -> bool:
    """Whether b has numbers that are trained (PReLU, xIELU)."""
    return next(base.parameters(), None) is not None


def normal_quantiles(points: int = 4096) -> Tensor:
    """Evenly spaced quantiles of N(0, 1), (points,) in float64: a sample without chance."""
    levels = (torch.arange(points, dtype=torch.float64, device="cpu") + 0.5) / points
    return torch.special.ndtri(levels)


@torch.no_grad()
def base_values(base: nn.Module, x: Tensor) -> Tensor:
    """b(x) in float64, computed in the dtype and on the device of the base's own numbers if it has any, else in float32."""
    parameter = next(base.parameters(), None)
    return base(x.float() if parameter is None else x.to(parameter)).to(x)


@torch.no_grad()
def second_moment(base: nn.Module) -> float:
    """E[b(z)^2] for z ~ N(0, 1): what the variance-preserving initialisation divides by."""
    if any(parameter.is_meta for parameter in base.parameters()):
        return 1.0  # nothing is initialised on the meta device
    return max(float(base_values(base, normal_quantiles()).square().mean()), 1e-6)
