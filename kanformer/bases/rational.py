"""Safe rational functions: a polynomial over a denominator that is at least 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kanformer.bases.base import RangeBasis

_DEGREE, _ORDERS = 5, 4  # of numerator and denominator, as in KAT
_STEPS = 400
_LAWSON_STEPS = 40


class Rational(RangeBasis):
    """P5(x) / (1 + sum_i |b_i| |x|^i), i = 1..4: the members are x^m / Q(x), m = 0..5, and b are the inner numbers.

    Defined for all x; the grid is only the range that figures and reports look at. The sign of b_i = 0 counts as +1,
    so that a denominator of 1 can leave it in training. `grid_size` and `spline_order` change nothing.
    """

    name = "rational"
    source = "Yang and Wang 2024, Kolmogorov-Arnold Transformer, arXiv 2409.10594, section 4.1; Molina et al. 2020, Pade Activation Units, arXiv 1907.06732"
    n_inner = _ORDERS
    unbounded = True

    @property
    def n_basis(self) -> int:
        return _DEGREE + 1

    @property
    def member_flops(self) -> int:
        return 2 * _ORDERS + 1 + _DEGREE

    def initial_inner(self, rows: int) -> Tensor:
        return torch.zeros(rows, _ORDERS)

    def constants(self, grid: Tensor, inner: Tensor | None) -> Tensor:
        return (self.initial_inner(grid.shape[0]).to(grid) if inner is None else inner).t()

    def members(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        found = [1 / self._denominator(x, constants)]
        for _ in range(_DEGREE):
            found.append(found[-1] * x)
        return found

    def slopes(self, x: Tensor, constants: Tensor) -> list[Tensor]:
        """(m x^(m-1) - x^m Q'/Q) / Q, where Q' has the sign of x."""
        reciprocal = 1 / self._denominator(x, constants)
        ratio = self._rise(x, constants) * reciprocal
        found, power = [-ratio * reciprocal], reciprocal
        for m in range(1, _DEGREE + 1):
            found.append(power * (m - x * ratio))
            power = power * x
        return found

    def inner_slopes(self, x: Tensor, constants: Tensor, value: Tensor) -> list[Tensor]:
        """-value |x|^i sign(b_i) / Q."""
        return self._inner_parts(x.abs(), constants, -value / self._denominator(x, constants))

    def _inner_parts(self, size: Tensor, constants: Tensor, part: Tensor) -> list[Tensor]:
        found, signs = [], torch.where(constants < 0, -1.0, 1.0).to(constants.dtype)
        for i in range(_ORDERS):
            part = part * size
            found.append(part * signs[i])
        return found

    # The same sums by Horner's rule, which needs a third of the operations.

    def value(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        return _horner(coef, x) / self._denominator(x, constants)

    def slope(self, x: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> Tensor:
        """(P' - P/Q * Q') / Q."""
        reciprocal = 1 / self._denominator(x, constants)
        return (_horner(_differentiated(coef), x) - _horner(coef, x) * reciprocal * self._rise(x, constants)) * reciprocal

    def pullback(self, x: Tensor, grad: Tensor, coef: Sequence[Tensor] | Tensor, constants: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        reciprocal = 1 / self._denominator(x, constants)
        value, part = _horner(coef, x) * reciprocal, grad * reciprocal
        grad_x = part * (_horner(_differentiated(coef), x) - value * self._rise(x, constants))
        parts = [part]
        for _ in range(_DEGREE):
            parts.append(parts[-1] * x)
        return grad_x, parts, self._inner_parts(x.abs(), constants, -part * value)

    def _rise(self, x: Tensor, constants: Tensor) -> Tensor:
        """Q', which has the sign of x."""
        size, b = x.abs(), constants.abs()
        rising = ((4 * b[3] * size + 3 * b[2]) * size + 2 * b[1]) * size + b[0]
        return torch.where(x < 0, -rising, rising)

    def _denominator(self, x: Tensor, constants: Tensor) -> Tensor:
        size, b = x.abs(), constants.abs()
        return (((b[3] * size + b[2]) * size + b[1]) * size + b[0]) * size + 1

    def fit_inner(self, y: Tensor, x: Tensor, grid: Tensor) -> Tensor:
        """Denominators by Levenberg and Marquardt on a high norm of the error, each row from several starts."""
        rows = [self._fit_row(y[:, row].double().cpu(), x[:, row].double().cpu()) for row in range(y.shape[1])]
        return torch.stack(rows).to(device=y.device, dtype=y.dtype)

    def fit(self, y: Tensor, x: Tensor, grid: Tensor, inner: Tensor | None = None) -> Tensor:
        """Numerators of the smallest largest error, by Lawson's reweighting (1961): a rational function stands for another one over its whole range."""
        members = self.evaluate(x.double(), grid.double(), None if inner is None else inner.double()).transpose(0, 1).cpu()
        wanted = y.double().t().unsqueeze(-1).cpu()
        weight, best, least = torch.ones_like(wanted), torch.zeros(0), torch.full((len(wanted),), torch.inf, dtype=torch.float64)
        for _ in range(_LAWSON_STEPS):
            root = weight.sqrt()
            found = torch.linalg.lstsq(members * root, wanted * root, driver="gelsd").solution
            error = (wanted - members @ found).abs()
            worst = error.amax((1, 2))
            better = worst < least
            best = found if not best.numel() else torch.where(better[:, None, None], found, best)
            least = torch.where(better, worst, least)
            weight = (weight * (error / worst.clamp(min=1e-300)[:, None, None] + 1e-3)).clamp(min=1e-9)
            weight = weight / weight.mean(1, keepdim=True)
        return best.squeeze(-1).to(device=y.device, dtype=y.dtype)

    def _fit_row(self, y: Tensor, x: Tensor) -> Tensor:
        starts = ([0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.5, 0.1, 0.05], [0.01, 0.5, 0.01, 0.05])
        found = [_descend(self, y, x, torch.tensor(start, dtype=torch.float64)) for start in starts]
        return min(found, key=lambda item: item[0])[1]

    def sympy_members(self, x, lo, hi):
        from sympy import Abs, symbols

        b = symbols(f"b1:{_ORDERS + 1}")
        denominator = 1 + sum(Abs(b[i]) * Abs(x) ** (i + 1) for i in range(_ORDERS))
        return [x**m / denominator for m in range(_DEGREE + 1)]


def _horner(factors: Sequence[Tensor] | Tensor, x: Tensor) -> Tensor:
    """The polynomial with these ascending factors, tensors that broadcast with x."""
    value = factors[-1]
    for power in range(len(factors) - 2, -1, -1):
        value = value * x + factors[power]
    return value


def _differentiated(factors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    return [power * factors[power] for power in range(1, len(factors))]


def _descend(basis: Rational, y: Tensor, x: Tensor, b: Tensor) -> tuple[float, Tensor]:
    """(largest error, b) after minimising the high norm over numerator and denominator together."""
    coef = torch.zeros(basis.n_basis, dtype=torch.float64)
    best, damping = (float("inf"), b), 1e-3
    weight = torch.ones_like(y)
    for step in range(_STEPS):
        members = torch.stack(basis.members(x, b), -1)
        root = weight.sqrt()
        coef = torch.linalg.lstsq(members * root.unsqueeze(-1), (y * root).unsqueeze(-1)).solution.squeeze(-1)
        residual = y - members @ coef
        worst = float(residual.abs().max())
        if worst < best[0]:
            best, damping = (worst, b), damping / 3
        else:
            damping = min(damping * 2, 1e3)
        if step % 4 == 3:  # Lawson's weights: towards the smallest maximum
            weight = (weight * (residual.abs() / max(worst, 1e-300) + 1e-3)).clamp(min=1e-9)
            weight = weight / weight.mean()
        jacobian = torch.cat([members, torch.stack(basis.inner_slopes(x, b, members @ coef), -1)], -1) * root.unsqueeze(-1)
        normal = jacobian.t() @ jacobian
        normal = normal + damping * torch.diag(normal.diagonal() + 1e-12)
        step_taken = torch.linalg.solve(normal, jacobian.t() @ (residual * root))[basis.n_basis :]
        b = (b + step_taken).abs()
    return best
