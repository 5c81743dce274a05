"""Random starting weights that keep the variance of what passes through, layer after layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kanformer.layers.base_functions import base_values, normal_quantiles, second_moment

_FEW = 16  # inputs below which rows that sum to zero would be too much alike
_ORTHOGONAL = 1024  # widths up to which rows are made orthogonal: above, random rows nearly are, and a QR would take seconds


@torch.no_grad()
def preserve_variance_(weight: Tensor, base: nn.Module, variance: float = 1.0) -> None:
    """Fills weight (out, in) so that every output of weight @ b(x) has mean 0 and this variance for unit-normal x.

    What makes a stack of maps drift is not the mean over many networks but the deviation of one: it is amplified from map to map.
    So each row has its exact norm, the rows are orthogonal to each other, and they sum to zero, because b(x) has a mean.
    In a stack the inputs are sums, not quite normal; the variance of b is corrected for their kurtosis, to first order in 1 / in.

    Source: orthogonal rows, Saxe et al. 2013, arXiv 1312.6120; the kurtosis by the Gram-Charlier series (Cramer 1946, chapter 17).
    """
    if weight.is_meta:
        return
    outputs, inputs = weight.shape
    if inputs < _FEW:
        bound = math.sqrt(3.0 * variance / (inputs * second_moment(base)))
        nn.init.uniform_(weight, -bound, bound)
        return
    rows = torch.empty(outputs, inputs, device=weight.device)
    if max(outputs, inputs) <= _ORTHOGONAL:
        nn.init.orthogonal_(rows)
    else:
        nn.init.normal_(rows)
    rows -= rows.mean(1, keepdim=True)
    weight.copy_(rows * (math.sqrt(variance / _output_variance(base, inputs)) / rows.norm(dim=1, keepdim=True)))


def _output_variance(base: nn.Module, inputs: int) -> float:
    """Var[b(z)] for z that is a sum of `inputs` independent b(normal), scaled to variance 1."""
    z = normal_quantiles()
    value = base_values(base, z)
    squares = (value - value.mean()).square()
    variance = max(float(squares.mean()), 1e-6)
    kurtosis = 3 / inputs * (float(squares.square().mean()) / variance**2 - 3)
    fourth = z.pow(4) - 6 * z.square() + 3
    return variance + kurtosis / 24 * float((fourth * squares).mean())
