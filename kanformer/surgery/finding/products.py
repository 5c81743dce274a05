"""How gated blocks multiply their factors: A(gate) * U(up), with bounds on one or both in some families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Factors = tuple[nn.Module, nn.Module | None]
_LIMITS = ("swiglu_limit", "limit")
_ALPHAS = ("swiglu_alpha", "alpha")


class Bounded(nn.Module):
    """x cut to [low, high], plus `shift`."""

    def __init__(self, low: float, high: float, shift: float = 0.0) -> None:
        super().__init__()
        self.low, self.high, self.shift = low, high, shift

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(min=None if self.low == -math.inf else self.low, max=self.high)
        return x + self.shift if self.shift else x

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, shift={self.shift}"


class ScaledSiLU(nn.Module):
    """x * sigmoid(alpha * x)."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class _SoftCapped(nn.Module):
    """cap(x) * sigmoid(x), in float32."""

    def __init__(self, cap: nn.Module) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.cap(wide) * torch.sigmoid(wide)).to(x.dtype)


def _limit(owner: nn.Module) -> float:
    return float(_number(owner, _LIMITS))


def _clamped(owner: nn.Module, activation: nn.Module) -> Factors:
    limit = _limit(owner)
    return nn.Sequential(Bounded(-math.inf, limit), activation), Bounded(-limit, limit)


def _clamped_after(owner: nn.Module, activation: nn.Module) -> Factors:
    limit = _limit(owner)
    return nn.Sequential(activation, Bounded(-math.inf, limit)), Bounded(-limit, limit)


def _clamped_plus_one(owner: nn.Module, activation: nn.Module) -> Factors:
    limit = _limit(owner)
    return nn.Sequential(Bounded(-math.inf, limit), ScaledSiLU(float(_number(owner, _ALPHAS)))), Bounded(-limit, limit, 1.0)


def _soft_capped(owner: nn.Module, activation: nn.Module) -> Factors:
    return _SoftCapped(activation.gate_softcap), activation.up_softcap  # type: ignore[arg-type,return-value]


PRODUCTS: dict[str, Callable[[nn.Module, nn.Module], Factors]] = {
    "clamped": _clamped,  # DeepSeek-V4
    "clamped_after": _clamped_after,  # Step-3.7: after the activation
    "clamped_plus_one": _clamped_plus_one,  # gpt-oss
    "soft_capped": _soft_capped,  # Inkling 2
}


def factors(name: str | None, owner: nn.Module, activation: nn.Module) -> Factors:
    """(A, U) of a block's product; U is None where the factor goes in as it is.

    Raises:
        AttributeError: the owner has not the numbers that this product needs.
    """
    return (activation, None) if name is None else PRODUCTS[name](owner, activation)


def possible_products(owner: nn.Module, activation: Any) -> list[str | None]:
    """The products that a block with these attributes can have, the plain one first."""
    found: list[str | None] = [None]
    for name in PRODUCTS:
        try:
            factors(name, owner, activation)
        except (AttributeError, TypeError, ValueError):
            continue
        found.append(name)
    return found


def _number(owner: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)
