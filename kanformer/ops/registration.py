"""What both operators tell torch of themselves: shapes without data, and how gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.bases import basis_of


def register_gradients(operator: Any, backward: Any, reference: Callable[..., Tensor]) -> None:
    """Joins operator(x, start, coef, grid, inner, spec, training) with backward(grad, x, coef, grid, inner, spec, needs_x, needs_coef).

    Saved for backward are x, coef, grid and inner, nothing of the size of the basis. Where the gradient itself is to be
    differentiated (create_graph), it is taken from the plain `reference`.
    """

    @backward.register_fake
    def _(grad, x, coef, grid, inner, spec, needs_x, needs_coef):
        return (
            torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device),
            torch.empty(coef.shape if needs_coef else (0,), dtype=coef.dtype, device=x.device),
            torch.empty((0,) if inner is None else inner.shape, dtype=(coef if inner is None else inner).dtype, device=x.device),
        )

    def save(ctx, inputs, output) -> None:
        _save(ctx, *inputs[:6])

    def gradients(ctx, grad: Tensor):
        return (*_gradients(ctx, grad, backward, reference), None, None)

    operator.register_autograd(gradients, setup_context=save)


def direct_function(forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor, Tensor]], reference: Callable[..., Tensor]) -> Callable:
    """The same join for plain eager tensors, past torch's operator registry, which takes a quarter of a millisecond each way.

    Returns:
        A function (x, start, coef, grid, inner, spec, training, base); see `edge_functions` for `base`.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, start, coef, grid, inner, spec, training, base: nn.Module | None) -> Tensor:
            _save(ctx, x, start, coef, grid, inner, spec)
            ctx.base = base
            return forward(x, start, coef, grid, inner, spec, training, base)

        @staticmethod
        def backward(ctx, *grads: Tensor):
            def with_base(*arguments):
                return backward(*arguments, base=ctx.base)

            return (*_gradients(ctx, grads[0], with_base, reference, ctx.base), None, None, None)

    def call(*arguments):
        training = arguments[6]
        return Direct.apply(*arguments) if training else forward(*arguments)

    return call


def _save(ctx, x: Tensor, start: Tensor | None, coef: Tensor, grid: Tensor, inner: Tensor | None, spec: str) -> None:
    ctx.save_for_backward(x, coef, grid, *(() if inner is None else (inner,)))
    ctx.spec, ctx.start_dtype = spec, None if start is None else start.dtype


def _gradients(ctx, grad: Tensor, backward: Callable, reference: Callable[..., Tensor], base: nn.Module | None = None) -> tuple[Tensor | None, ...]:
    """For x, start, coef, grid and inner."""
    x, coef, grid, *rest = ctx.saved_tensors
    inner = rest[0] if rest else None
    needs_x, _, needs_coef, _, needs_inner = ctx.needs_input_grad[:5]
    needed = (needs_x, needs_coef, needs_inner)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wanted = [tensor for tensor, need in zip((x, coef, inner), needed, strict=True) if need and tensor is not None]
        value = reference(x, coef, grid, basis_of(ctx.spec), inner, None if base is None else base(x))
        again = iter(torch.autograd.grad([value], wanted, [grad], create_graph=True) if wanted else ())
        found = [next(again) if need else None for need in needed]
    elif any(needed):
        results = backward(grad.contiguous(), x, coef, grid, inner, ctx.spec, needs_x, needs_coef)
        found = [result if need else None for result, need in zip(results, needed, strict=True)]
    else:
        found = [None, None, None]
    grad_start = None if ctx.start_dtype is None else grad.to(ctx.start_dtype)
    return found[0], grad_start, found[1], None, found[2]


def filled(found: tuple[Tensor | None, Tensor | None, Tensor | None], x: Tensor, coef: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the shapes and dtypes of what they belong to; an operator returns empty tensors, not None, for those that nobody needs."""
    grad_x, grad_coef, grad_inner = found
    return (
        x.new_empty(0) if grad_x is None else grad_x.view(x.shape),
        coef.new_empty(0) if grad_coef is None else grad_coef.to(coef.dtype),
        coef.new_empty(0) if grad_inner is None or inner is None else grad_inner.to(inner.dtype),
    )
