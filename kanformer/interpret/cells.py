"""Small multiples as plain coordinates: every curve of a figure lives in one Axes, in a unit square of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.interpret.curves import pick
from kanformer.interpret.scores import MapScores
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

POINTS = 81
TAILS = 0.001  # the view leaves out this fraction of the data on each side
_LEFT, _RIGHT = 0.05, 0.95
_STRIP_TOP = 0.15


@dataclass(frozen=True)
class Panels:
    """What the cells of one figure show, in the functions' own units.

    Attributes:
        x: (points, n) where the curves are evaluated. learned, start: (points, n) values there.
        grid_lo, grid_hi: (n,) range of the grid.
        strips: n arrays (vertices, 2) of x and density, each scaled to a maximum of 1.
    """

    x: Tensor
    learned: Tensor
    start: Tensor
    grid_lo: Tensor
    grid_hi: Tensor
    strips: list[np.ndarray]


def make_panels(module: EdgeFunctions | KANLinear, seen: ChannelStats, drawn: MapScores) -> Panels:
    """Evaluates the drawn functions over the bulk of their data (0.1 % to 99.9 % quantile, 4 % more on either side)."""
    curves = pick(module, drawn.input, drawn.output if not drawn.shared else None)
    low, high = seen.quantile(TAILS)[drawn.input], seen.quantile(1 - TAILS)[drawn.input]
    margin = torch.maximum(0.04 * (high - low), 1e-3 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-3))
    low, high = low - margin, high + margin
    steps = torch.linspace(0, 1, POINTS, dtype=torch.float64).unsqueeze(1)
    x = (low + (high - low) * steps).to(curves.coef.dtype)
    grid_lo, grid_hi = (bound.detach().double().cpu()[drawn.input] for bound in module.grid_bounds)
    return Panels(x, curves.learned(x), curves.start(x), grid_lo, grid_hi, _strips(seen, drawn.input, low, high))


def _strips(seen: ChannelStats, inputs: Tensor, low: Tensor, high: Tensor) -> list[np.ndarray]:
    """The histograms between low and high as step polygons, (vertices, 2) of x and height in [0, 1]."""
    _, probability = seen.density()
    edges, mass = seen.edges[inputs].numpy(), probability[inputs].numpy()
    strips = []
    for row, (left, right) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        inside = np.flatnonzero((edges[row, 1:] > left) & (edges[row, :-1] < right))
        first, last = inside[0], inside[-1] + 1
        height = mass[row, first:last] / np.diff(edges[row, first : last + 1])
        height /= max(height.max(), 1e-300)
        x = np.repeat(edges[row, first : last + 1].clip(left, right), 2)
        strips.append(np.column_stack([x, np.concatenate([[0], np.repeat(height, 2), [0]])]))
    return strips


@dataclass(frozen=True)
class Layout:
    """Where cell f lies: column f % columns, row f // columns from the top; x to the right, y upwards, one unit per cell."""

    count: int
    columns: int
    titled: bool

    @property
    def rows(self) -> int:
        return -(-self.count // self.columns)

    @property
    def top(self) -> float:
        return 0.80 if self.titled else 0.96

    @property
    def bottom(self) -> float:
        return 0.12 if self.titled else 0.03

    def corner(self) -> np.ndarray:
        """(n, 2) lower left corners."""
        index = np.arange(self.count)
        return np.column_stack([index % self.columns, -1.0 - index // self.columns])

    def across(self, x: np.ndarray, panels: Panels) -> np.ndarray:
        """x (..., n) in the functions' units, as figure coordinates."""
        low, high = panels.x[0].double().numpy(), panels.x[-1].double().numpy()
        return self.corner()[:, 0] + _LEFT + (_RIGHT - _LEFT) * np.clip((x - low) / (high - low), 0, 1)

    def upward(self, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """y (..., n) on the scale low .. high (n,), as figure coordinates above the density strip."""
        floor = self.bottom + _STRIP_TOP + 0.03
        return self.corner()[:, 1] + floor + (self.top - floor) * (y - low) / (high - low)

    def strip(self, panels: Panels) -> list[np.ndarray]:
        """The density polygons in figure coordinates."""
        corner, low, high = self.corner(), panels.x[0].double().numpy(), panels.x[-1].double().numpy()
        polygons = []
        for index, strip in enumerate(panels.strips):
            part = ((strip[:, 0] - low[index]) / (high[index] - low[index])).clip(0, 1)
            x, y = corner[index, 0] + _LEFT + (_RIGHT - _LEFT) * part, corner[index, 1] + self.bottom + _STRIP_TOP * strip[:, 1]
            polygons.append(np.column_stack([x, y]))
        return polygons

    def rectangles(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(n, 4, 2) boxes over the whole height of a cell's drawing, between figure coordinates left and right (n,)."""
        low, high = self.corner()[:, 1] + self.bottom, self.corner()[:, 1] + self.top
        return np.stack([np.column_stack(pair) for pair in ((left, low), (right, low), (right, high), (left, high))], 1)


def y_limits(panels: Panels, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (n,): of every cell by itself, or of all of them together; never of no height."""
    both = torch.cat([panels.learned, panels.start]).double()
    low, high = both.amin(0), both.amax(0)
    if shared:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    flat = torch.maximum(low.abs(), high.abs()).clamp(min=1e-6) * 1e-3
    narrow = high - low < flat
    return torch.where(narrow, low - flat, low).numpy(), torch.where(narrow, high + flat, high).numpy()
