"""Bins that serve several histograms, and what was counted in one set of bins in terms of another."""

from __future__ import annotations

import torch
from torch import Tensor


def common_bins(first: Tensor, width: Tensor, core: int) -> tuple[Tensor, Tensor]:
    """(first, width), each (groups,), of `core` bins that hold those of all recorders (recorders, groups); width 0 stands for one that saw nothing."""
    seen = width > 0
    low = torch.where(seen, first, torch.inf).amin(0)
    high = torch.where(seen, first + core * width, -torch.inf).amax(0)
    some = seen.to(torch.int8).argmax(0, keepdim=True)
    own_first, own_width = (value.gather(0, some).squeeze(0) for value in (first, width))
    alike = (~seen | ((first == own_first) & (width == own_width))).all(0)
    return torch.where(alike, own_first, low), torch.where(alike, own_width, (high - low) / core)


def redistributed(counts: Tensor, sums: Tensor, right: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums of values (channels, bins) on new edges (channels, bins + 1) that lie `part` of the way through old bin `right` - 1.

    The outermost new bins take the rest. Returned flat.
    """
    found = []
    for values in (counts, sums):
        below = torch.nn.functional.pad(values.double().cumsum(1), (1, 0))
        at = below.gather(1, right - 1)
        at = at + part * (below.gather(1, right) - at)
        at[:, 0], at[:, -1] = 0.0, below[:, -1]
        found.append(at.diff(dim=1).reshape(-1))
    empty = found[0] < 1e-9  # rounding, not values: their mean would be anything
    return found[0].masked_fill(empty, 0.0), found[1].masked_fill(empty, 0.0)
