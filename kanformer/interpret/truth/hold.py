"""A model in which chosen edges or functions give their means over the data, whatever they read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError
from kanformer.interpret.blocks import find_blocks, pick_layer
from kanformer.interpret.collecting.sources import FullEdges, LinearEdges
from kanformer.interpret.collecting.stats import LayerStats, ModelStats
from kanformer.interpret.collecting.tokens import Located, TokenStore, locate, make_grid
from kanformer.layers import KANFeedForward
from kanformer.layers.kan_linear import KANLinear


@dataclass(frozen=True, order=True)
class Target:
    """What is held at its mean: the edge from `input` to `output` of a map; with output -1 the shared function number `input` in all its edges.

    `map` is "kan_up", "kan_gate" or "kan_down" for edges, "kan_functions" for functions.
    """

    layer: str
    map: str
    output: int
    input: int


@dataclass
class Positions:
    """Where the running batch's tokens are; `start` it with each batch."""

    skip_first: bool = False
    grids: dict[str, Any] = field(default_factory=dict)
    batch: Mapping[str, Any] = field(default_factory=dict)

    def start(self, batch: Mapping[str, Any]) -> None:
        """Forgets the last batch."""
        self.batch, self.grids = batch, {}

    def locate(self, x: Tensor, path: str) -> Located:
        """The rows of x that count."""
        decoder = "decoder" in path.split(".") and ("decoder_input_ids" in self.batch or "decoder_attention_mask" in self.batch)
        prefix = "decoder_" if decoder else ""
        if prefix not in self.grids:
            self.grids[prefix] = make_grid(self.batch, TokenStore(), self.skip_first, prefix)
        return locate(x, self.grids[prefix])


def read_targets(model: nn.Module, stats: ModelStats, targets: Iterable[Any]) -> list[Target]:
    """Targets from `Target`s, rows of a `Table` or tuples (layer, map, output, input); a layer may be given by number.

    Raises:
        ConfigError: no such layer, map, edge or function, or none at all.
    """
    blocks, found = find_blocks(model), []
    for each in targets:
        if isinstance(each, Mapping):
            layer, name, output, source = each["layer"], each["map"], each["output"], each["input"]
        elif isinstance(each, Target):
            layer, name, output, source = each.layer, each.map, each.output, each.input
        else:
            layer, name, output, source = each
        path = pick_layer(stats, layer)
        _check(path, blocks[path], name, output, source)
        found.append(Target(path, name, int(output), int(source)))
    if not found:
        raise ConfigError("hold edges at their means", got="no edges", hint="Pass stats.top(20), or (layer, map, output, input).")
    return found


def _check(path: str, block: KANFeedForward, name: str, output: int, source: int) -> None:
    shared = block.edges == "shared"
    names = ["kan_down", "kan_functions"] if shared else [each for each, _ in block.spline_modules()]
    if name not in names:
        raise ConfigError("hold edges at their means", subject=path, got=f"map={name!r}", expected=f"one of {', '.join(names)}")
    if name == "kan_functions":
        outputs, inputs = 0, cast(Any, block.kan_functions).groups
    else:
        module = getattr(block, name)
        outputs, inputs = module.out_features, module.in_features
    if not 0 <= source < inputs or (output != -1 if name == "kan_functions" else not 0 <= output < outputs):
        what = f"functions 0 to {inputs - 1} with output -1" if name == "kan_functions" else f"outputs 0 to {outputs - 1}, inputs 0 to {inputs - 1}"
        raise ConfigError("hold edges at their means", subject=f"{path}, {name}", got=f"output {output}, input {source}", expected=what)


@contextlib.contextmanager
def held_at_means(model: nn.Module, stats: ModelStats, targets: Iterable[Target], positions: Positions) -> Iterator[None]:
    """Within the block the targets give their means over the data of `stats`, at the tokens that count; all else is computed as ever."""
    blocks = find_blocks(model)
    by_map: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        by_map.setdefault((target.layer, target.map), []).append(target)
    with contextlib.ExitStack() as hooks:
        for (path, name), some in by_map.items():
            hooks.callback(_hold(blocks[path], stats[path], name, some, positions).remove)
        yield


@contextlib.contextmanager
def all_held(model: nn.Module, stats: ModelStats, positions: Positions) -> Iterator[None]:
    """Within the block all learned functions are at their means, so every block gives the mean of its down map's output."""
    blocks = find_blocks(model)
    with contextlib.ExitStack() as hooks:
        for path, layer in stats.items():
            if "kan_down" in layer.outputs and layer.outputs["kan_down"].count:
                hook = _constant(path, layer.outputs["kan_down"].mean, positions)
                hooks.callback(blocks[path].kan_down.register_forward_hook(hook).remove)
        yield


def _hold(block: KANFeedForward, layer: LayerStats, name: str, targets: list[Target], positions: Positions):
    if name == "kan_functions":
        return block.kan_down.register_forward_pre_hook(_function_hook(block, _hidden_means(layer), targets, positions))
    return getattr(block, name).register_forward_hook(_edge_hook(block, layer, name, targets, positions))


def _constant(path: str, mean: Tensor, positions: Positions) -> Callable:
    def give(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        keep = positions.locate(args[0], path).keep
        constant = mean.to(output).expand_as(output)
        return constant.clone() if keep is None else torch.where(keep.view(*output.shape[:-1], 1), constant, output)

    return give


def _function_hook(block: KANFeedForward, means: Tensor, targets: list[Target], positions: Positions) -> Callable:
    repeats = len(means) // cast(Any, block.kan_functions).groups
    channels = torch.cat([torch.arange(target.input * repeats, (target.input + 1) * repeats) for target in targets])

    def give(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0].clone()
        keep, rows = positions.locate(hidden, targets[0].layer).keep, hidden.view(-1, hidden.shape[-1])
        where = channels.to(hidden.device)
        constant = means[channels].to(hidden)
        rows[:, where] = constant if keep is None else torch.where(keep.unsqueeze(1), constant, rows[:, where])
        return (hidden, *args[1:])

    return give


def _edge_hook(block: KANFeedForward, layer: LayerStats, name: str, targets: list[Target], positions: Positions) -> Callable:
    module = getattr(block, name)
    source = FullEdges(module) if isinstance(module, KANLinear) else LinearEdges(module)
    means = plane_means(layer, name, isinstance(module, KANLinear))

    def give(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        keep = positions.locate(args[0], layer.path).keep
        x, y = args[0].reshape(-1, args[0].shape[-1]), output.view(-1, output.shape[-1])
        for target in targets:
            columns = slice(target.input, target.input + 1)
            planes = source.values(x, columns)
            weights = [float(weight[target.output, 0]) for weight in source.weights(columns, torch.float64)]
            change = sum(
                weight * (plane.squeeze(1).double() - mean) for weight, plane, mean in zip(weights, planes, means[:, target.input].tolist(), strict=True)
            )
            assert isinstance(change, Tensor)
            y[:, target.output] -= (change if keep is None else change * keep).to(y)
        return output

    return give


def plane_means(layer: LayerStats, name: str, full: bool) -> Tensor:
    """The mean over the data of every plane of every input, (planes, inputs) on the CPU: see `Planes`; one plane with shared edges."""
    if full:
        if name not in layer.moments:
            raise _no_means(layer)
        return layer.moments[name][:, 0, 2:].t()
    return _hidden_means(layer).unsqueeze(0)


def _hidden_means(layer: LayerStats) -> Tensor:
    if layer.hidden is None:
        raise _no_means(layer)
    return layer.hidden.mean


def _no_means(layer: LayerStats) -> DataError:
    return DataError("hold edges at their means", subject=layer.path, got="statistics without means", hint="collect(model, batches, scores=('std',)) has them.")
