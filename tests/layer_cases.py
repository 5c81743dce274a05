"""One small layer of each kind: a test marked `each_layer` runs on all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kanformer.bases import available
from kanformer.config import KANConfig
from kanformer.layers import EdgeFunctions, KANFeedForward, KANLinear, SharedKANLinear

D, H = 6, 10
BASES = {
    "free knots": {"basis": "bspline", "knots": "free"},
    "linear beyond": {"basis": "bspline", "extrapolation": "linear"},
    **{name: {"basis": name} for name in available() if name != "bspline"},
    "rbf linear beyond": {"basis": "rbf", "extrapolation": "linear"},
    "chebyshev linear beyond": {"basis": "chebyshev", "extrapolation": "linear"},
}


def feed_forward(edges, gated, **options):
    names = [name for name in ("basis", "knots", "extrapolation") if name in options]
    config = KANConfig(edges=edges, grid_size=4, **{name: options.pop(name) for name in names})
    return KANFeedForward(D, H, gated=gated, config=config, **{"activation": "gelu", **options})


LAYERS = {
    "KANLinear": lambda **options: KANLinear(D, 5, **options),
    "KANLinear without bias": lambda **options: KANLinear(D, 5, bias=False, base="identity", grid_size=1, spline_order=1, **options),
    "SharedKANLinear": lambda **options: SharedKANLinear(D, 5, **options),
    "SharedKANLinear in groups": lambda **options: SharedKANLinear(D, 5, groups=2, bias=False, **options),
    "EdgeFunctions": lambda **options: EdgeFunctions(D, **options),
    **{
        f"{edges} {'gated' if gated else 'plain'}": (lambda e, g: lambda **o: feed_forward(e, g, **o))(edges, gated)
        for edges in ("shared", "full", "mlp")
        for gated in (False, True)
    },
    **{f"KANLinear, {name}": (lambda b: lambda **o: KANLinear(D, 5, **b, **o))(basis) for name, basis in BASES.items()},
    **{f"SharedKANLinear, {name}": (lambda b: lambda **o: SharedKANLinear(D, 5, groups=3, **b, **o))(basis) for name, basis in BASES.items()},
    **{
        f"{edges} gated, {name}": (lambda e, b: lambda **o: feed_forward(e, True, **b, **o))(edges, basis)
        for edges in ("shared", "full")
        for name, basis in BASES.items()
    },
}
WITH_GRID = [name for name in LAYERS if not name.startswith("mlp")]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_layer_with_grid = pytest.mark.parametrize("make", [LAYERS[name] for name in WITH_GRID], ids=WITH_GRID)


def trained(module: nn.Module) -> nn.Module:
    """The module with coefficients as training would leave them, not zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("kan_coef", "kan_inner")):
                parameter.normal_()
    return module


def grids(module: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in module.named_buffers() if name.endswith("kan_grid")]
