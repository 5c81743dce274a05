"""What the figures have in common: a canvas unknown to pyplot, a heading, plain axes."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kanformer.interpret import words


def canvas(width: float, height: float, title: str, lines: list[str]) -> tuple[Figure, float]:
    """A figure with its heading, and the height below it that is left, as a fraction."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.1 / height, words.fold(title, width - 0.4, 13), fontsize=12, fontweight="bold", va="top")
    used = 0.1 + 0.25 * (words.fold(title, width - 0.4, 13).count("\n") + 1)
    for line in lines:
        folded = words.fold(line, width - 0.4, 9)
        figure.text(0.02, 1 - used / height, folded, fontsize=9, va="top")
        used += 0.18 * (folded.count("\n") + 1)
    return figure, 1 - (used + 0.1) / height


def quiet(axes: Any) -> None:
    """Two spines, small labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
