"""The fixed part b(x) of an edge function, by name or as the caller's own module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kanformer.errors import ConfigError, did_you_mean

_BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}

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
        base: a name (gelu, gelu_tanh, identity, relu, sigmoid, silu, tanh), an elementwise function or module.

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
