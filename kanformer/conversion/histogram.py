"""Streaming histograms of channels whose range is not known in advance: equal bins around the bulk, growing tails beyond."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.conversion import processes
from kanformer.conversion.bins import common_bins, redistributed
from kanformer.conversion.moments import Moments
from kanformer.layers.density import Density, data_range

CORE_BINS = 64
TAIL_STEPS = 4  # bins in which the distance from the core doubles
TAIL_BINS = 24 * TAIL_STEPS  # on each side: they reach 2^18 core ranges
PILOT_TOKENS = 256
_PILOT_LIMIT = 4096
_CHUNK_ELEMENTS = 2**20


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
        nodes = torch.where(counts > 0, sums / counts.clamp(min=1e-300), centres)  # merging leaves fractions in bins
        return nodes, counts / counts.sum(1, keepdim=True).clamp(min=1)

    def as_density(self) -> Density:
        """What a grid update needs to know: a node per bin, or four across a bin whose neighbours hold values too, for the values are dense there."""
        nodes, weights = self.density()
        room = torch.minimum(nodes - self.edges[:, :-1], self.edges[:, 1:] - nodes).clamp(min=0)
        filled = torch.nn.functional.pad(weights > 0, (1, 1))
        room = torch.where(filled[:, :-2] & filled[:, 2:], room, 0.0)
        nodes = (nodes.unsqueeze(-1) + room.unsqueeze(-1) * nodes.new_tensor([-0.75, -0.25, 0.25, 0.75])).flatten(1)
        nodes = nodes.cummax(1).values  # merged bins may overlap by a part of their width
        weights = weights.repeat_interleave(4, 1) / 4
        lo, hi = data_range(self.mean, self.variance.sqrt(), self.minimum, self.maximum)
        lo, hi = lo.view(self.groups, -1).amin(1), hi.view(self.groups, -1).amax(1)
        return Density(nodes, weights, lo, hi, self.count, float(self.outside.mean()))

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
        self.first = self.width = torch.zeros(groups, device=lo.device)
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

    def merge(self, other: ChannelRecorder) -> None:
        """Takes in what another recorder of as many channels and groups saw; that one is used up.

        The bins become `common_bins` of both; a bin that two new ones share is divided between them evenly.
        """
        self._settle()
        other._settle()
        firsts, widths = torch.stack([self.first.double(), other.first.double()]), torch.stack([self.width.double(), other.width.double()])
        for recorder in (self, other):
            recorder._rebin(*common_bins(firsts, widths, CORE_BINS))
        self.moments.merge(other.moments)
        for name in ("outside", "counts", "sums"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pilot = None if self.moments.count else []

    def all_reduce(self) -> None:
        """Takes in what the recorders of all other processes saw, the same bits on each, also where nothing came here."""
        if not processes.several():
            return
        self._settle()
        self._rebin(*common_bins(processes.gathered(self.first.double()), processes.gathered(self.width.double()), CORE_BINS))
        self.moments.all_reduce()
        for name in ("outside", "counts", "sums"):
            setattr(self, name, processes.reduced(getattr(self, name).double()))
        self.pilot = None if self.moments.count else []

    def finish(self) -> ChannelStats:
        """The statistics, on the CPU."""
        self._settle()
        moments, shape = self.moments, (self.channels, -1)
        values = (moments.mean, moments.variance, moments.minimum, moments.maximum, self.outside / max(1, moments.count), self._edges())
        return ChannelStats(moments.count, *(value.double().cpu() for value in (*values, self.counts.view(shape), self.sums.view(shape))))

    def _settle(self) -> None:
        if self.pilot:  # however few tokens it has
            self._end_pilot()

    def _rebin(self, first: Tensor, width: Tensor) -> None:
        """Moves what was counted to bins with a core of 64 times `width` (groups,) from `first` on."""
        if torch.equal(first, self.first.double()) and torch.equal(width, self.width.double()):
            return
        old, self.first, self.width = self._edges(), first, width
        if not self.moments.count:
            return
        new, bins = self._edges(), old.shape[1] - 1
        right = torch.searchsorted(old, new).clamp(1, bins)
        left = old.gather(1, right - 1)
        part = ((new - left) / (old.gather(1, right) - left)).clamp(0, 1)
        right, part = (value.repeat_interleave(self.repeats, 0).to(self.counts.device) for value in (right, part))
        self.counts, self.sums = redistributed(self.counts.view(-1, bins), self.sums.view(-1, bins), right, part)

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
