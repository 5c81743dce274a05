"""The learned functions of one map as small multiples, ranked by how much they matter on data."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import nn

from kanformer.errors import ConfigError
from kanformer.interpret import words
from kanformer.interpret.blocks import find_layer
from kanformer.interpret.cells import Layout, Panels, make_panels, y_limits
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.scores import MapScores, score_layer

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/
BLUE, VERMILLION, PURPLE, SKY = "#0072B2", "#D55E00", "#CC79A7", "#56B4E9"
GREY, DARK, PALE = "#5F5F5F", "#9A9A9A", "#DEDEDE"
TITLED_CELLS = 60
_SMALL: dict[str, Any] = {"fontsize": 6.5, "color": GREY}
_HALO = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
_LEFT, _RIGHT, _FOOTER, _LEGEND = 0.85, 0.3, 0.5, 0.32  # inches


def plot_layer(model: nn.Module, stats, *, layer: str | int | None = None, map: str | None = None, top: int = 48, y: str = "shared") -> Figure:
    """Draws the learned functions of one map, the most important first, with their start, the data's density and the grid's ends.

    Args:
        model: the model that `collect` ran (then `stats` is what it returned), or one `KANFeedForward` with its `LayerStats`.
        layer: path or number of the block; not needed when there is one only.
        map: "kan_up", "kan_gate", "kan_down" (full edges) or "kan_functions" (shared); None means the last one.
        top: how many functions to draw, >= 1. Up to 60, each cell carries its number, share and ranges.
        y: "shared" draws all cells on one scale, so that small functions look small; "free" scales each by itself.

    Returns:
        A matplotlib figure with its own Agg canvas, unknown to pyplot. A block without learned functions gives one that says so.

    Raises:
        ConfigError: an unknown layer, map or y, or top < 1. DataError: statistics of another block.
    """
    if y not in ("shared", "free"):
        raise ConfigError("plot a layer", got=f"y={y!r}", expected="'shared' or 'free'")
    block, layer_stats = find_layer(model, stats, layer)
    scores = score_layer(block, layer_stats, top=top)
    if not scores:
        return message_figure(layer_stats.path or type(block).__name__, nothing_to_draw(layer_stats))
    map = map or list(scores)[-1]
    if map not in scores:
        raise ConfigError("plot a layer", got=f"map={map!r}", expected=f"one of {', '.join(scores)}")
    return draw_map(block, layer_stats, scores[map], y=y)


def nothing_to_draw(stats: LayerStats) -> str:
    """Why a block has no figure, in words."""
    if stats.edges == "mlp":
        return "nothing to draw: this block is the control (edges='mlp'), it has no learned functions"
    return "nothing to draw: no token reached this block"


def draw_map(block: nn.Module, stats: LayerStats, drawn: MapScores, *, y: str = "shared") -> Figure:
    """`plot_layer` for functions that are ranked already: draws all of `drawn`."""
    module, seen, shared_y = getattr(block, drawn.map), stats.maps[drawn.map], y == "shared"
    panels = make_panels(module, seen, drawn)
    layout = Layout(len(drawn), _columns(len(drawn)), len(drawn) <= TITLED_CELLS)
    limits = y_limits(panels, shared_y)
    ends = (float(limits[0][0]), float(limits[1][0])) if shared_y else None
    lines = _headline(layout, stats, drawn, words.order_sentence(drawn, seen.channels == seen.groups, ends, layout.titled))
    figure, axes = _canvas(layout, lines)
    _draw_cells(axes, layout, panels, limits)
    if layout.titled:
        _label_cells(axes, layout, panels, drawn)
        _label_scales(axes, layout, panels, limits, shared_y)
    _label_axes(axes, layout, drawn)
    _legend(figure, drawn, sum(height for *_, height in lines))
    return figure


def message_figure(title: str, sentence: str) -> Figure:
    """A small figure that says one sentence."""
    figure = Figure(figsize=(9, 1.6))
    FigureCanvasAgg(figure)
    figure.text(0.03, 0.66, words.fold(title, 8.4, 12), fontsize=12, fontweight="bold")
    figure.text(0.03, 0.30, words.fold(sentence, 8.4, 10), fontsize=10)
    return figure


def _columns(count: int) -> int:
    return min(8, max(count, 1)) if count <= TITLED_CELLS else round((1.6 * count) ** 0.5)


def _cell_size(layout: Layout) -> tuple[float, float]:
    return (1.62, 1.42) if layout.titled else (13.0 / layout.columns, 10.0 / layout.columns)


def _content_width(layout: Layout) -> float:
    return max(10.0, layout.columns * _cell_size(layout)[0])


def _canvas(layout: Layout, lines):
    cell = _cell_size(layout)
    header = sum(height for *_, height in lines) + _LEGEND + 0.15
    width, height = _LEFT + _content_width(layout) + _RIGHT, layout.rows * cell[1] + header + _FOOTER
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = height - 0.15
    for text, size, weight, used in lines:
        figure.text(_LEFT / width, top / height, text, fontsize=size, fontweight=weight, va="top")
        top -= used
    box = (_LEFT / width, _FOOTER / height, layout.columns * cell[0] / width, layout.rows * cell[1] / height)
    axes = figure.add_axes(box, xlim=(0, layout.columns), ylim=(-layout.rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _draw_cells(axes, layout: Layout, panels: Panels, limits) -> None:
    fine = layout.titled
    frames = layout.rectangles(layout.across(panels.x[0].numpy(), panels), layout.across(panels.x[-1].numpy(), panels))
    axes.add_collection(PolyCollection(list(frames), facecolors="#FAFAFA", edgecolors="#C8C8C8", linewidths=0.5, zorder=1, gid="frames"))
    ends = [layout.across(values.double().numpy(), panels) for values in (panels.x[0], panels.grid_lo, panels.grid_hi, panels.x[-1])]
    beyond = [box for pair in ((ends[0], ends[1]), (ends[2], ends[3])) for box in layout.rectangles(*pair) if box[1, 0] - box[0, 0] > 1e-6]
    axes.add_collection(PolyCollection(beyond, facecolors=PALE, edgecolors=DARK, linewidths=0, hatch="////" if fine else None, zorder=2, gid="outside"))
    axes.add_collection(PolyCollection(layout.strip(panels), facecolors=SKY, linewidths=0, alpha=0.75, zorder=3, gid="density"))
    x = layout.across(panels.x.double().numpy(), panels)
    for values, colour, style, width, gid in ((panels.start, VERMILLION, (0, (4, 2)), 1.0, "start"), (panels.learned, BLUE, "solid", 1.6, "learned")):
        lines = np.stack([x, layout.upward(values.double().numpy(), *limits)], -1).transpose(1, 0, 2)
        axes.add_collection(LineCollection(list(lines), colors=colour, linestyles=[style], linewidths=width if fine else 0.6 * width, zorder=4, gid=gid))


def _label_cells(axes, layout: Layout, panels: Panels, drawn: MapScores) -> None:
    for index, (left, bottom) in enumerate(layout.corner()):
        name = f"#{int(drawn.input[index])}" if drawn.shared else f"{int(drawn.input[index])}→{int(drawn.output[index])}"
        axes.text(left + 0.05, bottom + layout.top + 0.03, f"{name}  {words.percent(float(drawn.share[index]))}", fontsize=8)
        axes.text(left + 0.05, bottom + 0.02, words.number(float(panels.x[0, index])), **_SMALL)
        axes.text(left + 0.95, bottom + 0.02, words.number(float(panels.x[-1, index])), ha="right", **_SMALL)


def _label_scales(axes, layout: Layout, panels: Panels, limits, shared_y: bool) -> None:
    """The ends of the y-scale: beside the first column where all cells share it, else in the corners that a curve leaves free."""
    rises = (panels.learned[-1] >= panels.learned[0]).tolist()
    for index, (left, bottom) in enumerate(layout.corner()):
        if shared_y and index % layout.columns:
            continue
        for bound, height, side, va in ((limits[1], layout.top - 0.015, not rises[index], "top"), (limits[0], layout.bottom + 0.18, rises[index], "baseline")):
            x, ha = (left + 0.03, "right") if shared_y else (left + 0.93, "right") if side else (left + 0.07, "left")
            axes.text(x, bottom + height, words.number(float(bound[index])), ha=ha, va=va, bbox=None if shared_y else _HALO, **_SMALL)


def _label_axes(axes, layout: Layout, drawn: MapScores) -> None:
    source = "value of the hidden channel before its function" if drawn.shared else "value of the edge's input channel"
    target = "ψ(x), what the function returns" if drawn.shared else "φ(x), what the edge adds to its output"
    axes.set_xlabel(f"x: {source}, in each cell over its own 0.1 % to 99.9 % of the data", fontsize=9.5, loc="left", labelpad=7)
    height = layout.rows * _cell_size(layout)[1]
    axes.set_ylabel(words.fold(f"y: {target}", height, 9.5), fontsize=9.5, labelpad=24 if layout.titled else 8)


def _headline(layout: Layout, stats: LayerStats, drawn: MapScores, order: str) -> list[tuple[str, float, str, float]]:
    """Lines of (text, font size, weight, height in inches)."""
    lines = [(words.map_title(stats, drawn.map), 13, "bold"), (words.drawn_sentence(drawn), 10.5, "normal")]
    lines += [(words.data_sentence(stats, drawn), 9, "normal"), (order, 9, "normal")]
    folded = [(words.fold(text, _content_width(layout), 1.1 * size if weight == "bold" else size), size, weight) for text, size, weight in lines]
    return [(text, size, weight, (text.count("\n") + 1) * size * 1.45 / 72) for text, size, weight in folded]


def _legend(figure: Figure, drawn: MapScores, header: float) -> None:
    width, height = figure.get_size_inches()
    start = "start: the base function b(x)" if drawn.shared else "base part: base_weight · b(x)"
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.8, label="learned function"),
        Line2D([], [], color=VERMILLION, linewidth=1.2, linestyle=(0, (4, 2)), label=start),
        Patch(facecolor=SKY, alpha=0.75, label="where the data lie (density)"),
        Patch(facecolor=PALE, edgecolor=DARK, linewidth=0, hatch="////", label="outside the grid: the spline part fades to 0"),
    ]
    place = (_LEFT / width, (height - 0.15 - header - 0.06) / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, ncols=4, frameon=False, fontsize=9, borderaxespad=0, borderpad=0, columnspacing=1.6)
