"""What the conversion needs to know of the data: streamed, so that memory does not grow with it."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion.affine import AffineMoments
from kanformer.conversion.dense import DenseFFN
from kanformer.conversion.processes import reduced
from kanformer.conversion.sample import RowSample
from kanformer.errors import DataError
from kanformer.layers.density import data_range, fill_constant


class ChannelRange:
    """Count, mean, variance, minimum and maximum of each channel, in float64, and a sample of the rows."""

    def __init__(self) -> None:
        self.count = 0
        self.sample = RowSample()

    def update(self, x: Tensor) -> None:
        """Adds the rows of x (tokens, channels)."""
        if self.count == 0:
            self._start(x.shape[1], x.device)
        self.sample.add(x)
        self.count += x.shape[0]
        self.total += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum(0)
        low, high = torch.aminmax(x, dim=0)
        self.low, self.high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())

    def all_reduce(self, channels: int, device: torch.device) -> None:
        """Adds the rows of all other processes, also where none came here."""
        if self.count == 0:
            self._start(channels, device)
        self.sample.all_reduce(channels, device)
        self.count = int(reduced(torch.tensor(self.count)))
        self.total, self.squares = reduced(self.total), reduced(self.squares)
        self.low, self.high = reduced(self.low, "min"), reduced(self.high, "max")

    def grid_range(self, default: tuple[float, float], sigmas: float = 4.0) -> tuple[Tensor, Tensor]:
        """(lo, hi), each (channels,): mean +- `sigmas` standard deviations, cut to what was seen.

        Where a channel is constant: `default`, moved so that its middle is the value if it does not hold the value.
        """
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp_(min=0).sqrt()
        lo, hi = data_range(mean, deviation, self.low, self.high, sigmas)
        lo, hi = fill_constant(lo, hi, torch.full_like(lo, default[0]), torch.full_like(hi, default[1]))
        return lo.float(), hi.float()

    def _start(self, channels: int, device: torch.device) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = self.total.clone()
        self.low, self.high = self.total + torch.inf, self.total - torch.inf


class FFNStatistics:
    """Streamed statistics of one block: ranges of its three kinds of channel and the Gram matrix of the hidden ones.

    Args:
        name: of the block, for messages.
        gram: whether to keep the (h, h) Gram matrix, which only pruning needs.
        affine: whether to keep the moments that tell how much of the block is an affine map.
    """

    def __init__(self, name: str, gram: bool = True, affine: bool = False) -> None:
        self.name, self.keep_gram, self.keep_affine = name, gram, affine
        self.inputs, self.preactivations, self.hidden = ChannelRange(), ChannelRange(), ChannelRange()
        self.gram: Tensor | None = None
        self.affine: AffineMoments | None = None
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
        self.inputs.update(dense.normed(x))
        self.preactivations.update(preactivation)
        self.hidden.update(hidden)
        if self.keep_gram:
            wide = hidden.double()
            if self.gram is None:
                self.gram = wide.new_zeros(wide.shape[1], wide.shape[1])
            _add_upper_gram(self.gram, wide)
        if self.keep_affine:
            output = torch.nn.functional.linear(hidden, dense.down_weight, dense.down_bias)
            if self.affine is None:
                self.affine = AffineMoments(x.shape[1], output.shape[1], x.device)
            self.affine.update(x, output)

    def linear_share(self) -> float | None:
        """R^2 of the best affine map from the block's input to its output; 1 where the output is constant, None where nothing was gathered."""
        if self.affine is None:
            return None
        explained, total = self.affine.explained()
        return explained / total if total > 0 else 1.0

    def all_reduce(self, dense: DenseFFN) -> None:
        """Makes them the statistics of all processes' data, the same bits on each; `dense` is the block, for its sizes."""
        device, hidden = dense.up_weight.device, dense.hidden_features
        for ranges, channels in ((self.inputs, dense.in_features), (self.preactivations, hidden), (self.hidden, hidden)):
            ranges.all_reduce(channels, device)
        if self.keep_gram:
            self.gram = reduced(torch.zeros(hidden, hidden, dtype=torch.float64, device=device) if self.gram is None else self.gram)
        if self.keep_affine:
            self.affine = self.affine or AffineMoments(dense.in_features, dense.down_weight.shape[0], device)
            self.affine.all_reduce()
        self.eliminated.clear()

    def to(self, device: torch.device) -> FFNStatistics:
        """Moves what was gathered to `device`; returns itself."""
        if self.tokens and self.inputs.total.device != device:
            move(self, device)
            self.eliminated.clear()
        return self

    def covariance(self) -> tuple[Tensor, Tensor]:
        """(covariance (h, h), mean (h,)) of the hidden channels, in float64."""
        if self.gram is None or self.tokens == 0:
            raise DataError("calibrate", subject=self.name, got="no tokens", hint="Pass calibration batches with at least one unmasked token.")
        mean = self.hidden.total / self.tokens
        gram = self.gram.triu() + self.gram.triu(1).t()
        return gram / self.tokens - torch.outer(mean, mean), mean


def move(owner: object, device: torch.device) -> None:
    """Moves the tensors of an object, and of the objects of this package in it, to `device`; a sample's keys stay on the CPU."""
    for name, value in vars(owner).items():
        if isinstance(value, Tensor) and name != "keys":
            setattr(owner, name, value.to(device))
        elif isinstance(value, ChannelRange | RowSample | AffineMoments):
            move(value, device)


def _add_upper_gram(gram: Tensor, x: Tensor, blocks: int = 4) -> None:
    """Adds x^T x (h, h) for x (tokens, h), only what lies on and above the diagonal's blocks: five eighths of the work."""
    width = -(-x.shape[1] // blocks)
    for first in range(0, x.shape[1], width):
        gram[first : first + width, first:].addmm_(x[:, first : first + width].t(), x[:, first:])
