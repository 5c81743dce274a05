"""One streaming pass over data: what arrives at every learned function of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.conversion.histogram import ChannelRecorder, ChannelStats
from kanformer.conversion.moments import Moments
from kanformer.errors import ConfigError, DataError
from kanformer.interpret.blocks import all_paths, find_blocks
from kanformer.layers import EdgeFunctions, KANFeedForward


@dataclass(frozen=True)
class LayerStats:
    """What was seen in one KAN-FFN.

    Attributes:
        path: where the block is in the model; `also_at`: further paths of the same block.
        edges: "shared", "full" or "mlp".
        maps: statistics per map with learned functions; empty with edges="mlp".
        hidden_variance: (hidden_features,) variance of what the down map reads, with shared edges; else None.
    """

    path: str
    edges: str
    maps: dict[str, ChannelStats] = field(default_factory=dict)
    hidden_variance: Tensor | None = None
    also_at: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that reached the block's learned functions."""
        return max((stats.count for stats in self.maps.values()), default=0)


def collect(model: nn.Module, batches: Iterable[Mapping], max_tokens: int = 16_384, progress: Callable[[str], None] | None = None) -> dict[str, LayerStats]:
    """Runs the model over batches and gathers, per input channel of every map with learned functions, moments and a histogram.

    The model runs in eval mode without gradients and is afterwards as it was: training flags, hooks, random numbers.
    Positions with attention_mask == 0 are left out wherever the mask fits the activations.

    Args:
        model: any module with `KANFeedForward` blocks.
        batches: mappings of the model's inputs, moved to its device; a single mapping is one batch.
        max_tokens: stop after this many tokens per block, >= 1.
        progress: called with a line of text after each batch.

    Returns:
        `LayerStats` per block, keyed and ordered as in `model.named_modules()`; a block used twice has one entry.

    Raises:
        NoFeedForwardError: the model has no such block.
        DataError: no tokens, a batch the model cannot take, or activations that are not finite (the message names the layer).
    """
    if max_tokens < 1:
        raise ConfigError("collect statistics", got=f"max_tokens={max_tokens}", expected="at least 1")
    blocks = find_blocks(model)
    collectors = [_BlockCollector(path, block, max_tokens) for path, block in blocks.items()]
    if any(collector.recorders for collector in collectors):
        with _hooked(collectors) as current:
            _run(model, batches, collectors, current, max_tokens, progress)
    paths = all_paths(model)
    return {collector.path: collector.finish(paths[id(collector.block)]) for collector in collectors}


@dataclass
class _Current:
    """The batch that runs and the block that runs in it: a child shared by two blocks is counted for the one at work."""

    batch: dict = field(default_factory=dict)
    block: nn.Module | None = None


class _BlockCollector:
    """The recorders of one block: a histogram per map with learned functions, moments of the hidden channels with shared edges."""

    def __init__(self, path: str, block: KANFeedForward, max_tokens: int) -> None:
        self.path, self.block, self.max_tokens = path, block, max_tokens
        self.recorders: dict[str, ChannelRecorder | Moments] = {}
        for name, module in block.spline_modules():
            channels = module.channels if isinstance(module, EdgeFunctions) else module.in_features
            self.recorders[name] = ChannelRecorder(channels, module.kan_grid.shape[0], *module.grid_bounds)
        if block.edges == "shared":
            self.recorders["kan_down"] = Moments(block.hidden_features)
        self.counts = dict.fromkeys(self.recorders, 0)

    def hooks(self, current: _Current) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks."""

        def enter(block, args, kwargs):
            current.block = block

        yield self.block.register_forward_pre_hook(enter, with_kwargs=True)
        for name in self.recorders:

            def look(module, args, name=name):
                if current.block is self.block:
                    self.add(name, args[0], current.batch)

            yield getattr(self.block, name).register_forward_pre_hook(look)

    def add(self, name: str, x: Tensor, batch: Mapping) -> None:
        rows = select_tokens(x.detach(), batch, self.path)[: self.max_tokens - self.counts[name]]
        if not rows.shape[0]:
            return
        if not bool(rows.isfinite().all()):
            kind = "NaN" if bool(rows.isnan().any()) else "infinite values"
            raise DataError(
                "collect statistics",
                subject=f"{self.path or 'model'}, input of {name}",
                got=kind,
                hint="Check the weights and the inputs of the layers before it.",
            )
        self.counts[name] += rows.shape[0]
        self.recorders[name].add(rows)

    def finish(self, paths: list[str]) -> LayerStats:
        maps = {name: recorder.finish() for name, recorder in self.recorders.items() if isinstance(recorder, ChannelRecorder)}
        hidden = self.recorders.get("kan_down")
        variance = hidden.variance.cpu() if isinstance(hidden, Moments) else None
        return LayerStats(self.path, self.block.edges, maps, variance, tuple(path for path in paths if path != self.path))


def _run(model: nn.Module, batches: Iterable[Mapping], collectors: list[_BlockCollector], current: _Current, max_tokens: int, progress) -> None:
    tokens = 0

    def enough(number: int) -> bool:
        nonlocal tokens
        tokens = max(max(collector.counts.values(), default=0) for collector in collectors)
        if progress is not None:
            progress(f"statistics: {tokens:,} of at most {max_tokens:,} tokens")
        return tokens >= max_tokens

    number = run_batches(model, batches, current.batch, enough)
    if not tokens:
        raise DataError("collect statistics", got=f"no tokens in {number} batches", expected="at least one that is not padding")


@contextlib.contextmanager
def _hooked(collectors: list[_BlockCollector]) -> Iterator[_Current]:
    current = _Current()
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for collector in collectors:
            handles.extend(collector.hooks(current))
        yield current
    finally:
        for handle in handles:
            handle.remove()
