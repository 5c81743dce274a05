"""The linear map of the base functions, which keeps its input only: b(x) is computed again in the backward pass."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.ops.plain import plain_wanted


def base_linear(x: Tensor, base: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ b(x) + bias, for x (..., in_features) and weight (out_features, in_features).

    A base with parameters of its own, or one that a compiler traces anyway, goes the ordinary way.
    """
    if isinstance(base, nn.Identity) or torch.compiler.is_compiling() or plain_wanted() or next(base.parameters(), None) is not None:
        return F.linear(base(x), weight, bias)
    return cast(Tensor, _BaseLinear.apply(x, weight, bias, base))


class _BaseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, base: nn.Module) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.base, ctx.biased = base, bias is not None
        return F.linear(base(x), weight, bias)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        grad, dtype, again = grads[0], grads[0].dtype, torch.is_grad_enabled()  # again: the gradient itself will be differentiated
        leaf = x if again else x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            hidden = ctx.base(leaf)
        rows, values = grad.reshape(-1, weight.shape[0]), hidden.reshape(-1, weight.shape[1]).to(dtype)
        grad_weight = torch.mm(rows.t(), values if again else values.detach()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            (grad_x,) = torch.autograd.grad(hidden, leaf, torch.matmul(grad, weight.to(dtype)).to(hidden.dtype), create_graph=again)
        return grad_x, grad_weight, grad_bias, None
