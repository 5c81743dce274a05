"""Where the values lie that reach each learned function, and the grid range that this asks for."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.errors import DataError, ShapeError

OUTSIDE_LIMIT = 0.05


@dataclass(frozen=True)
class Density:
    """The values that reach each of `rows` functions, as weighted nodes. All tensors are float64 on the CPU.

    Attributes:
        nodes: (rows, points), ascending.
        weights: (rows, points) fraction of the values at each node; a row sums to 1.
        lo, hi: (rows,) the range that holds the bulk of the values: of each channel the mean +- 4 standard deviations cut
            to what was seen, and the union over the channels that share a function.
        tokens: number of tokens seen.
        outside: fraction of the values outside the grids as they are, where it was counted; None means: count it on the nodes.
    """

    nodes: Tensor
    weights: Tensor
    lo: Tensor
    hi: Tensor
    tokens: int
    outside: float | None = None

    @classmethod
    def of_samples(cls, samples: Tensor, rows: int) -> Density:
        """From samples (..., channels), channel i belonging to row i // (channels // rows).

        Raises:
            ShapeError: channels that do not make these rows, or no floating point. DataError: no sample, or one that is not finite.
        """
        if not samples.is_floating_point() or samples.dim() == 0 or samples.shape[-1] == 0 or samples.shape[-1] % rows:
            raise ShapeError("update a grid", got=f"samples {tuple(samples.shape)} of {samples.dtype}", expected=f"floating point (..., a multiple of {rows})")
        values = samples.detach().reshape(-1, samples.shape[-1]).double().cpu()
        if values.shape[0] == 0 or not bool(values.isfinite().all()):
            raise DataError(
                "update a grid", got=f"samples {tuple(samples.shape)}, not all finite" if values.numel() else "no samples", expected="finite samples"
            )
        lo, hi = data_range(values.mean(0), values.std(0, correction=0), *values.aminmax(dim=0))
        lo, hi = lo.view(rows, -1).amin(1), hi.view(rows, -1).amax(1)
        nodes = values.view(values.shape[0], rows, -1).permute(1, 0, 2).reshape(rows, -1).sort(1).values
        return cls(nodes, torch.full_like(nodes, 1 / nodes.shape[1]), lo, hi, values.shape[0])

    def share_outside(self, lo: Tensor, hi: Tensor) -> float:
        """Fraction of the values outside the ranges [lo, hi], each (rows,), over all rows."""
        beyond = (self.nodes < lo.unsqueeze(1)) | (self.nodes > hi.unsqueeze(1))
        return float((self.weights * beyond).sum(1).mean())

    def thinned(self, limit: int = 2048) -> Density:
        """With at most `limit` nodes a row: of plain samples evenly spaced order statistics, of a histogram the bins as they are."""
        points = self.nodes.shape[1]
        if points <= limit:
            return self
        chosen = torch.linspace(0, points - 1, limit, dtype=torch.float64).round().long()
        nodes = self.nodes[:, chosen]
        return Density(nodes, torch.full_like(nodes, 1 / limit), self.lo, self.hi, self.tokens, self.outside)

    def inside(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The weights with those outside [lo, hi] set to 0, scaled back to a sum of 1 per row (0 where all lie outside)."""
        kept = self.weights * ((self.nodes >= lo.unsqueeze(1)) & (self.nodes <= hi.unsqueeze(1)))
        return kept / kept.sum(1, keepdim=True).clamp(min=1e-300)

    def quantiles(self, levels: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """The values inside [lo, hi] below which these fractions of them lie, (rows, levels), linear between nodes."""
        last = self.nodes.shape[1] - 1
        if last == 0:
            return self.nodes.expand(-1, len(levels))
        weights = self.inside(lo, hi)
        below = weights.cumsum(1) - weights / 2
        right = torch.searchsorted(below, levels.expand(below.shape[0], -1).contiguous()).clamp(1, last)
        (low, high), (left_node, right_node) = ([value.gather(1, right - 1), value.gather(1, right)] for value in (below, self.nodes))
        part = ((levels - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        found = left_node + part * (right_node - left_node)
        return torch.minimum(torch.maximum(found, lo.unsqueeze(1)), hi.unsqueeze(1))


def data_range(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor, sigmas: float = 4.0) -> tuple[Tensor, Tensor]:
    """The range that holds the bulk of the values, so that one outlier does not take the whole grid: mean +- sigmas * deviation, cut to [low, high]."""
    return torch.maximum(low, mean - sigmas * deviation), torch.minimum(high, mean + sigmas * deviation)


def too_narrow(lo: Tensor, hi: Tensor, cells: int = 1) -> Tensor:
    """Where a range is too small for a grid of `cells` cells in float32: the values count as constant."""
    return hi - lo <= 1e-6 * (1 + cells * (lo + hi).abs() / 2)


def fill_constant(lo: Tensor, hi: Tensor, default_lo: Tensor, default_hi: Tensor, cells: int = 1) -> tuple[Tensor, Tensor]:
    """Ranges that carry a grid of `cells` cells in float32: where the values do not differ enough, the default range if it holds them, else moved onto them.

    Args:
        lo, hi, default_lo, default_hi: (rows,) in float64.
    """
    middle = (lo + hi) / 2
    narrow = too_narrow(lo, hi, cells)
    held = (default_lo <= middle) & (middle <= default_hi)
    half = torch.maximum((default_hi - default_lo) / 2, 1e-3 * middle.abs())
    new_lo, new_hi = torch.where(held, default_lo, middle - half), torch.where(held, default_hi, middle + half)
    return torch.where(narrow, new_lo, lo), torch.where(narrow, new_hi, hi)


def warn_outside(name: str, fraction: float | None) -> None:
    """Warns the caller of kanformer where more than 5 % of a layer's values lie outside its grid, where splines are 0 or straight."""
    if fraction is None or fraction <= OUTSIDE_LIMIT:
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("kanformer."):
        level, frame = level + 1, frame.f_back
    text = f"{name}: {fraction:.1%} of the values lie outside its grid (more than {OUTSIDE_LIMIT:.0%}), where the learned functions do little"
    warnings.warn(f"{text}. Call kanformer.update_grids(model, batches), or patch with calibration=batches or a wider grid_range.", stacklevel=level)
