"""What is gathered of one block while the model runs, by hooks on its maps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.conversion.histogram import ChannelRecorder
from kanformer.errors import DataError
from kanformer.interpret.collecting.contexts import ContextRecorder
from kanformer.interpret.collecting.edge_sums import EdgeSums, FunctionSums
from kanformer.interpret.collecting.moments import GradientMoments, PlaneMoments, ValueMoments
from kanformer.interpret.collecting.sources import FullEdges, LinearEdges, Planes
from kanformer.interpret.collecting.tokens import Located, TokenGrid, TokenStore, locate, make_grid
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear


@dataclass
class Run:
    """The batch that runs, the block that runs in it (a child shared by two blocks is counted for the one at work), and its calls."""

    skip_first: bool = False
    stores: dict[str, TokenStore] = field(default_factory=lambda: {"": TokenStore(), "decoder_": TokenStore()})
    batch: dict[str, Any] = field(default_factory=dict)
    number: int = 1
    block: nn.Module | None = None
    gradients: bool = False
    calls: list[Call] = field(default_factory=list)
    grids: dict[str, TokenGrid | None] = field(default_factory=dict)

    def grid(self, path: str) -> tuple[str, TokenGrid | None]:
        """(which store, the grid of the batch for blocks at this path), made once per batch."""
        decoder = "decoder" in path.split(".") and ("decoder_input_ids" in self.batch or "decoder_attention_mask" in self.batch)
        prefix = "decoder_" if decoder else ""
        if prefix not in self.grids:
            self.grids[prefix] = make_grid(self.batch, self.stores[prefix], self.skip_first, prefix)
        return prefix, self.grids[prefix]

    def next_batch(self) -> None:
        self.calls, self.grids, self.number = [], {}, self.number + 1


@dataclass
class Call:
    """One forward pass of a map whose gradients are wanted: what it read and gave, and the zeros that were added to its output."""

    edges: EdgeWatch
    name: str
    x: Tensor
    y: Tensor
    delta: Tensor
    located: Located


class EdgeWatch:
    """Of the edges of one map: its outputs, their gradients, and sums per edge."""

    def __init__(self, source: FullEdges | LinearEdges, wanted: Collection[str], dtype: torch.dtype, device: torch.device, groups: int | None) -> None:
        curvature, slope = "effect" in wanted, bool({"effect1", "effect"} & set(wanted))
        self.outputs, self.gradients = ValueMoments(source.outputs), GradientMoments(source.outputs)
        self.sums = EdgeSums(source, covariance="share" in wanted, slope=slope, curvature=curvature, dtype=dtype, device=device)
        backward = slope or "sens" in wanted
        self.functions = FunctionSums(cast(Tensor, source.module.weight), groups) if groups is not None and backward else None

    def add(self, x: Tensor, y: Tensor, gradient: Tensor | None, probes: list[Tensor], sizes: list[int]) -> None:
        """Takes in rows; gradients (tokens, out) of the summed loss and of its probes."""
        self.outputs.add(y)
        strengths = [gradient] if gradient is not None else probes
        for strength in strengths:
            self.gradients.add(strength)
        used = probes if self.sums.curvature is not None else []
        self.sums.add(x, y, gradient, used, sizes)
        if self.functions is not None:
            self.functions.add(x, strengths, used, sizes)


class BlockWatch:
    """All that is gathered of one block.

    Args:
        wanted: scores, see `scoring.edges.SCORES`; none: histograms only.
        contexts: how many per slot, 0 for none.
        max_tokens: rows that are taken in at most, or None where whole batches are.
    """

    def __init__(self, path: str, block: KANFeedForward, wanted: Collection[str], contexts: int, max_tokens: int | None) -> None:
        self.path, self.block, self.max_tokens = path, block, max_tokens
        self.histograms: dict[str, ChannelRecorder] = {}
        self.contexts: dict[str, ContextRecorder] = {}
        self.moments: dict[str, PlaneMoments] = {}
        self.edges: dict[str, EdgeWatch] = {}
        self.hidden = ValueMoments(block.hidden_features) if block.edges == "shared" else None
        self.store, self.unplaced = "", False
        for name, module in block.spline_modules():
            channels = module.grid_channels
            self.histograms[name] = ChannelRecorder(channels, module.kan_grid.shape[0], *module.grid_bounds)
            if contexts:
                self.contexts[name] = ContextRecorder(channels, contexts)
            if wanted:
                self.moments[name] = PlaneMoments(Planes(module))
                self._watch_edges(name, module, wanted)
        watched = {*self.histograms, *(["kan_down"] if self.hidden is not None else [])}
        self.counts = dict.fromkeys(watched, 0)

    def _watch_edges(self, name: str, module: EdgeFunctions | KANLinear, wanted: Collection[str]) -> None:
        dtype, device = torch.promote_types(module.kan_coef.dtype, torch.float32), module.kan_coef.device
        if isinstance(module, KANLinear):
            self.edges[name] = EdgeWatch(FullEdges(module), wanted, dtype, device, None)
        else:
            self.edges["kan_down"] = EdgeWatch(LinearEdges(self.block.kan_down), wanted, dtype, device, module.groups)

    def hooks(self, run: Run) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks."""

        def enter(block, args, kwargs):
            run.block = block

        yield self.block.register_forward_pre_hook(enter, with_kwargs=True)
        for name in self.counts:
            yield getattr(self.block, name).register_forward_hook(self._hook(name, run))

    def _hook(self, name: str, run: Run) -> Callable:
        def look(module, args, output):
            if run.block is not self.block:
                return None
            return self._look(name, run, args[0], output)

        return look

    def _look(self, name: str, run: Run, x: Tensor, y: Tensor) -> Tensor | None:
        store, grid = run.grid(self.path)
        with torch.no_grad():
            located = self._cut(locate(x, grid), name)
            rows = located.rows(x.detach())
            if not rows.shape[0]:
                return None
            self._check(rows, f"input of {name}", run)
            self.counts[name] += rows.shape[0]
            self._add_inputs(name, rows, located, grid, store)
        edges = self.edges.get(name)
        if edges is None:
            return None
        self._check(y.detach(), f"output of {name}", run)
        if not run.gradients:
            edges.add(rows, located.rows(y.detach()), None, [], located.sizes())
            return None
        delta = torch.zeros_like(y, requires_grad=True)
        run.calls.append(Call(edges, f"{self.path}, {name}", x.detach(), y.detach(), delta, located))
        return y + delta

    def _add_inputs(self, name: str, rows: Tensor, located: Located, grid: TokenGrid | None, store: str) -> None:
        if name in self.histograms:
            self.histograms[name].add(rows)
        elif self.hidden is not None:
            self.hidden.add(rows)
        if name in self.moments:
            self.moments[name].add(rows)
        if name in self.contexts:
            if located.place is None or grid is None:
                self.unplaced = True
            else:
                self.store = store
                self.contexts[name].add(rows, grid.ordinal[located.place], grid.priority[located.place])

    def _cut(self, located: Located, name: str) -> Located:
        """No more rows than there is room for."""
        if self.max_tokens is None:
            return located
        room = max(0, self.max_tokens - self.counts[name])
        if len(located.segment) <= room:
            return located
        number = len(located.segment) if located.keep is None else len(located.keep)
        keep = torch.ones(number, dtype=torch.bool, device=located.segment.device) if located.keep is None else located.keep
        keep = keep & (keep.cumsum(0) <= room)
        return Located(keep, None if located.place is None else located.place[:room], located.segment[:room])

    def _check(self, values: Tensor, what: str, run: Run) -> None:
        if bool(values.isfinite().all()):
            return
        kind = "NaN" if bool(values.isnan().any()) else "infinite values"
        raise DataError(
            "collect statistics",
            subject=f"{self.path or 'model'}, {what}",
            got=f"{kind} in batch {run.number}",
            hint="Check the weights and the inputs of the layers before it.",
        )
