"""Streaming statistics of channels whose range is not known in advance: moments, and histograms with growing tails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CORE_BINS = 64
TAIL_STEPS = 4  # bins in which the distance from the core doubles
TAIL_BINS = 24 * TAIL_STEPS  # on each side: they reach 2^18 core ranges
PILOT_TOKENS = 256
_PILOT_LIMIT = 4096
_CHUNK_ELEMENTS = 2**20


class Moments:
    """Count, mean, sum of squared deviations, least and greatest value per channel, merged batch by batch in float64.

    Source: Chan, Golub, LeVeque 1979, updating formulae for sample variances.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.channels = 0, channels
        self.mean = self.deviations = torch.zeros(channels, dtype=torch.float64)
        self.minimum = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.maximum = -self.minimum

    def add(self, rows: Tensor) -> None:
        """Takes in rows (tokens, channels), tokens >= 1."""
        rows = rows.double()
        count, mean = rows.shape[0], rows.mean(0)
        deviations = (rows - mean).square_().sum(0)
        least, greatest = rows.aminmax(dim=0)
        if self.count:
            shift = mean - self.mean
            total = self.count + count
            deviations += self.deviations + shift.square() * (self.count * count / total)
            mean = self.mean + shift * (count / total)
            least, greatest = torch.minimum(least, self.minimum), torch.maximum(greatest, self.maximum)
        self.count += count
        self.mean, self.deviations, self.minimum, self.maximum = mean, deviations, least, greatest

    @property
    def variance(self) -> Tensor:
        """Population variance, (channels,)."""
        return self.deviations / max(1, self.count)


@dataclass(frozen=True)
class ChannelStats:
    """What was seen of the inputs of one map. All tensors are float64 on the CPU.

    Attributes:
        count: tokens.
        mean, variance, minimum, maximum: (channels,).
        outside: (channels,) fraction of tokens outside the grid.
        edges: (groups, bins + 1) ascending bin edges; channels of one group share them, so that their counts add.
        counts, sums: (channels, bins) number and sum of the values in each bin. The outermost bins are open-ended.
    """

    count: int
    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    outside: Tensor
    edges: Tensor
    counts: Tensor
    sums: Tensor

    @property
    def channels(self) -> int:
        return self.counts.shape[0]

    @property
    def groups(self) -> int:
        return self.edges.shape[0]

    def density(self) -> tuple[Tensor, Tensor]:
        """(nodes, probabilities), each (groups, bins): the mean value in each bin and the fraction of tokens there, pooled over a group's channels."""
        counts, sums = (value.view(self.groups, -1, value.shape[1]).sum(1) for value in (self.counts, self.sums))
        centres = (self.edges[:, 1:] + self.edges[:, :-1]) / 2
        nodes = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        return nodes, counts / counts.sum(1, keepdim=True).clamp(min=1)

    def quantile(self, fraction: float) -> Tensor:
        """The value below which this fraction of a group's tokens lies, (groups,), linear inside a bin, never beyond what was seen."""
        _, probability = self.density()
        below = probability.cumsum(1)
        index = (below < fraction - 1e-12).sum(1, keepdim=True).clamp(max=probability.shape[1] - 1)
        inside = probability.gather(1, index)
        part = ((fraction - below.gather(1, index) + inside) / inside.clamp(min=1e-300)).clamp(0, 1)
        least, greatest = self.minimum.view(self.groups, -1).amin(1, keepdim=True), self.maximum.view(self.groups, -1).amax(1, keepdim=True)
        left, right = (self.edges.gather(1, index + step).clamp(least, greatest) for step in (0, 1))
        return (left + part * (right - left)).squeeze(1)


class ChannelRecorder:
    """Gathers `ChannelStats` from batches of rows, in memory proportional to the channels.

    The first 256 tokens or more place 64 equal bins around the bulk of each group's values (10 % to 90 % quantile and
    three quarters more on either side); beyond them the width of bins grows with the distance, so that an outlier of any size costs the bulk no
    resolution. Each bin keeps the sum of its values, so that its node is their true mean.

    Args:
        channels, groups: channel i belongs to group i // (channels // groups).
        lo, hi: (groups,) range of the grid.
    """

    def __init__(self, channels: int, groups: int, lo: Tensor, hi: Tensor) -> None:
        self.channels, self.groups, self.repeats = channels, groups, channels // groups
        self.lo, self.hi = lo.repeat_interleave(self.repeats), hi.repeat_interleave(self.repeats)
        self.moments = Moments(channels)
        self.outside = torch.zeros(channels, dtype=torch.float64, device=lo.device)
        self.pilot: list[Tensor] | None = []
        self.first = self.width = torch.zeros(groups)
        bins = channels * (CORE_BINS + 2 * TAIL_BINS)
        self.counts = torch.zeros(bins, dtype=torch.int64, device=lo.device)
        self.sums = torch.zeros(bins, dtype=torch.float64, device=lo.device)

    def add(self, rows: Tensor) -> None:
        """Takes in finite rows (tokens, channels), tokens >= 1."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.moments.add(rows)
        self.outside += ((rows < self.lo) | (rows > self.hi)).sum(0)
        if self.pilot is None:
            self._fill(rows)
        else:
            self.pilot.append(rows.clone())
            if self.moments.count >= PILOT_TOKENS:
                self._end_pilot()

    def finish(self) -> ChannelStats:
        """The statistics, on the CPU."""
        if self.pilot:
            self._end_pilot()
        moments, shape = self.moments, (self.channels, -1)
        values = (moments.mean, moments.variance, moments.minimum, moments.maximum, self.outside / max(1, moments.count), self._edges())
        return ChannelStats(moments.count, *(value.double().cpu() for value in (*values, self.counts.view(shape), self.sums.view(shape))))

    def _end_pilot(self) -> None:
        rows = torch.cat(self.pilot or [])
        self.pilot = None
        sample = rows[:_PILOT_LIMIT].reshape(-1, self.groups, self.repeats).transpose(1, 2).reshape(-1, self.groups).sort(0).values
        last = sample.shape[0] - 1
        low, high = sample[round(0.1 * last)], sample[round(0.9 * last)]
        span = high - low
        span = torch.where(span > 0, span, sample[-1] - sample[0])
        span = torch.maximum(span, 1e-3 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-3))
        self.first, self.width = low - 0.75 * span, 2.5 * span / CORE_BINS
        self._fill(rows)

    def _fill(self, rows: Tensor) -> None:
        step = max(1, _CHUNK_ELEMENTS // self.channels)
        first, width = self.first.repeat_interleave(self.repeats), self.width.repeat_interleave(self.repeats)
        bins = CORE_BINS + 2 * TAIL_BINS
        offset = torch.arange(self.channels, device=rows.device) * bins + TAIL_BINS
        for chunk in rows.split(step):
            place = (chunk - first).div_(width)
            core = place.clamp(0, CORE_BINS)
            beyond = place.sub_(core)
            position = core.add_(beyond.abs().log1p_().mul_(TAIL_STEPS * 1.4426950408889634).copysign_(beyond)).floor_()
            index = position.clamp_(-TAIL_BINS, CORE_BINS + TAIL_BINS - 1).long().add_(offset).view(-1)
            self.counts += torch.bincount(index, minlength=self.counts.numel())
            self.sums += torch.bincount(index, weights=chunk.double().view(-1), minlength=self.sums.numel())

    def _edges(self) -> Tensor:
        tail = 2.0 ** (torch.arange(1, TAIL_BINS + 1, dtype=torch.float64) / TAIL_STEPS) - 1
        steps = torch.cat([-tail.flip(0), torch.arange(CORE_BINS + 1, dtype=torch.float64), CORE_BINS + tail])
        return self.first.double().cpu().unsqueeze(1) + self.width.double().cpu().unsqueeze(1) * steps
