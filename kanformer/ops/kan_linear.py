"""A whole map of full edges, base and learned part in one step that keeps its input only: b(x) is computed again in the backward pass."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.bases import basis_of
from kanformer.bases.base import Basis
from kanformer.ops.full_edges import add_splines, full_edges, spline_gradients
from kanformer.ops.plain import autocast_matrix, needs_gradient, operators_wanted, plain_wanted
from kanformer.ops.reference import reference_full_edges


def kan_linear(
    x: Tensor, base: nn.Module, weight: Tensor, bias: Tensor | None, coef: Tensor, grid: Tensor, basis: Basis, inner: Tensor | None = None
) -> Tensor:
    """bias + weight @ b(x) + sum_i sum_c coef[o, c, i] * B[c](x_i), for x (..., in_features); see `reference_full_edges` for the other shapes.

    A base with parameters of its own, and calls that a compiler or torch.func look into, go through the separate operators.
    """
    if plain_wanted() or operators_wanted(x) or next(base.parameters(), None) is not None:
        return full_edges(x, coef, grid, basis, inner, start=F.linear(base(x), weight, bias))
    coef = autocast_matrix(x, coef)
    if needs_gradient(x, weight, bias, coef, inner):
        return cast(Tensor, _KANLinear.apply(x, weight, bias, coef, grid, inner, base, basis.spec))
    return _map(x, weight, bias, coef, grid, inner, base, basis.spec, training=False)


def _map(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, base: nn.Module, spec: str, training: bool
) -> Tensor:
    start = F.linear(base(x), weight, bias)
    y = start.to(coef.dtype).contiguous()
    add_splines(y, x, coef, grid, inner, spec, training)
    return y.to(start.dtype)


class _KANLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, coef, grid, inner, base, spec) -> Tensor:
        ctx.save_for_backward(x, weight, bias, coef, grid, inner)
        ctx.base, ctx.spec = base, spec
        return _map(x, weight, bias, coef, grid, inner, base, spec, training=True)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            return _plain_gradients(ctx, grads[0])
        x, weight, bias, coef, grid, inner = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_coef, _, needs_inner = ctx.needs_input_grad[:6]
        grad = grads[0].reshape(-1, weight.shape[0])
        leaf = x.detach().requires_grad_(needs_x)
        with torch.enable_grad():
            hidden = ctx.base(leaf)
        grad_weight = None
        grad_x, grad_coef, grad_inner = spline_gradients(grad, x, coef, grid, inner, ctx.spec, needs_x, needs_coef)
        if needs_weight:
            grad_weight = torch.mm(grad.t(), hidden.detach().reshape(-1, weight.shape[1]).to(grad.dtype)).to(weight.dtype)
        if needs_x:
            through = torch.mm(grad, weight.to(grad.dtype)).view(x.shape).to(hidden.dtype)
            grad_x = grad_x + (through if hidden is leaf else torch.autograd.grad(hidden, leaf, through)[0])
        return (
            grad_x if needs_x else None,
            grad_weight,
            grad.sum(0).to(bias.dtype) if needs_bias else None,
            grad_coef if needs_coef else None,
            None,
            grad_inner if needs_inner else None,
            None,
            None,
        )


def _plain_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, coef, grid, inner = ctx.saved_tensors
    leaves = (x, weight, bias, coef, grid, inner)
    y = reference_full_edges(x, coef, grid, basis_of(ctx.spec), inner, start=F.linear(ctx.base(x), weight, bias))
    needed = ctx.needs_input_grad[:6]
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    found = iter(torch.autograd.grad([y], wanted, [grad], create_graph=True))
    return (*(next(found) if need else None for need in needed), None, None)
