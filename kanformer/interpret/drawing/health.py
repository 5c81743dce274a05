"""How much of every layer is really nonlinear, and how much of it is dead."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.stats import LayerStats, ModelStats
from kanformer.interpret.drawing.canvas import canvas, quiet
from kanformer.interpret.figures import BLUE, DARK, SKY, VERMILLION
from kanformer.interpret.symbolic.fits import OUTCOMES, SymbolicFits

DEAD = 1e-3  # of its output's standard deviation: an edge that varies less than this is dead
_BINS = 20
_NEEDED = "collect(model, batches, scores=('std', 'nonlinearity'))."
_COLOURS = dict(zip(OUTCOMES, (DARK, SKY, BLUE, "#E69F00", VERMILLION), strict=True))


def dead_edges(layer: LayerStats, name: str) -> Tensor:
    """(outputs, inputs) bool: edges whose standard deviation is below 1e-3 of their output's.

    Raises:
        ConfigError: `std` of all edges was not collected.
    """
    one, output = layer.scores.get(name), layer.outputs.get(name)
    if one is None or output is None or "std" not in one.values or one.index is not None:
        raise ConfigError(
            "look for dead edges", subject=f"{layer.path}, {name}", got="no std of all edges", hint="collect(model, batches, scores=('std', 'nonlinearity'))."
        )
    return one.values["std"].double() <= DEAD * output.variance.sqrt().unsqueeze(1)


def plot_health(stats: ModelStats, fits: SymbolicFits | None = None) -> Figure:
    """A row per layer and map: histogram of its edges' nonlinearity, fractions of dead edges, inputs and outputs, and with `fits` the outcomes of its formulas.

    Raises:
        ConfigError: `std` and `nonlinearity` of all edges were not collected.
    """
    maps = [(layer, name) for layer in stats.values() for name in layer.scores]
    if not maps or any("nonlinearity" not in layer.scores[name].values for layer, name in maps):
        raise ConfigError("draw the health of the layers", got="no nonlinearity of edges", hint=_NEEDED)
    columns, height = (3 if fits else 2), 1.5 + 0.95 * len(maps)
    lines = [
        "nonlinearity: 1 - R² of the best straight line under the data; edges counted (blue), and weighted by their variance (orange outline)",
        f"dead: standard deviation below {DEAD:g} of the output's; an input is dead if all its edges are, an output likewise",
    ]
    figure, top = canvas(
        4.2 * columns + 1.4, height, f"{stats.model or 'model'}: how much is nonlinear, how much is dead ({stats.data.tokens:,} tokens)", lines
    )
    grid = figure.add_gridspec(len(maps), columns, left=0.16, right=0.98, top=top - 0.25 / height, bottom=0.5 / height, hspace=0.55, wspace=0.24)
    for row, (layer, name) in enumerate(maps):
        last = row == len(maps) - 1
        axes = figure.add_subplot(grid[row, 0])
        _histogram(axes, layer, name, last)
        axes.set_ylabel(f"{_short(layer.path)}\n{name.removeprefix('kan_')}", fontsize=8, rotation=0, ha="right", va="center")
        _dead(figure.add_subplot(grid[row, 1]), layer, name, last)
        if fits:
            _outcomes(figure.add_subplot(grid[row, 2]), fits, layer.path, name, row == 0)
    return figure


def _short(path: str) -> str:
    return path if len(path) <= 24 else "…" + path[-23:]


def _histogram(axes, layer: LayerStats, name: str, last: bool) -> None:
    one = layer.scores[name].values
    value, weight = one["nonlinearity"].double().flatten().clamp(0, 1), one["std"].double().flatten().square()
    counts = torch.histc(value, _BINS, 0, 1)
    places = (value * _BINS).long().clamp(max=_BINS - 1)
    weighted = torch.zeros(_BINS, dtype=torch.float64).index_add(0, places, weight)
    edges = np.linspace(0, 1, _BINS + 1)
    axes.stairs((counts / counts.sum().clamp(min=1)).numpy(), edges, fill=True, color=BLUE, alpha=0.75)
    axes.stairs((weighted / weighted.sum().clamp(min=1e-300)).numpy(), edges, color=VERMILLION, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.locator_params(axis="y", nbins=2)
    quiet(axes)
    if last:
        axes.set_xlabel("nonlinearity", fontsize=9)


def _dead(axes, layer: LayerStats, name: str, last: bool) -> None:
    dead = dead_edges(layer, name)
    shares = [float(dead.double().mean()), float(dead.all(0).double().mean()), float(dead.all(1).double().mean())]
    axes.barh(range(3), shares, color=[VERMILLION, BLUE, DARK], height=0.7)
    for place, share in enumerate(shares):
        axes.text(min(share, 0.86) + 0.01, place, f"{100 * share:.3g} %", va="center", fontsize=7.5)
    axes.set(xlim=(0, 1), ylim=(2.6, -0.6), yticks=range(3))
    axes.set_yticklabels(["edges", "inputs", "outputs"])
    quiet(axes)
    if last:
        axes.set_xlabel("fraction that is dead", fontsize=9)


def _outcomes(axes, fits: SymbolicFits, path: str, name: str, first: bool) -> None:
    maps = fits.get(path, {})
    found = maps.get(name) or (maps.get("kan_functions") if name == "kan_down" else None)
    quiet(axes)
    axes.set(xlim=(0, 1), yticks=[])
    if found is None:
        axes.text(0.5, 0.5, "not fitted", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        return
    start, counts = 0.0, found.counts()
    for outcome in OUTCOMES:
        share = counts[outcome] / max(1, len(found))
        axes.barh(0, share, left=start, color=_COLOURS[outcome], label=outcome, height=0.6)
        start += share
    if first:
        axes.legend(ncols=3, fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0)
