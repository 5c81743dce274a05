"""The plain definitions of the maps: what every fast path must compute, and the path of bases without a fast one."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.bases.base import Basis


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the spline argument: float64 stays, everything else is evaluated in float32 (bf16 would misplace x in its cell)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reference_edge_functions(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis) -> Tensor:
    """sum_c coef[g(i), c] * B[c](x_i) for each channel i; channels are split evenly over the groups.

    Args:
        x: (..., channels).
        coef: (groups, n_basis), channels divisible by groups.
        grid: (groups, grid_points).

    Returns:
        (..., channels), in the dtype of x.
    """
    repeats = x.shape[-1] // coef.shape[0]
    dtype = work_dtype(x)
    members = basis.evaluate(x.to(dtype), grid.to(dtype).repeat_interleave(repeats, 0))
    return (members * coef.to(dtype).repeat_interleave(repeats, 0)).sum(-1).to(x.dtype)


def reference_full_edges(x: Tensor, coef: Tensor, grid: Tensor, basis: Basis) -> Tensor:
    """sum_i sum_c coef[o, c, i] * B[c](x_i) for each output o.

    Args:
        x: (..., in_features).
        coef: (out_features, n_basis, in_features), planar, so that it is the matrix of one GEMM.
        grid: (in_features, grid_points).

    Returns:
        (..., out_features), in the dtype of x.
    """
    dtype = work_dtype(x)
    members = basis.evaluate(x.to(dtype), grid.to(dtype)).to(coef.dtype)
    return torch.einsum("...ic,oci->...o", members, coef).to(x.dtype)
