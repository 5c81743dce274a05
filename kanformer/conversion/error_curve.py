"""What a block's output loses with each hidden channel that goes: the curve of error over width, measured by one elimination down to nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kanformer.conversion.dense import DenseFFN
from kanformer.conversion.prune import damping, elimination_steps
from kanformer.conversion.statistics import FFNStatistics


@dataclass(frozen=True)
class ErrorCurve:
    """Squared error of a block's output over its variance, when the down map is refitted to the channels that are left.

    Attributes:
        widths: ascending, from 0 to the MLP's width.
        errors: at these widths, from 1 down to 0.
        variance: of the output, summed over its channels.
    """

    widths: tuple[int, ...]
    errors: tuple[float, ...]
    variance: float

    def at(self, width: int) -> float:
        """The error at a width, linear between the measured ones."""
        right = next((i for i, known in enumerate(self.widths) if known >= width), len(self.widths) - 1)
        left = max(right - 1, 0)
        span = self.widths[right] - self.widths[left]
        part = (width - self.widths[left]) / span if span else 0.0
        return self.errors[left] + part * (self.errors[right] - self.errors[left])


@torch.no_grad()
def error_curve(dense: DenseFFN, statistics: FFNStatistics, ridge: float = 1e-5) -> ErrorCurve:
    """Eliminates the channels of `dense` in about 64 steps down to none and notes the error at each.

    Each step's error is exact for the channels that are left, with the ridge of the refit; pruning to one width takes smaller steps and ends a little lower.
    """
    covariance, _ = statistics.covariance()
    damped, weight = covariance + damping(covariance, ridge), dense.down_weight.double()
    total = float(((weight @ damped) * weight).sum())
    lost, points = 0.0, [(weight.shape[1], 0.0)]
    for alive, added in elimination_steps(damped, weight, 0):
        lost += float(added)
        points.append((alive.numel(), min(lost / total, 1.0) if total > 0 else 0.0))
    widths, errors = zip(*reversed(points), strict=True)
    return ErrorCurve(widths, errors, total)


def pooled(curves: list[tuple[int, ErrorCurve]]) -> ErrorCurve:
    """The curve of several blocks of one width that are cut alike, weighted by (tokens, curve)."""
    weights = [tokens * curve.variance for tokens, curve in curves]
    total, widths = sum(weights), curves[0][1].widths
    share = [weight / total if total > 0 else 1 / len(weights) for weight in weights]
    errors = tuple(sum(part * curve.errors[i] for part, (_, curve) in zip(share, curves, strict=True)) for i in range(len(widths)))
    return ErrorCurve(widths, errors, total / max(1, sum(tokens for tokens, _ in curves)))
