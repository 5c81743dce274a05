"""Learned functions picked out of a module, evaluated where the caller likes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kanformer.bases.base import Basis
from kanformer.layers import EdgeFunctions
from kanformer.layers.formulas import Formulas
from kanformer.layers.kan_linear import KANLinear
from kanformer.ops import edge_functions


@dataclass(frozen=True)
class Curves:
    """n functions scale[f] * b(x) + sum_c coef[f, c] * B[c](x), on the CPU in float32 or float64.

    Attributes:
        coef: (n, n_basis). grid: (n, grid_points). scale: (n,), 1 for shared edges, the base weight for full ones.
        formulas: those of the module, and which one stands for each function, (n,), -1 for none; or None.
    """

    coef: Tensor
    grid: Tensor
    scale: Tensor
    base: nn.Module
    basis: Basis
    formulas: tuple[Formulas, Tensor] | None = None

    @torch.no_grad()
    def start(self, x: Tensor) -> Tensor:
        """The base part alone at x (points, n): (points, n)."""
        return self.scale * apply_base(self.base, x)

    @torch.no_grad()
    def learned(self, x: Tensor) -> Tensor:
        """The whole functions at x (points, n): (points, n)."""
        y = self.start(x) + edge_functions(x, self.coef, self.grid, self.basis)
        if self.formulas is not None:
            held, which = self.formulas
            for column in (which >= 0).nonzero().flatten().tolist():
                y[:, column] = held.values(int(which[column]), x[:, column].double(), lambda z: apply_base(self.base, z)).to(y)
        return y


def pick(module: EdgeFunctions | KANLinear, inputs: Tensor, outputs: Tensor | None = None) -> Curves:
    """The functions of the groups `inputs` (shared edges), or of the edges from `inputs` to `outputs` (full edges); index tensors (n,)."""
    grid = plain(module.kan_grid)[inputs]
    if isinstance(module, EdgeFunctions):
        held = _formulas(module, inputs.unsqueeze(1))
        return Curves(plain(module.kan_coef)[inputs], grid, torch.ones(len(inputs), dtype=grid.dtype), module.base, module.basis, held)
    assert outputs is not None
    where = module.kan_coef.device
    rows, columns = outputs.to(where), inputs.to(where)
    coef, scale = plain(module.kan_coef[rows, :, columns]), plain(module.kan_base_weight[rows, columns])
    return Curves(coef, grid, scale, module.base, module.basis, _formulas(module, torch.stack([inputs, outputs], 1)))


def _formulas(module: EdgeFunctions | KANLinear, wanted: Tensor) -> tuple[Formulas, Tensor] | None:
    """The formulas that stand for the functions `wanted` (n, width)."""
    held = module.kan_formulas
    if held is None:
        return None
    held = copy.deepcopy(held).to("cpu")
    places = {tuple(index): place for place, index in enumerate(held.kan_index.tolist())}
    return held, torch.tensor([places.get(tuple(index), -1) for index in wanted.cpu().tolist()])


def plain(values: Tensor) -> Tensor:
    """Detached, on the CPU, at least float32."""
    return values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))


@torch.no_grad()
def apply_base(base: nn.Module, x: Tensor) -> Tensor:
    """b(x) elementwise for x on the CPU, wherever the base's own parameters live."""
    own = next((value for value in (*base.parameters(), *base.buffers()) if value.is_floating_point()), None)
    if own is None:
        return base(x)
    return base(x.to(own.device, own.dtype)).to(x.device, x.dtype)
