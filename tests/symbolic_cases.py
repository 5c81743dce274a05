"""Functions with known formulas, as splines of a map, and the statistics of inputs to fit them on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelRecorder, ChannelStats
from kanformer.layers import EdgeFunctions, KANLinear

# Written here once more, so that a slip in the library's own functions shows.
PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: 0.7 * x,
    "x^2": lambda x: (x - 0.3) ** 2,
    "x^3": lambda x: (x + 0.2) ** 3,
    "abs": lambda x: (x - 0.4).abs(),
    "relu": lambda x: (x + 0.25).clamp(min=0),
    "exp": lambda x: 0.5 * torch.exp(-1.3 * x),
    "log": lambda x: 2 * torch.log(x + 3.2),
    "sqrt": lambda x: torch.sqrt(3.1 - x),
    "1/x": lambda x: 1 / (x + 3.4),
    "tanh": lambda x: -1.5 * torch.tanh(1.6 * (x - 0.3)),
    "sin": lambda x: 0.8 * torch.sin(2.4 * x + 0.5),
    "gauss": lambda x: torch.exp(-((1.3 * (x - 0.2)) ** 2)),
    "softplus": lambda x: torch.log1p(torch.exp(2.5 * (x - 0.1))),
    "silu": lambda x: (1.8 * x + 0.3) / (1 + torch.exp(-1.8 * x - 0.3)),
    "gelu": lambda x: 1.7 * x * 0.5 * (1 + torch.erf(1.7 * x / math.sqrt(2))),
    "erf": lambda x: torch.erf(1.4 * (x + 0.5)),
    "atan": lambda x: torch.arctan(2.5 * x),
    "softsign": lambda x: 3 * x / (1 + (3 * x).abs()),
}
RANGE = (-3.0, 3.0)


def sample(channels: int, scale: float = 1.0, tokens: int = 4096) -> Tensor:
    """(tokens, channels) truncated normals in the grid's range, the same in each run."""
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(tokens, channels, generator=generator, dtype=torch.float64).clamp(-2.9, 2.9) * scale).float()


def seen_by(module: EdgeFunctions | KANLinear, x: Tensor) -> ChannelStats:
    recorder = ChannelRecorder(x.shape[1], module.kan_grid.shape[0], *module.grid_bounds)
    recorder.add(x)
    return recorder.finish()


@torch.no_grad()
def planted_map(functions: list[Callable[[Tensor], Tensor]], amplitude: float = 1.0, scale: float = 1.0, grid_size: int = 200) -> KANLinear:
    """One input, an output per function, as fine splines of amplitude * f(x / scale); the base is silu with weight 0."""
    lo, hi = RANGE[0] * scale, RANGE[1] * scale
    module = KANLinear(1, len(functions), grid_size=grid_size, grid_range=(lo, hi), base="silu", dtype=torch.float64)
    module.kan_base_weight.zero_()
    module.kan_bias.zero_()  # type: ignore[union-attr]
    x = torch.linspace(lo, hi, 2001, dtype=torch.float64).unsqueeze(1)
    members = module.basis.evaluate(x, module.kan_grid.double())[:, 0]
    wanted = torch.stack([amplitude * function(x[:, 0] / scale) for function in functions], 1)
    module.kan_coef.copy_(torch.linalg.lstsq(members, wanted).solution.t().unsqueeze(2))
    return module
