"""Which KAN-FFNs a model has, and which one the caller means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from kanformer.errors import ConfigError, DataError, NoFeedForwardError, did_you_mean
from kanformer.layers import KANFeedForward

if TYPE_CHECKING:
    from kanformer.interpret.collecting.stats import LayerStats


def find_blocks(model: nn.Module) -> dict[str, KANFeedForward]:
    """The KAN-FFNs of a model by path, each once.

    Raises:
        NoFeedForwardError: there is none.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward)}
    if not blocks:
        raise NoFeedForwardError(
            "look at the learned functions", subject=type(model).__name__, got="no KANFeedForward in it", hint="Patch it first: kanformer.patch_model(model)."
        )
    return blocks


def choose_blocks(blocks: Mapping[str, KANFeedForward], layers: Sequence[str | int] | str | int | None) -> dict[str, KANFeedForward]:
    """Those given by path or number, in the order of `blocks`; None means all.

    Raises:
        ConfigError: there is no such layer.
    """
    if layers is None:
        return dict(blocks)
    wanted = {_place(list(blocks), layer) for layer in ([layers] if isinstance(layers, str | int) else layers)}
    return {path: block for path, block in blocks.items() if path in wanted}


def all_paths(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every block, by the block's id: more than one where a block is used by several layers."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, KANFeedForward):
            paths.setdefault(id(module), []).append(path)
    return paths


def find_layer(model: nn.Module, stats: LayerStats | Mapping[str, LayerStats], layer: str | int | None = None) -> tuple[KANFeedForward, LayerStats]:
    """The block and its statistics.

    Args:
        model: the model that `collect` ran, or one of its blocks together with that block's statistics.
        stats: what `collect` returned, or one entry of it.
        layer: path or number of the block; not needed when there is one only.

    Raises:
        ConfigError: no such layer, or several and none chosen.
        DataError: statistics of another block.
    """
    if isinstance(stats, Mapping):
        stats = stats[pick_layer(stats, layer)]
    block = model if isinstance(model, KANFeedForward) else _submodule(model, stats.path)
    sizes = {name: module.kan_grid.shape[0] for name, module in block.spline_modules()}
    if block.edges != stats.edges or sizes != {name: one.groups for name, one in stats.maps.items()}:
        raise DataError(
            "look at a layer",
            subject=stats.path or type(model).__name__,
            got="statistics of another block",
            hint="Pass what collect(model, batches) returned for it.",
        )
    return block, stats


def pick_layer(stats: Mapping[str, LayerStats], layer: str | int | None) -> str:
    """The path of a layer given by path, further path or number.

    Raises:
        ConfigError: no such layer, or several and none chosen.
    """
    paths = list(stats)
    if layer is None and len(paths) == 1:
        return paths[0]
    return next((path for path, one in stats.items() if layer in one.also_at), None) or _place(paths, layer)


def _place(paths: list[str], layer: str | int | None) -> str:
    if isinstance(layer, int) and -len(paths) <= layer < len(paths):
        return paths[layer]
    if isinstance(layer, str) and layer in paths:
        return layer
    hint = did_you_mean(layer, paths) if isinstance(layer, str) else f"Give a number from 0 to {len(paths) - 1} or a path such as {paths[0]!r}."
    raise ConfigError("look at a layer", got=f"layer={layer!r}", expected=f"one of {len(paths)}", hint=hint)


def _submodule(model: nn.Module, path: str) -> KANFeedForward:
    block = dict(model.named_modules(remove_duplicate=False)).get(path)
    if isinstance(block, KANFeedForward):
        return block
    raise DataError("look at a layer", subject=path or type(model).__name__, got="a model without this block", hint="Pass the model that collect ran.")
