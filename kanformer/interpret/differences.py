"""What is different between two models of one shape: function by function, on the data of the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.stats import LayerStats, ModelStats
from kanformer.interpret.curves import plain
from kanformer.interpret.scoring.table import Scores, Table, top_of
from kanformer.interpret.symbolic.functions import Chosen, values_at
from kanformer.interpret.symbolic.points import NODES, make_points
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear

_ACTION = "compare two models"
_NUMBERS = 2**21
_TINY = 1e-300


@dataclass(frozen=True)
class Diff:
    """Scores of every function and edge, by block and map.

    "distance": root mean square over the data of the first model of the two functions' difference, means removed, over the standard deviation of the
    output (full edges) or of the first model's function (shared ones). "std" and "std_other": deviations of either. "rank_change": how many places
    further down (negative: up) it stands in the second model, ordered by deviation. Edges behind shared functions: W * std(hidden channel).
    """

    maps: dict[str, dict[str, Scores]]

    def top(self, n: int = 20, by: str = "distance", functions: bool = False) -> Table:
        """The first n, the most changed first: edges, or with `functions` whole shared functions. A `Table` writes CSV, JSON and parquet."""
        kind = "function" if functions else "edge"
        found = [one for maps in self.maps.values() for one in maps.values() if one.kind == kind]
        if not found:
            raise ConfigError(_ACTION, got=f"no {kind}s", expected="models with shared functions" if functions else "models with edges")
        return top_of(found, n, by)

    def summary(self) -> list[dict]:
        """A row per map: median, 99 % quantile and largest distance, and how many functions differ at all."""
        rows = []
        for path, maps in self.maps.items():
            for name, one in maps.items():
                distance = one.values["distance"].double().flatten()
                ends = [float(distance.median()), float(distance.kthvalue(max(1, round(0.99 * len(distance)))).values), float(distance.max())]
                counts = {"functions": len(distance), "changed": int((distance > 0).sum())}
                rows.append({"layer": path, "map": name, **counts, **dict(zip(("median", "q99", "max"), ends, strict=True))})
        return rows

    def __str__(self) -> str:
        from kanformer.surgery.tables import table

        rows = []
        for row in self.summary():
            rows.append((row["layer"], row["map"], f"{row['functions']:,}", f"{row['changed']:,}", *(f"{row[name]:.4g}" for name in ("median", "q99", "max"))))
        return table(("layer", "map", "functions", "changed", "median", "99 %", "largest distance"), rows, right=range(2, 7))


@torch.no_grad()
def compare_functions(model: nn.Module, other: nn.Module, stats: ModelStats) -> Diff:
    """Compares the learned functions of two patched models, for example before and after fine-tuning; grids and bases may differ, widths may not.

    Args:
        stats: what `collect` returned for `model`, with any score (it needs the outputs' deviations).

    Raises:
        DataError: other blocks, widths or groups, the first of them named; statistics of another model, or without deviations.
    """
    mine, theirs = find_blocks(model), find_blocks(other)
    if list(mine) != list(theirs) or list(stats) != [path for path in mine if path in stats]:
        strange = next((path for path in [*mine, *theirs] if path not in mine or path not in theirs), "statistics")
        raise DataError(_ACTION, subject=strange, got=f"{len(mine)} and {len(theirs)} blocks", expected="the same blocks in both, and statistics of the first")
    return Diff({path: dict(_compare(mine[path], theirs[path], layer)) for path, layer in stats.items() if layer.tokens})


def _compare(mine: KANFeedForward, theirs: KANFeedForward, seen: LayerStats) -> Iterator[tuple[str, Scores]]:
    shapes = [(block.edges, block.gated, block.in_features, block.hidden_features) for block in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise DataError(_ACTION, subject=seen.path, got=f"(edges, gated, d, h) = {shapes[1]}", expected=f"{shapes[0]}")
    others = dict(theirs.spline_modules())
    for name, module in mine.spline_modules():
        other = others[name]
        if module.kan_grid.shape[0] != other.kan_grid.shape[0]:
            raise DataError(_ACTION, subject=f"{seen.path}, {name}", got=f"{other.kan_grid.shape[0]} functions", expected=str(module.kan_grid.shape[0]))
        yield name, _functions(module, other, seen, name)
    if isinstance(mine.kan_functions, EdgeFunctions) and seen.hidden is not None:
        yield "kan_down", _edges(mine.kan_down, theirs.kan_down, seen)


def _functions(module: EdgeFunctions | KANLinear, other: EdgeFunctions | KANLinear, seen: LayerStats, name: str) -> Scores:
    points = make_points(module, seen.maps[name], f"{seen.path}, {name}")
    full = isinstance(module, KANLinear)
    outputs = torch.arange(module.out_features) if full else torch.tensor([-1])
    parts: list[list[Tensor]] = [[], [], []]
    for rows in torch.arange(module.kan_grid.shape[0]).split(max(1, _NUMBERS // (len(outputs) * NODES))):
        chosen = Chosen(rows.repeat_interleave(len(outputs)), outputs.repeat(len(rows)))
        a, b = (values_at(each, points, chosen)[:, :NODES].cpu().view(len(rows), len(outputs), NODES) for each in (module, other))
        for part, values in zip(parts, (a - b, a, b), strict=True):
            part.append(values.std(-1, correction=0))
    distance, std, std_other = (torch.cat(part).t().contiguous() for part in parts)  # (outputs, inputs)
    if full:
        if name not in seen.outputs:
            hint = "collect(model, batches, scores=('std',))."
            raise DataError(_ACTION, subject=f"{seen.path}, {name}", got="statistics without deviations of outputs", hint=hint)
        scale = seen.outputs[name].variance.sqrt().unsqueeze(1)
    else:
        distance, std, std_other, scale = distance[0], std[0], std_other[0], std[0]
    return _scores(seen.path, name, "edge" if full else "function", distance / scale.clamp(min=_TINY), std, std_other)


def _edges(mine: nn.Module, theirs: nn.Module, seen: LayerStats) -> Scores:
    assert seen.hidden is not None
    deviation = seen.hidden.variance.sqrt()
    a, b = (plain(each.weight).double() for each in (mine, theirs))  # type: ignore[arg-type]
    scale = seen.outputs["kan_down"].variance.sqrt().unsqueeze(1).clamp(min=_TINY)
    return _scores(seen.path, "kan_down", "edge", (a - b).abs() * deviation / scale, a.abs() * deviation, b.abs() * deviation)


def _scores(path: str, name: str, kind: str, distance: Tensor, std: Tensor, std_other: Tensor) -> Scores:
    change = (_ranks(std_other) - _ranks(std)).view_as(std)
    values = {"distance": distance, "std": std, "std_other": std_other, "rank_change": change}
    return Scores(path, name, kind, values, total=distance.numel())


def _ranks(values: Tensor) -> Tensor:
    order = values.flatten().argsort(descending=True, stable=True)
    return torch.empty(len(order), dtype=torch.float64).scatter(0, order, torch.arange(len(order), dtype=torch.float64))
