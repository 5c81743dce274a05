"""The functions that are fitted, as values at points: one product of the basis with the coefficients per input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.interpret.curves import apply_base
from kanformer.interpret.symbolic.points import Points
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear


@dataclass(frozen=True)
class Chosen:
    """Which functions of a map, sorted by input.

    Attributes:
        input: (n,) input channel, or group with shared edges. output: (n,), -1 with shared edges.
    """

    input: Tensor
    output: Tensor

    def __len__(self) -> int:
        return len(self.input)


def values_at(module: EdgeFunctions | KANLinear, points: Points, chosen: Chosen) -> Tensor:
    """The functions, base part included, at all points of their inputs: (n, points) in float64, on the module's device."""
    device = module.kan_coef.device
    rows, counts = chosen.input.unique_consecutive(return_counts=True)
    x = points.all_x()[rows].to(device)
    grid, inner = module.kan_grid.detach()[rows.to(device)].double(), module.kan_inner
    inner = None if inner is None else inner.detach()[rows.to(device)].double()
    members = module.basis.evaluate(x.t(), grid, inner).transpose(0, 1)  # (rows, points, n_basis)
    base = apply_base(module.base, x)
    if isinstance(module, EdgeFunctions):
        return base + (members @ module.kan_coef.detach()[rows.to(device)].double().unsqueeze(-1)).squeeze(-1)
    found = torch.empty(len(chosen), x.shape[1], dtype=torch.float64, device=device)
    for row, edges in enumerate(torch.arange(len(chosen)).split(counts.tolist())):
        outputs = chosen.output[edges].to(device)
        source = int(rows[row])
        coef, weight = (numbers.detach()[outputs, ..., source].double() for numbers in (module.kan_coef, module.kan_base_weight))
        found[edges.to(device)] = coef @ members[row].t() + weight.unsqueeze(1) * base[row]
    return found
