"""Where functions are looked at: where the data lie, in their tails, and evenly over the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.errors import DataError
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

NODES = 64
EVEN = 64
_TAILS = (0.001, 0.002, 0.004, 0.996, 0.998, 0.999)
VALID = (0.005, 0.995)
_CONSTANT = 1e-6  # spread over size: below, an input is a constant


@dataclass(frozen=True)
class Points:
    """The inputs of one map, in units of their own: z = (x - centre) / scale. All float64.

    Attributes:
        centre, scale: (inputs,) median and standard deviation of the nodes; scale is 1 for a constant.
        nodes: (inputs, 64) midpoints of intervals that hold equally many tokens: a plain mean over them is a mean over the data.
        tails: (inputs, 6) quantiles 0.1 to 0.4 % and 99.6 to 99.9 %. even: (inputs, 64) over the grid's range. All three in z.
        low, high: (inputs,) the range in which a formula is valid: quantiles 0.5 % and 99.5 %, in x.
        constant: (inputs,) whether the values are all the same.
    """

    centre: Tensor
    scale: Tensor
    nodes: Tensor
    tails: Tensor
    even: Tensor
    low: Tensor
    high: Tensor
    constant: Tensor

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The quantiles 0.1 % and 99.9 %, (inputs,), in z."""
        return self.tails[:, 0], self.tails[:, -1]

    def all_z(self) -> Tensor:
        """Nodes, tails and even points one after the other, (inputs, points)."""
        return torch.cat([self.nodes, self.tails, self.even], 1)

    def all_x(self) -> Tensor:
        """The same in the inputs' own units."""
        return self.centre.unsqueeze(1) + self.scale.unsqueeze(1) * self.all_z()

    def to(self, device: torch.device) -> Points:
        return Points(*(value.to(device) for value in vars(self).values()))


def make_points(module: EdgeFunctions | KANLinear, seen: ChannelStats, where: str) -> Points:
    """The points of a map's inputs (or groups of inputs).

    Raises:
        DataError: one token only, inputs that are all constant, or statistics that are not finite.
    """
    action = "fit formulas"
    if seen.count < 2:
        raise DataError(action, subject=where, got=f"{seen.count} token{'' if seen.count == 1 else 's'}", expected="many", hint="Collect on more data.")
    if not bool(seen.mean.isfinite().all() and seen.sums.isfinite().all()):
        raise DataError(action, subject=where, got="statistics that are not finite", hint="Collect them again.")
    levels = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    quantiles = torch.stack([seen.quantile(float(level)) for level in (*levels, *_TAILS, *VALID, 0.5)], 1)
    nodes, tails, (low, high, centre) = quantiles[:, :NODES], quantiles[:, NODES : NODES + len(_TAILS)], quantiles[:, -3:].t()
    scale = nodes.std(1, correction=0)
    constant = scale <= _CONSTANT * centre.abs().clamp(min=1e-30)
    if bool(constant.all()):
        raise DataError(action, subject=where, got="inputs that are all constant", hint="Collect on data that differ, and look at the layers before it.")
    scale = torch.where(constant, 1.0, scale)
    lo, hi = (bound.detach().double().cpu().unsqueeze(1) for bound in module.grid_bounds)
    even = lo + (hi - lo) * torch.linspace(0, 1, EVEN, dtype=torch.float64)
    nodes, tails, even = ((value - centre.unsqueeze(1)) / scale.unsqueeze(1) for value in (nodes, tails, even))
    return Points(centre, scale, nodes, tails, even, low, high, constant)
