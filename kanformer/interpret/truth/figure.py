"""Predicted against measured, as a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kanformer.interpret.figures import BLUE, GREY, VERMILLION
from kanformer.interpret.scoring.edges import DESCRIPTIONS
from kanformer.interpret.truth.check import TruthCheck


def plot_truth(check: TruthCheck) -> Figure:
    """Two panels: the values with the standard errors of what was measured, and the ranks; the first k as blue circles, the random sample as orange
    crosses, and in the ranks a ring around those that are off by more than a tenth."""
    from kanformer.interpret.truth.ranks import ranks

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measured, error = check.measured.change.numpy(), check.measured.error.nan_to_num(0.0).numpy()
    predicted, kinds = (
        check.predicted.numpy(),
        ((check.chosen.numpy(), "o", BLUE, "first by the score"), (~check.chosen.numpy(), "x", VERMILLION, "random sample")),
    )
    places = (ranks(check.predicted).numpy(), ranks(check.measured.change).numpy())
    marks: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    for rows, marker, colour, label in kinds:
        if not rows.any():
            continue
        left.errorbar(predicted[rows], measured[rows], yerr=error[rows], fmt=marker, color=colour, ecolor=colour, elinewidth=0.7, markersize=5, label=label)
        right.plot(places[0][rows], places[1][rows], marker=marker, color=colour, label=label, **marks)
    off = check.misplaced.numpy()
    right.plot(places[0][off], places[1][off], marker="o", markerfacecolor="none", color=GREY, linestyle="none", markersize=10, label="more than a tenth off")
    for axes, title, ends in ((left, "values", (min(predicted.min(), measured.min()), max(predicted.max(), measured.max()))), (right, "ranks", (1, len(off)))):
        if axes is right or check.by.startswith("effect"):
            axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", label="equal")
        axes.set_title(title, loc="left")
        axes.set_xlabel(f"{check.by}: {DESCRIPTIONS[check.by]}", wrap=True, fontsize=9)
        axes.set_ylabel(f"measured change of the loss ({check.measured.loss_name})", fontsize=9)
        axes.legend(fontsize=8)
    left.set_xscale("symlog", linthresh=_threshold(predicted))
    left.set_yscale("symlog", linthresh=_threshold(measured))
    figure.suptitle(f"{check}; {check.measured.units:,} sequences", fontsize=9, wrap=True)
    return figure


def _threshold(values) -> float:
    """Where a symmetric logarithmic scale turns straight: the tenth smallest part of the sizes."""
    sizes = sorted(abs(float(value)) for value in values if value)
    return sizes[len(sizes) // 10] if sizes else 1.0
