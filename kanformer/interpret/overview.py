"""One figure for the whole model: how nonlinear, how changed, how well covered and how concentrated each layer is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.figures import BLUE, PURPLE, VERMILLION, message_figure
from kanformer.interpret.scores import MapScores, score_layer

_STYLES = {"kan_functions": (BLUE, "o", "-"), "kan_up": ("black", "v", "-"), "kan_gate": (PURPLE, "^", ":"), "kan_down": (VERMILLION, "s", "--")}


def plot_overview(model: nn.Module, stats: Mapping[str, LayerStats], *, top: int = 48, scores: Mapping[str, Mapping[str, MapScores]] | None = None) -> Figure:
    """Draws four numbers per layer, a line per map.

    Nonlinearity and movement are means over the map's functions weighted by score, see `MapScores`.

    Args:
        model, stats: what `collect` ran and returned.
        top: how many functions the last panel sums up, >= 1.
        scores: what `score_layer(..., top=...)` with at least this `top` gave per path, when it is there already.
    """
    if top < 1:
        raise ConfigError("plot an overview", got=f"top={top}", expected="at least 1")
    if scores is None:
        scores = {path: score_layer(model, stats, layer=path, top=top) for path in stats}
    empty = sum(not scores[path] for path in stats)
    if empty == len(stats):
        return message_figure("Learned functions, layer by layer", f"nothing to draw: none of the {empty} blocks has learned functions that data reached")
    figure = Figure(figsize=(11.5, 7.2))
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.975, top=0.80, bottom=0.085, hspace=0.30, wspace=0.17)
    values = (
        ("nonlinearity: 1 - R² of a straight line", "variance-weighted mean", lambda one: one.mean_nonlinearity, False),
        ("moved from the start: Var(spline) / (Var(spline) + Var(base))", "variance-weighted mean", lambda one: one.mean_learned, True),
        ("inputs outside the grid", "fraction of all inputs", lambda one: one.mean_outside, True),
        (f"summed edge variance in the top {top}", "share", lambda one: float(one.head(top).share.sum()), True),
    )
    for axes, (title, label, value, in_percent) in zip(panels.flat, values, strict=True):
        _panel(axes, list(stats), scores, value)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_ylabel(label, fontsize=9.5)
        if in_percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    for axes in panels[1]:
        axes.set_xlabel("block, numbered in the order of the model", fontsize=9.5)
    _heading(figure, panels[0, 0], stats, empty)
    return figure


def _panel(axes, paths: list[str], scores: Mapping[str, Mapping[str, MapScores]], value) -> None:
    highest = 0.0
    for name, (colour, marker, line) in _STYLES.items():
        y = [value(scores[path][name]) if name in scores[path] else math.nan for path in paths]
        seen = [one for one in y if not math.isnan(one)]
        if seen:
            label = "hidden functions" if name == "kan_functions" else name.removeprefix("kan_") + " map"
            axes.plot(range(len(y)), y, color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.4, label=label, clip_on=False, zorder=3)
            highest = max(highest, *seen)
    axes.set(xlim=(-0.5, len(paths) - 0.5), ylim=(0, 1.15 * highest if highest > 0 else 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, labelbottom=True)


def _heading(figure: Figure, axes, stats: Mapping[str, LayerStats], empty: int) -> None:
    tokens = max(one.tokens for one in stats.values())
    first, last = next(iter(stats)), list(stats)[-1]
    where = f"{len(stats)} blocks, 0: {first or '(the model itself)'}" + (f" … {len(stats) - 1}: {last}" if len(stats) > 1 else "")
    line = f"{where}; up to {tokens:,} tokens per block" + (f"; {empty} without learned functions or data left out" if empty else "")
    figure.text(0.03, 0.975, "Learned functions, layer by layer", fontsize=13, fontweight="bold", va="top")
    figure.text(0.03, 0.93, line, fontsize=9, va="top")
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.03, 0.905), "borderpad": 0, "borderaxespad": 0}
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, frameon=False, fontsize=9, **place)
