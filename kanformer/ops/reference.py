"""The plain definitions of the maps: what every fast path must compute. Used themselves where a graph is exported or transformed."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import Basis


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the spline argument: float64 stays, everything else is evaluated in float32 (bf16 would misplace x in its cell)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reference_edge_functions(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis, inner: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """start + sum_c coef[g(i), c] * B[c](x_i) for each channel i; channels are split evenly over the groups.

    Args:
        x: (..., channels).
        coef: (groups, n_basis), channels divisible by groups.
        grid: (groups, grid_points). inner: (groups, n_inner) or None.
        start: (..., channels) or None, what the functions are added to.

    Returns:
        (..., channels), in the dtype of x.
    """
    repeats = x.shape[-1] // coef.shape[0]
    dtype = work_dtype(x)
    rows = [None if t is None else t.to(dtype).repeat_interleave(repeats, 0) for t in (coef, grid, inner)]
    assert rows[0] is not None and rows[1] is not None
    total = (basis.evaluate(x.to(dtype), rows[1], rows[2]) * rows[0]).sum(-1)
    return (total if start is None else start.to(dtype) + total).to(x.dtype)


def reference_full_edges(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis, inner: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """start + sum_i sum_c coef[o, c, i] * B[c](x_i) for each output o.

    Args:
        x: (..., in_features).
        coef: (out_features, n_basis, in_features), planar, so that it is the matrix of one GEMM.
        grid: (in_features, grid_points). inner: (in_features, n_inner) or None.
        start: (..., out_features) or None, what the functions are added to.

    Returns:
        (..., out_features), in the dtype of `start` if given, else of x.
    """
    dtype = work_dtype(x)
    members = basis.evaluate(x.to(dtype), grid.to(dtype), None if inner is None else inner.to(dtype))
    total = torch.einsum("...ic,oci->...o", members.to(coef.dtype), coef)
    return total.to(x.dtype) if start is None else (start + total).to(start.dtype)
