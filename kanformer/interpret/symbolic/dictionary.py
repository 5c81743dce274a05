"""The search for starting points: every family on a grid of (a, t) against all functions of an input, in one product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kanformer.interpret.symbolic.library import Family, valid_ends
from kanformer.layers.formula_functions import formula_function

FINE, COARSE = (24, 33), (10, 13)  # magnitudes of a, places of t
_A_RANGE = (0.1, 12.0)  # in units of 1 / standard deviation of the input
_SIN_SPEEDS, _SIN_PHASES = (12, 28), 8  # slow ones by ratio up to speed 1, the others at equal steps
_FAR = (0.01, 30.0)  # of a pole or the end of a domain from the data, in widths of the data
_NUMBERS = 2**21


def starts(family: Family, nodes: Tensor, low: Tensor, high: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(a, t), each (inputs, K), in units of z.

    Args:
        nodes: (inputs, G). low, high: (inputs,) ends of the data. size: numbers of a and of t, one of `FINE` and `COARSE`.
    """
    speeds, places = size
    width = (high - low).clamp(min=1e-6).unsqueeze(1)
    magnitudes = torch.logspace(math.log10(_A_RANGE[0]), math.log10(_A_RANGE[1]), speeds, dtype=nodes.dtype, device=nodes.device)
    if family.function == "sin":
        return _waves(nodes)
    if family.free == "a":
        return _crossed(_signed(magnitudes, family), nodes.new_zeros(len(nodes), 1))
    one = nodes.new_ones(1)
    if family.pole or (math.isfinite(family.domain[0]) and family.free == "t"):
        far = torch.logspace(math.log10(_FAR[0]), math.log10(_FAR[1]), 2 * speeds, dtype=nodes.dtype, device=nodes.device) * width
        left, right = low.unsqueeze(1) - far, high.unsqueeze(1) + far
        sign = -1.0 if family.mirrored else 1.0
        return torch.cat([torch.ones_like(far), sign * torch.ones_like(far)], 1), torch.cat([left, right], 1)
    half = places // 2
    picked = nodes[:, torch.linspace(0, nodes.shape[1] - 1, half, device=nodes.device).round().long()]
    even = low.unsqueeze(1) + width * torch.linspace(-0.25, 1.25, places - half, dtype=nodes.dtype, device=nodes.device)
    return _crossed(_signed(one if family.free == "t" else magnitudes, family), torch.cat([picked, even], 1))


def _signed(a: Tensor, family: Family) -> Tensor:
    return torch.cat([a, -a]) if family.mirrored else a


def _crossed(a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    rows, places = t.shape
    return a.repeat_interleave(places).expand(rows, -1), t.repeat(1, len(a))


def _waves(nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Speeds at equal steps, and phases over half a period, for the other half is c < 0."""
    slow = torch.logspace(math.log10(0.15), 0, _SIN_SPEEDS[0] + 1, dtype=nodes.dtype, device=nodes.device)[:-1]
    a = torch.cat([slow, torch.linspace(1, 8, _SIN_SPEEDS[1], dtype=nodes.dtype, device=nodes.device)]).repeat_interleave(_SIN_PHASES)
    phase = torch.arange(_SIN_PHASES, dtype=nodes.dtype, device=nodes.device).repeat(sum(_SIN_SPEEDS)) * (math.pi / _SIN_PHASES)
    return a.expand(len(nodes), -1), (phase / a).expand(len(nodes), -1)


def entries(family: Family, nodes: Tensor, low: Tensor, high: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """The family at the nodes, centred and of norm 1: (inputs, K, G); 0 where it is not defined or does not vary."""
    z = a.unsqueeze(2) * (nodes.unsqueeze(1) - t.unsqueeze(2))
    value = formula_function(str(family.function)).value(z)
    value = value - value.mean(2, keepdim=True)
    norm = torch.linalg.vector_norm(value, dim=2)
    good = valid_ends(family, a * (low.unsqueeze(1) - t), a * (high.unsqueeze(1) - t)) & (norm > 1e-6) & norm.isfinite()
    return torch.where(good.unsqueeze(2), value / norm.clamp(min=1e-6).unsqueeze(2), 0.0)


def search(
    family: Family, nodes: Tensor, low: Tensor, high: Tensor, curves: Tensor, edges: list[slice], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The best entry for each function.

    Args:
        nodes: (inputs, G). curves: (n, G), centred and of norm 1. edges: where the functions of each input lie in it.

    Returns:
        (R2, a, t), each (n,).
    """
    found = torch.zeros(len(curves), device=curves.device)
    best = torch.zeros(len(curves), dtype=torch.int64, device=curves.device)
    a, t = starts(family, nodes, low, high, size)
    row_of = torch.arange(len(nodes), device=curves.device).repeat_interleave(torch.tensor([part.stop - part.start for part in edges], device=curves.device))
    step = max(1, _NUMBERS // (a.shape[1] * nodes.shape[1]))
    for rows in torch.arange(len(nodes)).split(step):
        first, last = int(rows[0]), int(rows[-1]) + 1
        table = entries(family, nodes[first:last], low[first:last], high[first:last], a[first:last], t[first:last])
        here = slice(edges[first].start, edges[last - 1].stop)
        if here.stop - here.start == last - first:  # one function per input
            match = torch.bmm(table, curves[here].unsqueeze(2)).squeeze(2).abs_()
            found[here], best[here] = match.max(1)
            continue
        for row in range(first, last):
            match = torch.mm(curves[edges[row]], table[row - first].t()).abs_()
            found[edges[row]], best[edges[row]] = match.max(1)
    return found.square(), a[row_of, best], t[row_of, best]
