"""The two kinds of edges in one form: phi[o, i](x) = sum_m weight[m, o, i] * plane[m](x_i)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kanformer.interpret.curves import apply_base
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear


class Planes:
    """b(x) and the members B[c](x) of a module's functions, elementwise, by input channel.

    Attributes:
        channels: number of input channels. count: 1 + n_basis.
    """

    def __init__(self, module: EdgeFunctions | KANLinear) -> None:
        self.module, self.channels, self.count = module, module.grid_channels, 1 + module.basis.n_basis
        self.repeats = self.channels // module.kan_grid.shape[0]

    @torch.no_grad()
    def __call__(self, x: Tensor, columns: slice) -> list[Tensor]:
        """At x (rows, channels in `columns`), each in its shape, at least float32."""
        module = self.module
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = torch.arange(self.channels, device=x.device)[columns] // self.repeats
        inner = None if module.kan_inner is None else module.kan_inner[groups].to(x.dtype)
        constants = module.basis.constants(module.kan_grid[groups].to(x.dtype), inner)
        return [_base(module.base, x), *module.basis.planes(x, constants)]


class FullEdges:
    """A `KANLinear`: planes b, B[0], ..., weights base_weight and coefficients."""

    def __init__(self, module: KANLinear) -> None:
        self.module, self.planes = module, Planes(module)
        self.inputs, self.outputs, self.count = module.in_features, module.out_features, self.planes.count

    def values(self, x: Tensor, columns: slice) -> list[Tensor]:
        """The planes at x (rows, inputs), those of the inputs in `columns`: `count` tensors (rows, columns)."""
        return self.planes(x[:, columns], columns)

    def weights(self, columns: slice, dtype: torch.dtype) -> Sequence[Tensor]:
        """`count` tensors (outputs, columns)."""
        coef = self.module.kan_coef.detach()[:, :, columns].to(dtype)
        return [self.module.kan_base_weight.detach()[:, columns].to(dtype), *coef.unbind(1)]


class LinearEdges:
    """The down map behind shared functions: one plane, what it reads (the hidden channels), and its weights."""

    count = 1

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.outputs, self.inputs = cast(Tensor, module.weight).shape

    def values(self, x: Tensor, columns: slice) -> list[Tensor]:
        return [x[:, columns].to(torch.promote_types(x.dtype, torch.float32))]

    def weights(self, columns: slice, dtype: torch.dtype) -> Sequence[Tensor]:
        return [cast(Tensor, self.module.weight).detach()[:, columns].to(dtype)]


Edges = FullEdges | LinearEdges


def _base(base: nn.Module, x: Tensor) -> Tensor:
    own = next((value for value in (*base.parameters(), *base.buffers()) if value.is_floating_point()), None)
    if own is not None and own.device != x.device:
        return apply_base(base, x)
    return base(x) if own is None else base(x.to(own.dtype)).to(x.dtype)
