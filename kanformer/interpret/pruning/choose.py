"""Which edges stay: by their share of an output's effect, or by how many may stay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.scoring.table import Scores

Masks = dict[tuple[str, str], Tensor]  # (outputs, inputs) bool by block and map: which edges stay


def scored_maps(stats: ModelStats, by: str | None) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """((block, map), score (outputs, inputs)) of every map with edges; a score below 0 (taking the edge out helps) counts as 0.

    Raises:
        ConfigError: no scores, or those of the first edges only.
    """
    found = [one for layer in stats.values() for one in layer.scores.values() if len(one)]
    if not found:
        raise ConfigError("prune", got="statistics without scores of edges", hint="collect(model, batches, scores=('std', 'effect')).")
    for one in found:
        yield (one.path, one.map), _whole(one, by).clamp(min=0)


def negative_scores(stats: ModelStats, by: str | None) -> int:
    """How many edges are worth less than nothing."""
    return sum(int((_whole(one, by) < 0).sum()) for layer in stats.values() for one in layer.scores.values() if len(one))


def masks_by_share(stats: ModelStats, keep: float, by: str | None) -> Masks:
    """Of each output the fewest edges that have `keep` of the sum of its scores; at least one."""
    masks = {}
    for place, score in scored_maps(stats, by):
        ordered, order = score.double().sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered  # what the edges ahead of each one have
        stay = before < keep * ordered.sum(1, keepdim=True) if keep < 1 else torch.ones_like(before, dtype=torch.bool)
        stay[:, 0] = True
        masks[place] = torch.zeros_like(stay).scatter(1, order, stay)
    return masks


def masks_by_sparsity(stats: ModelStats, sparsity: float, by: str | None) -> Masks:
    """Takes out this fraction of all edges, the least of the whole model first, but never an output's last one."""
    maps = dict(scored_maps(stats, by))
    scores = torch.cat([score.double().flatten() for score in maps.values()])
    last = torch.cat([_last(score).flatten() for score in maps.values()])
    count = min(round(sparsity * len(scores)), int((~last).sum()))
    out = torch.zeros(len(scores), dtype=torch.bool)
    out[torch.where(last, torch.inf, scores).argsort(stable=True)[:count]] = True
    parts = out.split([score.numel() for score in maps.values()])
    return {place: ~part.view_as(score) for (place, score), part in zip(maps.items(), parts, strict=True)}


def _last(score: Tensor) -> Tensor:
    """The best edge of each output."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.argmax(1, keepdim=True), True)


def _whole(one: Scores, by: str | None) -> Tensor:
    if one.index is not None:
        raise ConfigError("prune", subject=f"{one.path}, {one.map}", got="scores of the first edges only", hint="Collect without top=.")
    return one.values[one.rank_by(by)].nan_to_num()
