"""What the conversion needs to know of the data: streamed, so that memory does not grow with it."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion.dense import DenseFFN
from kanformer.errors import DataError


class ChannelRange:
    """Count, mean, variance, minimum and maximum of each channel, in float64."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Adds the rows of x (tokens, channels)."""
        if self.count == 0:
            zeros = x.new_zeros(x.shape[1], dtype=torch.float64)
            self.total, self.squares = zeros, zeros.clone()
            self.low, self.high = zeros + float("inf"), zeros - float("inf")
        self.count += x.shape[0]
        self.total += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum(0)
        low, high = torch.aminmax(x, dim=0)
        self.low, self.high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())

    def grid_range(self, default: tuple[float, float], sigmas: float = 4.0) -> tuple[Tensor, Tensor]:
        """(lo, hi), each (channels,): mean +- `sigmas` standard deviations, cut to what was seen; `default` where a channel is constant."""
        mean = self.total / self.count
        spread = (self.squares / self.count - mean.square()).clamp_(min=0).sqrt()
        lo, hi = torch.maximum(self.low, mean - sigmas * spread), torch.minimum(self.high, mean + sigmas * spread)
        constant = hi - lo <= 1e-6 * (1 + mean.abs())
        lo = torch.where(constant, torch.full_like(lo, default[0]), lo)
        hi = torch.where(constant, torch.full_like(hi, default[1]), hi)
        return lo.float(), hi.float()


class FFNStatistics:
    """Streamed statistics of one block: ranges of its three kinds of channel and the Gram matrix of the hidden ones.

    Args:
        name: of the block, for messages.
        gram: whether to keep the (h, h) Gram matrix, which only pruning needs.
    """

    def __init__(self, name: str, gram: bool = True) -> None:
        self.name, self.keep_gram = name, gram
        self.inputs, self.preactivations, self.hidden = ChannelRange(), ChannelRange(), ChannelRange()
        self.gram: Tensor | None = None
        self.eliminated: dict[tuple[int, float], Tensor] = {}  # (width, ridge) -> the channels that a pruning kept; forgotten with new data

    @property
    def tokens(self) -> int:
        return self.inputs.count

    @torch.no_grad()
    def update(self, dense: DenseFFN, x: Tensor) -> None:
        """Adds the inputs x (tokens, d) of the block.

        Raises:
            DataError: x is not finite.
        """
        if x.shape[0] == 0:
            return
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                "calibrate",
                subject=self.name,
                got=f"NaN or infinity in the block's input, after {self.tokens:,} good tokens",
                hint="Look at the model's weights and at the calibration batches.",
            )
        self.eliminated.clear()
        preactivation = dense.preactivation(x)
        hidden = dense.hidden(x, preactivation)
        self.inputs.update(x)
        self.preactivations.update(preactivation)
        self.hidden.update(hidden)
        if self.keep_gram:
            wide = hidden.double()
            if self.gram is None:
                self.gram = wide.new_zeros(wide.shape[1], wide.shape[1])
            _add_upper_gram(self.gram, wide)

    def covariance(self) -> tuple[Tensor, Tensor]:
        """(covariance (h, h), mean (h,)) of the hidden channels, in float64."""
        if self.gram is None or self.tokens == 0:
            raise DataError("calibrate", subject=self.name, got="no tokens", hint="Pass calibration batches with at least one unmasked token.")
        mean = self.hidden.total / self.tokens
        gram = self.gram.triu() + self.gram.triu(1).t()
        return gram / self.tokens - torch.outer(mean, mean), mean


def _add_upper_gram(gram: Tensor, x: Tensor, blocks: int = 4) -> None:
    """Adds x^T x (h, h) for x (tokens, h), only what lies on and above the diagonal's blocks: five eighths of the work."""
    width = -(-x.shape[1] // blocks)
    for first in range(0, x.shape[1], width):
        gram[first : first + width, first:].addmm_(x[:, first : first + width].t(), x[:, first:])
