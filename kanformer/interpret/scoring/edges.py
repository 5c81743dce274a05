"""Every score of every edge, from statistics per input and per output and a few sums per edge.

Full edges phi[o, i](x_i) = v . f(x_i) with f = (b, B[0], ...): with m = E f, C = Cov f, c = Cov(f, x) under the data, all exact,

    std^2 = v^T C v,    1 - R^2 of {1, x} = 1 - (v . c)^2 / (std^2 Var x),

and of {1, x, b} with one more regressor. Shared edges are phi[o, i] = W[o, i] h_i, where h_i is what the down map reads: psi(x_i), or in gated blocks
psi(gate_i) * up_i, so that std = |W| std(h_i), and so on; what a factor cannot change (nonlinearity, nonbase) is psi's on the channel's own data.
In a gated block this is still psi's, though the edge varies with the up factor too, and `delta` measures (psi - b) against its own output only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.interpret.collecting.edge_sums import EdgeSums, FunctionSums
from kanformer.interpret.collecting.sources import Planes
from kanformer.interpret.collecting.stats import HiddenStats, OutputStats
from kanformer.interpret.scoring.table import Scores
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear
from kanformer.ops.spread import whole

SCORES = ("std", "l1", "range", "share", "sens", "effect1", "effect", "nonlinearity", "nonbase", "delta")
DESCRIPTIONS = {
    "std": "standard deviation of the edge's contribution over the data",
    "l1": "mean absolute value, on histogram nodes for full edges",
    "range": "largest minus smallest value seen, on histogram nodes for full edges",
    "share": "Cov(edge, output) / Var(output): sums to 1 over an output's edges; negative: it cancels others",
    "sens": "std times the root mean square of the loss gradient at the output",
    "effect1": "first-order change of the loss when the edge is held at its mean",
    "effect": "effect1 plus half the Gauss-Newton curvature along that change",
    "nonlinearity": "1 - R^2 of the best straight line under the data, 0 for a constant",
    "nonbase": "1 - R^2 of the best combination of 1, x and the base function",
    "delta": "root mean square of the learned part (what it is away from its start, the base part), over the output's standard deviation",
}
MOMENTS, BACKWARD, PROBE = {"std", "sens", "nonlinearity", "nonbase", "delta"}, {"sens", "effect1", "effect"}, {"effect"}
_CHUNK_NUMBERS = 2**21
_TINY = 1e-300


def full_scores(
    path: str, name: str, module: KANLinear, wanted: list[str], seen: ChannelStats, moments: Tensor, output: OutputStats, sums: EdgeSums, scored: float
) -> Scores:
    """Of all edges of a `KANLinear`, (out, in) each. `scored`: number of predictions or tokens that the summed loss is divided by."""
    dtype = torch.promote_types(module.kan_coef.dtype, torch.float32)
    values = {score: torch.empty(module.out_features, module.in_features, dtype=dtype) for score in wanted if score not in ("share", "effect1", "effect")}
    closed = MOMENTS & set(values)
    for columns in _chunks(module.in_features, module.out_features * (module.basis.n_basis + 1)):
        vectors = _vectors(module, columns)
        if closed:
            _fill(values, columns, _by_moments(vectors, moments[columns], output))
    if {"l1", "range"} & set(values):
        planes, (nodes, probability) = Planes(module), seen.density()
        for columns in _chunks(module.in_features, module.out_features * nodes.shape[1]):
            _fill(values, columns, _by_nodes(_vectors(module, columns), planes, columns, nodes[columns], probability[columns], seen))
    return Scores(path, name, "edge", {**_ordered(wanted, values, sums, scored)}, total=module.out_features * module.in_features)


def shared_scores(
    path: str, weight: Tensor, wanted: list[str], hidden: HiddenStats, channel: dict[str, Tensor], output: OutputStats, sums: EdgeSums, scored: float
) -> Scores:
    """Of all edges W[o, i] h_i of a down map behind shared functions, (out, hidden) each; `channel`: `channel_scores` of psi."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = whole(weight.detach()).double().cpu().abs()
    deviation, gap = hidden.variance.sqrt(), hidden.maximum - hidden.minimum
    found = {"std": size * deviation, "l1": size * hidden.absolute, "range": size * gap}
    if "sens" in wanted:
        assert output.gradient_rms is not None
        found["sens"] = found["std"] * output.gradient_rms.unsqueeze(1)
    if "delta" in wanted:
        found["delta"] = size * channel["delta"] / output.variance.sqrt().clamp(min=_TINY).unsqueeze(1)
    for score in {"nonlinearity", "nonbase"} & set(wanted):
        found[score] = torch.where(size > 0, channel[score].expand_as(size), 0)
    values = {score: value.to(dtype) for score, value in found.items() if score in wanted}
    return Scores(path, "kan_down", "edge", _ordered(wanted, values, sums, scored), total=weight.numel())


def function_scores(
    path: str,
    module: EdgeFunctions,
    wanted: list[str],
    moments: Tensor,
    hidden: HiddenStats,
    edges: Scores,
    sums: EdgeSums,
    functions: FunctionSums | None,
    scored: float,
) -> Scores:
    """Of whole shared functions psi_g, (groups,) each: all edges that use it, in all outputs, are held at their means at once.

    std, nonlinearity, nonbase: of psi_g itself on the pooled data of its channels. l1, range: the summed size of its edges. share: its covariance
    with the outputs over the outputs' summed variance, so that all functions add to 1. sens: sum over its channels of std(h_i) times the root mean
    square of the gradient by h_i. effect1: sum over its edges (exact: first order adds). effect: effect1 and half the curvature along the joint
    change, interactions between its edges included. delta: root mean square of psi_g - b over the standard deviation of psi_g.
    """
    groups = module.groups
    pooled = moments.view(groups, -1, *moments.shape[1:]).mean(1)
    own = channel_scores(module, pooled, torch.arange(groups))
    found = {score: own[score] for score in ("std", "nonlinearity", "nonbase")}
    found["delta"] = own["delta"] / own["std"].clamp(min=_TINY)

    def by_group(values: Tensor) -> Tensor:
        return values.double().view(groups, -1).sum(1)

    for score in {"l1", "range", "effect1"} & set(edges.values):
        found[score] = by_group(edges.values[score].double().sum(0))
    if sums.covariance is not None:
        covariance = sums.covariance.double().cpu().sum(0)
        found["share"] = by_group(covariance) / (float(covariance.sum()) or 1.0)
    if functions is not None:
        scale = hidden.variance.sqrt() * (functions.gradients / max(1, sums.rows)).sqrt()
        found["sens"] = by_group(scale)
        if "effect" in wanted and sums.slope is not None:
            first = -by_group(sums.slope.double().cpu().sum(0)) / scored
            found["effect"] = first + functions.curvature / (2 * scored)
    dtype = next(iter(edges.values.values())).dtype
    return Scores(path, "kan_functions", "function", {score: found[score].to(dtype) for score in wanted}, module.channels // groups, total=groups)


def channel_scores(module: EdgeFunctions, moments: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """std, nonlinearity, nonbase and (not over anything) delta of psi on data with these moments, (n,) each; `groups` (n,) says which function."""
    coef = whole(module.kan_coef.detach()).double().cpu()[groups]
    vectors = torch.cat([torch.ones(len(groups), 1, dtype=torch.float64), coef], 1).unsqueeze(1)
    one = torch.ones(1, dtype=torch.float64)
    found = _by_moments(vectors, moments, OutputStats(0, one, one, one))
    return {score: found[score].squeeze(1) for score in ("std", "nonlinearity", "nonbase", "delta")}


def _ordered(wanted: list[str], values: dict[str, Tensor], sums: EdgeSums, scored: float) -> dict[str, Tensor]:
    """All scores in the order asked for, those from the sums per edge among them."""
    found: dict[str, Tensor] = {}
    for score in wanted:
        if score in values:
            found[score] = values[score]
        elif score == "share" and sums.covariance is not None:
            whole = sums.covariance.sum(1, keepdim=True, dtype=torch.float64)
            found[score] = (sums.covariance / torch.where(whole > 0, whole, torch.inf).to(sums.covariance.dtype)).cpu()
        elif sums.slope is not None:
            found[score] = 0 - sums.slope.cpu() / scored  # not -0 where the loss is flat
            if score == "effect" and sums.curvature is not None:
                found[score] += sums.curvature.cpu() / (2 * scored)
    return found


def _chunks(inputs: int, numbers_each: int) -> Iterator[slice]:
    step = max(1, _CHUNK_NUMBERS // numbers_each)
    return (slice(first, min(first + step, inputs)) for first in range(0, inputs, step))


def _vectors(module: KANLinear, columns: slice) -> Tensor:
    """The factors of (b, B[0], ...) of all edges from these inputs, (inputs, out, 1 + n_basis) in float64 on the CPU."""
    base, coef = whole(module.kan_base_weight.detach())[:, columns], whole(module.kan_coef.detach())[:, :, columns]
    return torch.cat([base.unsqueeze(1), coef], 1).double().cpu().permute(2, 0, 1)


def _fill(values: dict[str, Tensor], columns: slice, found: dict[str, Tensor]) -> None:
    for score in values:
        if score in found:
            values[score][:, columns] = found[score].t()


def _by_moments(vectors: Tensor, moments: Tensor, output: OutputStats) -> dict[str, Tensor]:
    """Scores (inputs, out) from vectors (inputs, out, 1 + n) and E u u^T (inputs, n + 3, n + 3)."""
    mean = moments[:, 0]
    centred = moments - mean.unsqueeze(2) * mean.unsqueeze(1)
    size = (vectors @ moments[:, 2:, 2:] * vectors).sum(-1)
    variance = ((vectors @ centred[:, 2:, 2:]) * vectors).sum(-1)
    moves = variance > 1e-13 * size + _TINY  # the rest is rounding around a constant
    variance = torch.where(moves, variance, 0)
    with_x, with_base = ((vectors @ centred[:, 2:, index, None]).squeeze(-1) for index in (1, 2))
    spread_x, both, spread_base = (centred[:, row, column, None] for row, column in ((1, 1), (1, 2), (2, 2)))
    safe_x = torch.where(spread_x > 1e-13 * moments[:, 1, 1, None] + _TINY, spread_x, torch.inf)
    line = with_x.square() / safe_x
    rest = spread_base - both.square() / safe_x
    rest = torch.where(rest > 1e-9 * spread_base + _TINY, rest, torch.inf)
    more = (with_base - with_x * both / safe_x).square() / rest
    spline = vectors[..., 1:]
    learned = (spline @ moments[:, 3:, 3:] * spline).sum(-1).clamp(min=0).sqrt()
    found = {"std": variance.sqrt(), "delta": learned / output.variance.sqrt().clamp(min=_TINY)}
    for score, explained in (("nonlinearity", line), ("nonbase", line + more)):
        found[score] = torch.where(moves, 1 - explained / variance.clamp(min=_TINY), 0).clamp(0, 1)
    if output.gradient_rms is not None:
        found["sens"] = found["std"] * output.gradient_rms
    return found


def _by_nodes(vectors: Tensor, planes: Planes, columns: slice, nodes: Tensor, probability: Tensor, seen: ChannelStats) -> dict[str, Tensor]:
    """l1 and range (inputs, out) on nodes and probabilities (inputs, bins), and for the range at the ends of the data."""
    used = probability.sum(0) > 0
    nodes, probability = nodes[:, used], probability[:, used]
    filled = torch.where(probability > 0, nodes, seen.mean[columns].unsqueeze(1))
    x = torch.cat([filled, seen.minimum[columns].unsqueeze(1), seen.maximum[columns].unsqueeze(1)], 1)
    members = torch.stack(planes(x.t().to(planes.module.kan_grid.device), columns), 1).double().cpu().permute(2, 0, 1)
    curves = members @ vectors.transpose(1, 2)
    absolute = (probability.unsqueeze(1) @ curves[:, :-2].abs()).squeeze(1)
    return {"l1": absolute, "range": cast(Tensor, curves.amax(1) - curves.amin(1))}
