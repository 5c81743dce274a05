"""The sentences on figures: numbers rounded for reading, what is shown and what is not."""

from __future__ import annotations

import math
import textwrap

from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.scores import MapScores


def number(value: float) -> str:
    """Two or three digits, as short as they can be."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 10_000 or size < 0.001:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"


def percent(fraction: float) -> str:
    """A share in per cent; never "0 %" or "100 %" for what is merely close."""
    value = 100 * fraction
    if value in (0, 100):
        return f"{value:.0f} %"
    if value > 99:
        return "> 99.99 %" if value > 99.99 else f"{value:.2f} %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:#.2g} %"


def map_title(stats: LayerStats, name: str) -> str:
    """The layer's path and which map of it."""
    where = stats.path or "(the model itself)"
    if stats.also_at:
        where += f" (used {len(stats.also_at) + 1} times)"
    what = "learned functions of the hidden channels" if name == "kan_functions" else f"edge functions of the {name.removeprefix('kan_')} map"
    return f"{where}: {what}"


def drawn_sentence(drawn: MapScores) -> str:
    """How much of the map's edge variance is drawn, and how much is not."""
    count, edges, shared = len(drawn), len(drawn) * drawn.edges_per_function, drawn.shared and drawn.edges_per_function > 1
    total = drawn.n_functions * drawn.edges_per_function
    what = f"{count:,} of {drawn.n_functions:,} functions ({edges:,} of {total:,} edges)" if shared else f"{count:,} of {drawn.n_functions:,} edges"
    if not drawn.total:
        return f"drawn: {what}; nothing varies in this data"
    text = f"drawn: {what}, {percent(1 - drawn.remainder)} of the summed edge variance"
    return text + (f"; the other {total - edges:,} edges: {percent(drawn.remainder)}" if total > edges else "")


def data_sentence(stats: LayerStats, drawn: MapScores) -> str:
    """On how much data the densities rest, and how much of it misses the grid."""
    return (
        f"data: {stats.tokens:,} tokens, {percent(drawn.mean_outside)} of all inputs outside the grid; "
        f"nonlinearity {drawn.mean_nonlinearity:.2f} (1 - R² of a straight line, variance-weighted)"
    )


def order_sentence(drawn: MapScores, single: bool, ends: tuple[float, float] | None, titled: bool) -> str:
    """How the cells are ordered, scaled (`ends` of a common y-scale, or None) and titled; `single`: each function has one channel."""
    scale = "each cell on a y-scale of its own" if ends is None else f"all cells on one y-scale, {number(ends[0])} to {number(ends[1])}"
    names = ("#channel" if single else "#group") if drawn.shared else "input→output"
    text = f"ordered by share, left to right, top to bottom; {scale}"
    return text + (f"; titles: {names} and share of the edge variance" if titled else "")


def fold(text: str, inches: float, size: float) -> str:
    """Text broken so that it fits a width at a font size in points."""
    return "\n".join(textwrap.wrap(text, max(20, int(inches * 72 / (0.52 * size)))))
