"""Differences to the baselines with their intervals."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kanformer.interpret.figures import BLUE, VERMILLION
from kanformer.pretraining.summary import Summary

_COLOURS = {"better": BLUE, "worse": VERMILLION}  # what is no difference is grey


def draw(found: list[Summary], corpus: str) -> Figure:
    """A panel per baseline, a line per arm and row: each seed's difference, their mean and its 95 % interval, in percent of the baseline's cross-entropy."""
    baselines = list(dict.fromkeys(each.entry.arm.baseline for each in found))
    parts = {name: [each for each in found if each.entry.arm.baseline == name and each.differences] for name in baselines}
    figure = Figure(figsize=(9.5, 1.6 + 0.3 * sum(max(1, len(part)) for part in parts.values()) + 0.6 * len(parts)))
    FigureCanvasAgg(figure)
    heights = [max(1, len(part)) + 0.6 for part in parts.values()]
    panels = figure.subplots(len(parts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, part) in zip(panels, parts.items(), strict=True):
        _panel(axes, name, part)
    panels[-1].set_xlabel("held-out cross-entropy over the baseline's with the same seed, difference in percent (left is better)", fontsize=9)
    figure.suptitle(f"From scratch on {corpus}: learned functions against the baseline, 95 % intervals over seeds", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def _panel(axes, baseline: str, part: list[Summary]) -> None:
    axes.set_title(f"against {baseline}", fontsize=10, loc="left")
    axes.axvline(0, color="black", linewidth=0.8)
    for place, each in enumerate(part):
        mean, half = each.percent
        values = [100 * value / each.base_losses[seed] for seed, value in each.differences.items()]
        axes.plot(values, [place] * len(values), "|", color="black", markersize=7)
        axes.errorbar([mean], [place], xerr=None if half is None else [[half], [half]], fmt="o", color=_COLOURS.get(each.verdict, "grey"), capsize=3)
    labels = [f"{each.entry.arm.name}, equal {each.entry.row}" + (" (same runs)" if each.entry.reuses else "") for each in part]
    axes.set_yticks(range(len(part)), labels, fontsize=8.5)
    axes.set_ylim(max(1, len(part)) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    if not part:
        axes.text(0.5, 0.5, "no finished runs to compare", ha="center", va="center", transform=axes.transAxes)
