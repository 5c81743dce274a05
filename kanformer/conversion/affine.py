"""How much of a block is an affine map: R^2 of the best one, from streamed moments."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion.processes import reduced

_FLOOR = 1e-10  # on the diagonal of the correlations: channels that repeat others stay solvable


class AffineMoments:
    """Float64 moments of pairs (x, y) of rows, in memory that does not grow with their number.

    Attributes:
        gram: (d + 1, d + 1), sum of (1, x)^T (1, x). cross: (d + 1, o), sum of (1, x)^T y. squares: (o,), sum of y^2.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(in_features + 1, in_features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(in_features + 1, out_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(out_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x (tokens, d) and y (tokens, o)."""
        rows, y = torch.nn.functional.pad(x.double(), (1, 0), value=1.0), y.double()
        self.gram.addmm_(rows.t(), rows)
        self.cross.addmm_(rows.t(), y)
        self.squares += y.square().sum(0)

    def all_reduce(self) -> None:
        """Adds the rows of all other processes."""
        self.gram, self.cross, self.squares = (reduced(value) for value in (self.gram, self.cross, self.squares))

    def explained(self) -> tuple[float, float]:
        """(variance of y that the best affine map of x explains, variance of y), summed over the channels of y.

        With fewer rows than channels of x everything is explained: use many times more.
        """
        count = self.gram[0, 0]
        mean_x, mean_y = self.gram[0, 1:] / count, self.cross[0] / count
        covariance = self.gram[1:, 1:] / count - torch.outer(mean_x, mean_x)
        cross = self.cross[1:] / count - torch.outer(mean_x, mean_y)
        total = float((self.squares / count - mean_y.square()).clamp(min=0).sum())
        variance = covariance.diagonal()
        moving = variance > 1e-12 * self.gram.diagonal()[1:] / count  # the rest is rounding around a constant
        scale = variance[moving].sqrt()
        correlation = covariance[moving][:, moving] / torch.outer(scale, scale)
        correlation.diagonal().add_(_FLOOR)
        cross = cross[moving] / scale.unsqueeze(1)
        best = torch.cholesky_solve(cross, torch.linalg.cholesky(correlation))
        return min(max(float((best * cross).sum()), 0.0), total), total
