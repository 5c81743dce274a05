"""One output with the edges that make it up, and one input with the edges that leave it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kanformer.errors import ConfigError
from kanformer.interpret.blocks import find_layer
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.curves import pick
from kanformer.interpret.drawing.canvas import canvas, quiet
from kanformer.interpret.figures import BLUE, DARK, SKY, VERMILLION, draw_map
from kanformer.interpret.scores import score_layer
from kanformer.interpret.words import number, percent
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

_POINTS = 121
_SHARES = "collect(model, batches, scores=('std', 'share')), and top >= 1."


def plot_node(model: nn.Module, stats, output: int, *, layer: str | int | None = None, map: str | None = None, top: int = 12) -> Figure:
    """Draws who makes up one output: the covariance shares of its first edges (all shares sum to 1; the others are one bar), the waterfall of their sum,
    and the curve that each of them adds to the output, over its input's data.

    Args:
        model, stats, layer: see `find_layer`; `share` of all edges must have been collected. output: channel. map: None means the last one.

    Raises:
        ConfigError: no such layer, map or output, or no shares.
    """
    block, seen = find_layer(model, stats, layer)
    name = _map(seen, map, "draw a node")
    shares = seen.scores[name].values.get("share")
    if shares is None or seen.scores[name].index is not None or top < 1:
        raise ConfigError(
            "draw a node",
            subject=seen.path,
            got="no share of all edges" if top >= 1 else f"top={top}",
            hint="collect(model, batches, scores=('std', 'share')).",
        )
    if not 0 <= output < shares.shape[0]:
        raise ConfigError("draw a node", subject=f"{seen.path}, {name}", got=f"output={output}", expected=f"0 to {shares.shape[0] - 1}")
    row = shares[output].double()
    first = row.abs().argsort(descending=True, stable=True)[:top]
    rest, others = float(row.sum() - row[first].sum()), len(row) - len(first)
    deviation = float(seen.outputs[name].variance[output].sqrt())
    count = len(first)
    columns = 4
    rows = -(-count // columns)
    height = 1.3 + max(0.26 * (count + 1) + 0.8, 1.45 * rows + 0.5)
    lines = [
        f"mean {number(float(seen.outputs[name].mean[output]))}, standard deviation {number(deviation)} over {seen.outputs[name].count:,} tokens",
        f"shares: Cov(edge, output) / Var(output), they sum to {float(row.sum()):.4f}; negative: it cancels others; the bars start where the ones above end",
    ]
    figure, ceiling = canvas(13, height, f"{seen.path or '(the model itself)'}, {name.removeprefix('kan_')} map: output {output}", lines)
    axes = figure.add_axes((0.125, 0.55 / height, 0.215, ceiling - 0.6 / height))
    _waterfall(axes, row[first], first, rest, others)
    grid = figure.add_gridspec(rows, columns, left=0.40, right=0.985, top=ceiling - 0.25 / height, bottom=0.55 / height, hspace=0.75, wspace=0.35)
    for place, channel in enumerate(first.tolist()):
        _edge(figure.add_subplot(grid[place // columns, place % columns]), block, seen, name, output, channel, float(row[channel]))
    return figure


def plot_input(model: nn.Module, stats, input: int, *, layer: str | int | None = None, map: str | None = None, top: int = 48, y: str = "shared") -> Figure:
    """Draws the first functions that read one input channel: with full edges one per output, as `plot_layer` does; with shared edges its one function.

    Raises:
        ConfigError: no such layer, map or input, or top < 1.
    """
    block, seen = find_layer(model, stats, layer)
    scores = score_layer(block, seen)
    name = map or (list(scores)[-1] if scores else "")
    if name not in scores or top < 1:
        raise ConfigError("draw an input", subject=seen.path, got=f"map={map!r}, top={top}", expected=f"one of {', '.join(scores)}; top >= 1")
    drawn, module = scores[name], getattr(block, name)
    channels = seen.maps[name].channels
    if not 0 <= input < channels:
        raise ConfigError("draw an input", subject=f"{seen.path}, {name}", got=f"input={input}", expected=f"0 to {channels - 1}")
    group = input // (channels // module.groups) if isinstance(module, EdgeFunctions) else input
    places = (drawn.input == group).nonzero().flatten()[:top]
    fields: Any = {each: getattr(drawn, each)[places] for each in ("score", "std", "nonlinearity", "learned", "outside", "input", "output")}
    return draw_map(block, seen, replace(drawn, **fields), y=y)


def _map(seen: LayerStats, map: str | None, action: str) -> str:
    if not seen.scores:
        raise ConfigError(action, subject=seen.path, got="no scores of edges", hint=_SHARES)
    name = map or list(seen.scores)[-1]
    if name not in seen.scores:
        raise ConfigError(action, subject=seen.path, got=f"map={map!r}", expected=f"one of {', '.join(seen.scores)}")
    return name


def _waterfall(axes, shares: Tensor, inputs: Tensor, rest: float, others: int) -> None:
    start, labels = 0.0, []
    for place, (share, channel) in enumerate(zip([*shares.tolist(), rest], [*inputs.tolist(), None], strict=True)):
        colour = DARK if channel is None else BLUE if share >= 0 else VERMILLION
        axes.barh(place, share, left=start, color=colour, height=0.72, hatch="//" if share < 0 else None, edgecolor="white", linewidth=0.4)
        start += share
        labels.append(f"input {channel}  {_signed(share)}" if channel is not None else f"other {others:,}  {_signed(share)}")
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.axvline(1, color=DARK, linewidth=0.8, linestyle=":")
    axes.set(ylim=(len(labels) - 0.4, -0.6), yticks=range(len(labels)))
    axes.set_yticklabels(labels)
    axes.set_xlabel("share of the output's variance, summed from the top", fontsize=9)
    quiet(axes)


def _signed(share: float) -> str:
    return ("−" if share < 0 else "") + percent(abs(share))


def _edge(axes, block: nn.Module, seen: LayerStats, name: str, output: int, channel: int, share: float) -> None:
    """What the edge adds to the output over its input, with the density below."""
    module = getattr(block, name)
    shared = not isinstance(module, KANLinear)
    functions: Any = block.kan_functions if shared else module
    stats = seen.maps["kan_functions" if shared else name]
    group = channel // (stats.channels // stats.groups) if shared else channel
    low, high = (float(stats.quantile(q)[channel if len(stats.quantile(q)) == stats.channels else group]) for q in (0.001, 0.999))
    margin = 0.04 * (high - low) or 1e-3
    curves = pick(functions, torch.tensor([group]), None if shared else torch.tensor([output]))
    x = torch.linspace(low - margin, high + margin, _POINTS, dtype=curves.coef.dtype).unsqueeze(1)
    weight = float(module.weight.detach()[output, channel]) if shared else 1.0
    learned, start = weight * curves.learned(x), weight * curves.start(x)
    axes.plot(x[:, 0], start[:, 0], color=VERMILLION, linewidth=1, linestyle=(0, (4, 2)))
    axes.plot(x[:, 0], learned[:, 0], color=BLUE, linewidth=1.5)
    for bound, side in zip(functions.grid_bounds, (-1, 1), strict=True):
        edge = float(bound[group])
        beyond = (low - margin, edge) if side < 0 else (edge, high + margin)
        if beyond[0] < beyond[1]:
            axes.axvspan(max(beyond[0], low - margin), min(beyond[1], high + margin), facecolor="#DEDEDE", edgecolor=DARK, hatch="////", linewidth=0, zorder=0)
    draw_density(axes, stats, group, low - margin, high + margin)
    gated = shared and getattr(block, "gated", False)
    axes.set_title(f"{channel}→{output}  {_signed(share)}" + ("  (times up)" if gated else ""), fontsize=8.5, loc="left")
    axes.set_xlim(low - margin, high + margin)
    quiet(axes)


def draw_density(axes, stats, group: int, low: float, high: float) -> None:
    probability = stats.density()[1]
    edges = stats.edges[group].numpy()
    height = probability[group].numpy() / (edges[1:] - edges[:-1]).clip(1e-300)
    inside = height[(edges[1:] > low) & (edges[:-1] < high)]
    twin = axes.twinx()
    twin.stairs(height, edges, fill=True, color=SKY, alpha=0.5)
    twin.set(ylim=(0, 6 * max(float(inside.max()) if len(inside) else 0.0, 1e-300)), yticks=[])
    twin.spines[:].set_visible(False)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
