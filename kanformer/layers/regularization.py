"""What a training loss may add for functions that are few, sparse and smooth: L1 and entropy of the KAN paper, and a smoothness penalty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear
from kanformer.ops.reference import work_dtype

_PER_INTERVAL = 32  # nodes of the smoothness integral in each of the G intervals
_CHANNELS = 64  # functions' channels whose members live at the same time
_NOTHING = 1e-30  # a smaller sum counts as an all-zero layer: its gradient would overflow


def entropy(magnitudes: Tensor) -> Tensor:
    """S = -sum p log p (nats) with p = magnitudes / their sum: equation 2.19 of arXiv 2404.19756; log(n) for n equal edges.

    Args:
        magnitudes: |phi|_1 of every edge of one layer, any shape, not negative.

    Returns:
        A scalar. Edges that are 0 add nothing, to value and gradient; all of them 0 give 0.
    """
    total = magnitudes.sum()
    share = magnitudes / torch.where(total > _NOTHING, total, 1.0)
    return -(share * torch.where(share > 0, share, 1.0).log()).sum()


def smoothness(module: nn.Module) -> Tensor:
    """The sum over all learned functions in `module` of the integral of (d^2 psi / ds^2)^2, s from 0 to 1 over the function's grid range.

    One definition for every basis, whatever its coefficients mean, from second differences of psi at 32 nodes per grid interval, so that
    kinks and steps count too (where the integral does not exist: by their size). psi is the spline part: of full edges every edge's,
    of shared edges every group's. Scaling an input together with its grid changes nothing; refining a grid no more than the nodes do.

    Source: the roughness penalty of smoothing splines (Green and Silverman 1994), as P-splines (Eilers and Marx 1996) discretise it.

    Returns:
        A scalar, differentiable in coefficients and inner numbers; 0 where nothing is learned.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, KANLinear | EdgeFunctions)]
    total = torch.zeros((), device=layers[0].kan_coef.device if layers else None)
    for layer in layers:
        coef = layer.kan_coef if isinstance(layer, KANLinear) else layer.kan_coef.t().unsqueeze(0)
        total = total + _roughness(layer, coef)
    return total


def _roughness(layer: KANLinear | EdgeFunctions, coef: Tensor) -> Tensor:
    """sum over o, i of coef[o, :, i]^T Q[i] coef[o, :, i] for coef (out, n_basis, in)."""
    alike = layer.kan_inner is None and layer.basis.knots == "uniform"  # but for where their grids lie: one Q serves all
    rows = torch.arange(1 if alike else layer.kan_grid.shape[0], device=coef.device)
    forms = torch.cat([_quadratic_forms(layer, some) for some in rows.split(_CHANNELS)]).expand(coef.shape[2], -1, -1)
    return cast(Tensor, _QuadraticForms.apply(coef, forms))


class _QuadraticForms(torch.autograd.Function):
    """sum over o, i of coef[o, :, i]^T forms[i] coef[o, :, i], some channels at a time in float64: straight functions give 0 by cancellation."""

    @staticmethod
    def forward(ctx, coef: Tensor, forms: Tensor) -> Tensor:
        ctx.save_for_backward(coef, forms)
        total = forms.new_zeros(())
        for vectors, form in _columns(coef, forms):
            total += (torch.bmm(vectors, form) * vectors).sum()
        return total.to(work_dtype(coef))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        coef, forms = ctx.saved_tensors
        twice, of_coef, of_forms = 2 * grads[0].double(), [], []
        for vectors, form in _columns(coef, forms):
            if ctx.needs_input_grad[0]:
                of_coef.append((torch.bmm(vectors, form) * twice).permute(1, 2, 0).to(coef.dtype))
            if ctx.needs_input_grad[1]:
                of_forms.append(torch.bmm(vectors.transpose(1, 2), vectors) * (twice / 2))
        return torch.cat(of_coef, 2) if of_coef else None, torch.cat(of_forms) if of_forms else None


def _columns(coef: Tensor, forms: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """((channels, out, n_basis), (channels, n_basis, n_basis)) in float64, some channels at a time."""
    for part, form in zip(coef.split(_CHANNELS, 2), forms.split(_CHANNELS), strict=True):
        yield part.permute(2, 0, 1).to(torch.float64, memory_format=torch.contiguous_format), form


def _quadratic_forms(layer: KANLinear | EdgeFunctions, rows: Tensor) -> Tensor:
    """Q (rows, n_basis, n_basis) in float64: the integrals of B''[c] B''[d]."""
    grid = layer.kan_grid[rows].double()
    nodes = _PER_INTERVAL * layer.basis.grid_size
    lo, hi = layer.basis.grid_bounds(grid)
    steps = (torch.arange(nodes, dtype=grid.dtype, device=grid.device) + 0.5) / nodes  # inside: some members end with the range
    x = lo + (hi - lo) * steps.unsqueeze(-1)
    members = layer.basis.evaluate(x, grid, None if layer.kan_inner is None else layer.kan_inner[rows].double())
    bends = members.diff(n=2, dim=0).permute(1, 0, 2)
    return bends.transpose(1, 2) @ bends * nodes**3
