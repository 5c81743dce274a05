"""Hidden channels that do not matter leave the matrices: what is left is a smaller block of the same kind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.stats import LayerStats, ModelStats
from kanformer.interpret.pruning.choose import Masks, scored_maps
from kanformer.interpret.pruning.edges import removed_means
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear
from kanformer.layers.masks import MaskedLinear
from kanformer.surgery.modules import find_path, join
from kanformer.surgery.record import PatchRecord, find_records, set_record
from kanformer.surgery.snapped import give_bias

Channels = dict[str, Tensor]  # (hidden,) bool by block: which channels stay


def units_of(model: nn.Module, stats: ModelStats, by: str | None) -> dict[str, Tensor]:
    """(units,) scores by block. A unit is a group of channels that share a function, or a channel: what goes goes together.

    Where functions were scored as a whole, that is a group's score; else the sum over its channels' edges in the down map.
    """
    blocks, edges = find_blocks(model), {place: score for place, score in scored_maps(stats, by) if place[1] == "kan_down"}
    found = {}
    for path, layer in stats.items():
        if (path, "kan_down") not in edges:
            continue
        known = layer.functions.get("kan_functions")
        if known is not None and (by or known.rank_by()) in known.values:
            found[path] = known.values[known.rank_by(by)].double().nan_to_num().clamp(min=0)
        else:
            found[path] = edges[path, "kan_down"].double().sum(0).view(_units(blocks[path]), -1).sum(1)
    return found


def channels_by_share(model: nn.Module, stats: ModelStats, keep: float, by: str | None) -> Channels:
    """Of each block the fewest units that have `keep` of the sum of their scores; at least one."""
    blocks, found = find_blocks(model), {}
    for path, score in units_of(model, stats, by).items():
        ordered, order = score.sort(descending=True, stable=True)
        stay = ordered.cumsum(0) - ordered < keep * ordered.sum() if keep < 1 else torch.ones_like(ordered, dtype=torch.bool)
        stay[0] = True
        found[path] = _expanded(blocks[path], torch.zeros_like(stay).scatter(0, order, stay))
    return found


def channels_by_sparsity(model: nn.Module, stats: ModelStats, sparsity: float, by: str | None) -> Channels:
    """Takes out this fraction of all units, the least of the model first, relative to their block's sum; every block keeps one."""
    blocks, scores = find_blocks(model), units_of(model, stats, by)
    shares = torch.cat([score / score.sum().clamp(min=1e-300) for score in scores.values()])
    last = torch.cat([torch.arange(len(score)) == score.argmax() for score in scores.values()])
    count = min(round(sparsity * len(shares)), int((~last).sum()))
    stay = torch.ones(len(shares), dtype=torch.bool)
    stay[torch.where(last, torch.inf, shares).argsort(stable=True)[:count]] = False
    parts = stay.split([len(score) for score in scores.values()])
    return {path: _expanded(blocks[path], part) for path, part in zip(scores, parts, strict=True)}


def as_masks(model: nn.Module, channels: Channels) -> Masks:
    """The down maps' edges of the channels that go."""
    blocks = find_blocks(model)
    return {(path, "kan_down"): stay.expand(blocks[path].in_features, -1).clone() for path, stay in channels.items()}


def check_narrowing(model: nn.Module, channels: Channels) -> None:
    """Raises ConfigError where a block cannot lose channels: behind it a norm reads all of them."""
    for path, block in find_blocks(model).items():
        if path in channels and block.hidden_norm is not None:
            raise ConfigError("prune hidden channels", subject=path, got="a norm over the hidden channels", hint="Prune edges: what='edges'.")


@torch.no_grad()
def narrow(model: nn.Module, stats: ModelStats, channels: Channels) -> None:
    """Shrinks the blocks, and says so in the records. What the channels gave on average goes into the down map's bias."""
    blocks = find_blocks(model)
    for path, stay in channels.items():
        if not bool(stay.all()):
            _narrow(blocks[path], stats[path], stay)
    for holder, record in find_records(model):
        set_record(holder, PatchRecord(tuple(_site(holder, site) for site in record.sites), record.undo, record.attributes))


def _units(block: KANFeedForward) -> int:
    return block.kan_functions.groups if isinstance(block.kan_functions, EdgeFunctions) else block.hidden_features


def _expanded(block: KANFeedForward, units: Tensor) -> Tensor:
    return units.repeat_interleave(block.hidden_features // len(units))


def _narrow(block: KANFeedForward, layer: LayerStats, stay: Tensor) -> None:
    down, keep = block.kan_down, stay.nonzero().flatten()
    constant = removed_means(down, layer, "kan_down", stay.expand(block.in_features, -1))
    if bool((constant != 0).any()):
        give_bias(down)
    for name in ("kan_gate", "kan_up"):
        module = getattr(block, name)
        if module is not None:
            _rows(module, keep)
    if isinstance(block.kan_functions, EdgeFunctions):
        block.kan_functions = _groups(block.kan_functions, stay)
    _columns(down, keep)
    bias: Any = down.kan_bias if isinstance(down, KANLinear) else down.bias
    if bias is not None:
        bias.copy_((bias.double().cpu() + constant).to(bias))
    block.hidden_features = len(keep)


def _rows(module: nn.Module, keep: Tensor) -> None:
    names = ("kan_base_weight", "kan_coef", "kan_bias") if isinstance(module, KANLinear) else ("weight", "bias")
    for name in names:
        _take(module, name, keep, 0)
    module.out_features = len(keep)  # type: ignore[assignment]
    if getattr(module, "kan_mask", None) is not None:
        module.kan_mask = module.kan_mask[keep.to(module.kan_mask.device)]  # type: ignore[index,union-attr]


def _columns(module: nn.Module, keep: Tensor) -> None:
    if isinstance(module, KANLinear):
        _take(module, "kan_base_weight", keep, 1)
        _take(module, "kan_coef", keep, 2)
        _take(module, "kan_inner", keep, 0)
        module.kan_grid = module.kan_grid[keep.to(module.kan_grid.device)]
    else:
        _take(module, "weight", keep, 1)
    module.in_features = len(keep)  # type: ignore[assignment]
    if isinstance(module, KANLinear | MaskedLinear) and module.kan_mask is not None:
        module.kan_mask = module.kan_mask[:, keep.to(module.kan_mask.device)]


def _groups(functions: EdgeFunctions, stay: Tensor) -> EdgeFunctions:
    keep = stay.view(functions.groups, -1)[:, 0].nonzero().flatten()
    made = copy.copy(functions)
    made._parameters, made._buffers = dict(functions._parameters), dict(functions._buffers)
    _take(made, "kan_coef", keep, 0)
    _take(made, "kan_inner", keep, 0)
    made.kan_grid = functions.kan_grid[keep.to(functions.kan_grid.device)]
    made.channels, made.groups = int(stay.sum()), len(keep)
    return made


def _take(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    old = getattr(module, name, None)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(old.detach().index_select(dim, keep.to(old.device)).contiguous(), requires_grad=old.requires_grad))


def _site(holder: nn.Module, site: Any) -> Any:
    prefix = getattr(holder, "base_model_prefix", "")
    slot = next((found for path in (join(prefix, site.path), site.path) if (found := find_path(holder, path)) is not None), None)
    if not isinstance(slot, KANFeedForward):
        return site
    grouped = isinstance(slot.kan_functions, EdgeFunctions) and site.config.groups is not None
    config = site.config.replace(groups=_units(slot)) if grouped else site.config
    down: Any = slot.kan_down
    bias = (down.kan_bias if isinstance(down, KANLinear) else down.bias) is not None
    return dataclasses.replace(site, hidden=slot.hidden_features, config=config, down_bias=bias)
