"""Formulas that a linear fit finds: 1, x, x^2, cubics, the base function, and the base function with x."""

from __future__ import annotations

import torch
from torch import Tensor

_FAINT = 1e-9  # of a feature's norm: what is left of it beside the others counts as nothing


def closed_scores(z: Tensor, base: Tensor, y: Tensor, row: Tensor) -> dict[str, Tensor]:
    """R2, (n,), of each closed form for functions y (n, G), centred and of norm 1.

    Args:
        z, base: (inputs, G) nodes and base function there. row: (n,) input of each function.
    """
    powers = _orthonormal(torch.stack([z, z.square(), z**3], 2))
    with_base = _orthonormal(torch.stack([base, z], 2))
    parts = _explained(powers, y, row)
    bases = _explained(with_base, y, row)
    return {
        "const": torch.zeros(len(y), dtype=y.dtype, device=y.device),
        "x": parts[:, 0],
        "x^2": parts[:, :2].sum(1),
        "cubic": parts.sum(1),
        "base": bases[:, 0],
        "base_x": bases.sum(1),
    }


def _orthonormal(features: Tensor) -> Tensor:
    """Columns (inputs, G, k) centred and made orthonormal in their order; 0 where one adds nothing to those before it."""
    found: list[Tensor] = []
    for column in features.unbind(2):
        column = column - column.mean(1, keepdim=True)
        size = column.norm(dim=1, keepdim=True)
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            for other in found:
                column = column - (column * other).sum(1, keepdim=True) * other
        norm = column.norm(dim=1, keepdim=True)
        found.append(torch.where(norm > _FAINT * size, column / norm.clamp(min=1e-300), 0.0))
    return torch.stack(found, 2)


def _explained(basis: Tensor, y: Tensor, row: Tensor) -> Tensor:
    """Squared products of functions (n, G) with their inputs' columns, (n, k)."""
    return torch.stack([(basis[row, :, column] * y).sum(1).square() for column in range(basis.shape[2])], 1)


def power_numbers(degree: int, z: Tensor, y: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """(t, e) in z with which c * (z - t)^degree + e * z + d is the least-squares polynomial of y; e is 0 for a parabola.

    Args:
        z: (inputs, G). y: (n, G), centred. row: (n,) input of each function.
    """
    features = torch.stack([z**power for power in range(degree + 1)], 2)
    size = features.norm(dim=1, keepdim=True).clamp(min=1e-300)  # 0 for an input that is constant
    inverse = torch.linalg.pinv(features / size)  # (inputs, degree + 1, G), once for all functions of an input
    found = [(inverse[row, power] * y).sum(1) / size[row, 0, power] for power in range(degree + 1)]
    leading = torch.where(found[degree].abs() < 1e-12, 1e-12, found[degree])
    t = -found[degree - 1] / (degree * leading)
    return t, torch.zeros_like(t) if degree == 2 else found[1] - 3 * leading * t.square()


def solve(columns: list[Tensor], y: Tensor) -> Tensor:
    """Least-squares factors (n, k) of one or two columns (n, G) for y (n, G), beside a constant; 0 for one that adds nothing to the other."""
    first, *others = [column - column.mean(1, keepdim=True) for column in columns]
    y = y - y.mean(1, keepdim=True)
    size = first.square().sum(1).clamp(min=1e-300)
    if not others:
        return ((first * y).sum(1) / size).unsqueeze(1)
    second = others[0]
    shared = (first * second).sum(1) / size
    rest = second - shared.unsqueeze(1) * first
    left = rest.square().sum(1)
    factor = torch.where(left > _FAINT**2 * second.square().sum(1), (rest * y).sum(1) / left.clamp(min=1e-300), 0.0)
    return torch.stack([(first * y).sum(1) / size - factor * shared, factor], 1)
