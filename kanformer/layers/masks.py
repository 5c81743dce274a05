"""Edges that were taken out for good: their weights are zero, and no gradient reaches them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Live(torch.autograd.Function):
    """Identity whose gradient is zero where the mask is; saves nothing but the mask."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.saved_tensors[0], None

    generate_vmap_rule = True


def live(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight, whose gradient is zero where `mask` (broadcast over it) is False. The values there are expected to be zero already.

    Decay leaves zeros where they are and no gradient moves them, so a removed edge stays removed with any optimizer.
    """
    return weight if mask is None or not (torch.is_grad_enabled() and weight.requires_grad) else cast(Tensor, _Live.apply(weight, mask))


class MaskedLinear(nn.Linear):
    """A linear map some of whose edges were taken out.

    State: weight, bias, and `kan_mask` (out, in), bool: which edges are alive.
    """

    kan_mask: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("kan_mask", torch.ones(out_features, in_features, dtype=torch.bool, device=device))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, live(self.weight, self.kan_mask), self.bias)
