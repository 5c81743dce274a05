"""How much each learned function matters on data, and how nonlinear it is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.conversion.histogram import ChannelStats
from kanformer.errors import ConfigError, DataError
from kanformer.interpret.blocks import find_layer
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.curves import apply_base, plain
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear

_CHUNK_NUMBERS = 2**21  # float64 numbers of the largest buffer: 16 MiB
_FIELDS = ("score", "std", "nonlinearity", "learned", "outside", "input", "output")


@dataclass(frozen=True)
class MapScores:
    """The functions of one map, the most important first.

    With shared edges a function is psi_g with all the edges phi[o, i](x) = W[o, i] * psi_g(i)(x) that use it; with full
    edges every phi[o, i] is a function of its own.

    Attributes:
        path, map, shared: which map, and whether its edges share functions.
        n_functions, edges_per_function: in the whole map.
        total: sum of all scores of the map, ranked or not.
        score: (n,) variance over the data of what the function's edges add to the outputs, means removed.
        std: (n,) standard deviation of the function itself (psi_g or phi[o, i]).
        nonlinearity: (n,) 1 - R^2 of the best straight line under the data's density, in [0, 1]; 0 for a constant.
        learned: (n,) Var(spline part) / (Var(spline part) + Var(base part)), in [0, 1]: how far it moved from its start.
        outside: (n,) fraction of its inputs outside the grid.
        input, output: (n,) group (shared) or input channel, and output channel; output is -1 (all) with shared edges.
        mean_nonlinearity, mean_learned: over all functions of the map, weighted by score.
        mean_outside: over all channels of the map.
    """

    path: str
    map: str
    shared: bool
    n_functions: int
    edges_per_function: int
    total: float
    score: Tensor
    std: Tensor
    nonlinearity: Tensor
    learned: Tensor
    outside: Tensor
    input: Tensor
    output: Tensor
    mean_nonlinearity: float
    mean_learned: float
    mean_outside: float

    def __len__(self) -> int:
        return len(self.score)

    @property
    def share(self) -> Tensor:
        """(n,) fraction of the map's summed edge variance; zeros where nothing varies."""
        return self.score / self.total if self.total > 0 else torch.zeros_like(self.score)

    @property
    def remainder(self) -> float:
        """The share of the functions that are not in here: 1 minus the sum of `share`."""
        return max(0.0, 1.0 - float(self.share.sum())) if self.total > 0 and len(self) < self.n_functions else 0.0

    def head(self, top: int) -> MapScores:
        """The first `top` functions; totals stay those of the map."""
        return replace(self, **{name: getattr(self, name)[:top] for name in _FIELDS})


@torch.no_grad()
def score_layer(model: nn.Module, stats, *, layer: str | int | None = None, top: int | None = None) -> dict[str, MapScores]:
    """Ranks the functions of each map of one block.

    The score of an edge is the variance of what it adds to its output on data. With full edges it is the variance of
    phi[o, i] under the histogram of x_i. With shared edges it factorises: Var(h_i) * sum_o W[o, i]^2, summed over the
    channels of the group, where h_i is what the down map reads: psi(x_i), and psi(gate_i) * up_i in gated blocks, so
    that there the score counts the variation of the up factor too. Correlations between edges are not counted.

    Args:
        model, stats, layer: see `find_layer`.
        top: how many functions to keep per map; None keeps all of them.

    Returns:
        `MapScores` by the map's name; empty for edges="mlp" and for a block that no token reached.

    Raises:
        DataError: statistics of another block, or weights that are not finite.
    """
    if top is not None and top < 1:
        raise ConfigError("rank functions", got=f"top={top}", expected="at least 1, or None for all")
    block, layer_stats = find_layer(model, stats, layer)
    if not layer_stats.tokens:
        return {}
    return {name: _score_map(block, layer_stats, name, module, top) for name, module in block.spline_modules()}


def _score_map(block: KANFeedForward, stats: LayerStats, name: str, module: EdgeFunctions | KANLinear, top: int | None) -> MapScores:
    shared, seen = isinstance(module, EdgeFunctions), stats.maps[name]
    weight = _shared_scores(block, stats, module.groups) if isinstance(module, EdgeFunctions) else None
    best: dict[str, Any] = {}
    total = nonlinear = learned = 0.0
    for chunk in _chunks(module, seen, weight):
        total += float(chunk["score"].sum())
        nonlinear += float((chunk["score"] * chunk["nonlinearity"]).sum())
        learned += float((chunk["score"] * chunk["learned"]).sum())
        best = _best({key: torch.cat([best[key], value]) if best else value for key, value in chunk.items()}, top)
    if not torch.isfinite(torch.tensor([total, nonlinear, learned])).all():
        raise DataError("rank functions", subject=f"{stats.path or 'model'}, {name}", got="weights or coefficients that are not finite numbers")
    edges = block.in_features * (seen.channels // seen.groups) if shared else 1
    count = module.in_features * module.out_features if isinstance(module, KANLinear) else seen.groups
    safe = total if total > 0 else 1.0
    means: dict[str, Any] = {"mean_nonlinearity": nonlinear / safe, "mean_learned": learned / safe, "mean_outside": float(seen.outside.mean())}
    return MapScores(stats.path, name, shared, count, edges, total, **best, **means)


def _shared_scores(block: KANFeedForward, stats: LayerStats, groups: int) -> Tensor:
    assert stats.hidden_variance is not None
    weight = cast(Tensor, block.kan_down.weight).detach()
    return (stats.hidden_variance * plain(torch.linalg.vector_norm(weight.float(), dim=0)).double().square()).view(groups, -1).sum(1)


def _best(values: dict[str, Tensor], top: int | None) -> dict[str, Tensor]:
    score = values["score"]
    order = score.argsort(descending=True, stable=True) if top is None else score.topk(min(top, len(score))).indices
    return {key: value[order] for key, value in values.items()}


def _chunks(module: EdgeFunctions | KANLinear, seen: ChannelStats, weight: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """The statistics of all functions, a few inputs at a time, so that no buffer grows with inputs times outputs."""
    nodes, probability = seen.density()
    outside = seen.outside.view(seen.groups, -1).mean(1)
    outputs = module.out_features if isinstance(module, KANLinear) else 1
    step = max(1, _CHUNK_NUMBERS // (outputs + nodes.shape[1]) // (module.basis.n_basis + 1))
    for rows in torch.arange(seen.groups).split(step):
        covariance, with_x, variance_x = _covariances(module, nodes[rows], probability[rows], rows)
        chunk = _quadratic(_vectors(module, rows), covariance, with_x, variance_x)
        variance = chunk.pop("variance")
        score = variance if weight is None else weight[rows].unsqueeze(1)
        ends = torch.arange(outputs) if weight is None else torch.tensor([-1])
        wide = {"score": score, "std": variance.sqrt(), **chunk, "outside": outside[rows].unsqueeze(1), "input": rows.unsqueeze(1), "output": ends.unsqueeze(0)}
        yield {key: value.expand_as(variance).reshape(-1) for key, value in wide.items()}


def _covariances(module: EdgeFunctions | KANLinear, nodes: Tensor, probability: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (b(x), B[0](x), B[1](x), ...) under the density: (rows, 1+n, 1+n), their covariance with x (rows, 1+n), and Var(x) (rows,)."""
    grid = plain(module.kan_grid).double()[rows]
    members = module.basis.evaluate(nodes.t(), grid).transpose(0, 1)
    features = torch.cat([apply_base(module.base, nodes).unsqueeze(-1), members], -1)
    weights = probability.unsqueeze(-1)
    features = features - (weights * features).sum(1, keepdim=True)
    x = (nodes - (probability * nodes).sum(1, keepdim=True)).unsqueeze(-1)
    weighted = (weights * features).transpose(1, 2)
    return weighted @ features, (weighted @ x).squeeze(-1), (weights * x.square()).sum((1, 2))


def _vectors(module: EdgeFunctions | KANLinear, rows: Tensor) -> Tensor:
    """The factors of (b, B[0], B[1], ...) of every function, (rows, functions per row, 1+n)."""
    where = rows.to(module.kan_coef.device)
    if isinstance(module, EdgeFunctions):
        coef = plain(module.kan_coef[where]).double()
        return torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), coef], 1).unsqueeze(1)
    base, coef = plain(module.kan_base_weight[:, where]), plain(module.kan_coef[:, :, where])
    return torch.cat([base.unsqueeze(1), coef], 1).permute(2, 0, 1).double()


def _quadratic(vectors: Tensor, covariance: Tensor, with_x: Tensor, variance_x: Tensor) -> dict[str, Tensor]:
    """variance, nonlinearity and learned, each (rows, functions per row)."""
    factors = vectors[..., 1:]
    spline = ((factors @ covariance[:, 1:, 1:]) * factors).sum(-1).clamp(min=0)
    base = vectors[..., 0].square() * covariance[:, :1, 0]
    crossed = vectors[..., 0] * (factors @ covariance[:, 1:, :1]).squeeze(-1)
    variance = (base + spline + 2 * crossed).clamp(min=0)
    slope = (vectors @ with_x.unsqueeze(-1)).squeeze(-1)
    explained = slope.square() / variance_x.unsqueeze(1).clamp(min=1e-300)
    floor = 1e-20 * (base + spline) + 1e-300
    nonlinearity = torch.where(variance > floor, 1 - explained / variance.clamp(min=1e-300), 0).clamp(0, 1)
    return {"variance": variance, "nonlinearity": nonlinearity, "learned": spline / (base + spline).clamp(min=1e-300)}
