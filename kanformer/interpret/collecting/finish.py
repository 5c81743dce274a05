"""From what was gathered of a block in all processes to its `LayerStats`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.interpret.collecting.contexts import Contexts, gather_store
from kanformer.interpret.collecting.moments import ValueMoments
from kanformer.interpret.collecting.stats import HiddenStats, LayerStats, OutputStats
from kanformer.interpret.collecting.tokens import TokenStore
from kanformer.interpret.collecting.watch import BlockWatch, EdgeWatch
from kanformer.interpret.scoring.edges import channel_scores, full_scores, function_scores, shared_scores
from kanformer.interpret.scoring.table import Scores
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

Store = tuple[Tensor, Tensor, int]


def common_store(store: TokenStore) -> Store:
    """(ids, starts, this process' first number) of all processes' tokens."""
    return gather_store(store.ids, torch.tensor(store.starts))


@torch.no_grad()
def finish_block(watch: BlockWatch, wanted: list[str], stores: dict[str, Store], scored: float, also_at: tuple[str, ...], backward: bool) -> LayerStats:
    """Adds up what all processes saw of a block, and frees it."""
    for recorder in (*watch.histograms.values(), *watch.moments.values(), *([watch.hidden] if watch.hidden is not None else [])):
        recorder.all_reduce()
    maps = {name: recorder.finish() for name, recorder in watch.histograms.items()}
    hidden = None if watch.hidden is None else _hidden(watch.hidden)
    layer = LayerStats(watch.path, watch.block.edges, maps, None if hidden is None else hidden.variance, also_at, hidden if wanted else None)
    layer.moments.update({name: recorder.mean() for name, recorder in watch.moments.items()})
    layer.contexts.update(_contexts(watch, stores))
    for name in list(watch.edges):
        edges = watch.edges.pop(name)  # and its memory with it
        layer.outputs[name] = _outputs(edges, backward)
        edges.sums.finish()
        if layer.outputs[name].count:
            _score(watch, layer, name, edges, wanted, scored)
    notes = ("contexts: this block's rows are no tokens of the batch",) if watch.unplaced else ()
    return LayerStats(**{**vars(layer), "notes": notes})


def _score(watch: BlockWatch, layer: LayerStats, name: str, edges: EdgeWatch, wanted: list[str], scored: float) -> None:
    module = getattr(watch.block, name)
    if isinstance(module, KANLinear):
        seen: ChannelStats = layer.maps[name]
        layer.scores[name] = full_scores(layer.path, name, module, wanted, seen, layer.moments[name], layer.outputs[name], edges.sums, scored)
        return
    functions = cast(EdgeFunctions, watch.block.kan_functions)
    assert layer.hidden is not None
    moments = layer.moments["kan_functions"]
    groups = torch.arange(functions.channels) // (functions.channels // functions.groups)
    channel = channel_scores(functions, moments, groups)
    if edges.functions is not None:
        edges.functions.finish(layer.hidden.mean)
    found: Scores = shared_scores(layer.path, module.weight, wanted, layer.hidden, channel, layer.outputs[name], edges.sums, scored)
    layer.scores[name] = found
    layer.functions["kan_functions"] = function_scores(layer.path, functions, wanted, moments, layer.hidden, found, edges.sums, edges.functions, scored)


def _contexts(watch: BlockWatch, stores: dict[str, Store]) -> dict[str, Contexts]:
    ids, starts, first = stores[watch.store]
    found = {}
    for name, recorder in watch.contexts.items():
        recorder.all_reduce(first)
        if len(recorder.rows):
            found[name] = recorder.finish(ids, starts)
    return found


def _outputs(edges: EdgeWatch, backward: bool) -> OutputStats:
    edges.outputs.all_reduce()
    edges.gradients.all_reduce()
    moments = edges.outputs
    return OutputStats(moments.count, moments.mean.cpu(), moments.variance.cpu(), edges.gradients.rms() if backward else None)


def _hidden(moments: ValueMoments) -> HiddenStats:
    absolute = moments.absolute / max(1, moments.count)
    return HiddenStats(*(value.cpu() for value in (moments.mean, moments.variance, moments.minimum, moments.maximum, absolute)))
