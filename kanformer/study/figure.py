"""The frontier as a picture: quality over parameters, and below it what the KAN gains over the pruned MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kanformer.study.report import LABELS
from kanformer.study.results import FORMATS, PRIMARY, StudyResult, ratios_of

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/
_STYLES = {
    "kan": ("#0072B2", "o"),
    "mlp": ("#D55E00", "s"),
    "random_mlp": ("#CC79A7", "^"),
    "linear": ("#5F5F5F", "D"),
    "kan_full": ("#009E73", "v"),
}
_GREY = "#5F5F5F"


def draw_frontier(found: StudyResult, goals: dict[float, float], path: Path) -> Path:
    """Draws a column per corpus and writes a PNG file; error bars are 95 % t-intervals over seeds.

    Cosines are drawn as their distance from 1 on a logarithmic scale, where arms that are exact have no place: a note says so.
    """
    corpora, paired = found.corpora, any(found.difference(ratio, 0, found.primary) for ratio in ratios_of(found.arms))
    rows = 2 if paired else 1
    figure = Figure(figsize=(4.8 * len(corpora) + 0.6, 3.9 + 2.3 * (rows - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(corpora), squeeze=False, sharex=True, height_ratios=[1.9, 1.0][:rows])
    for corpus in range(len(corpora)):
        _frontier(axes[0][corpus], found, goals if corpus == 0 else {}, corpus)
        if paired:
            _gain(axes[1][corpus], found, corpus)
        axes[-1][corpus].set_xlabel("parameters of the blocks / of the original's")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _frontier(axis: Any, found: StudyResult, goals: dict[float, float], corpus: int) -> None:
    metric, distance = found.primary, PRIMARY[found.primary] > 0
    exact = False
    for method, (colour, marker) in _STYLES.items():
        points = []
        for arm in sorted((arm for arm in found.arms if arm.method == method), key=lambda arm: arm.reached):
            each = arm.over_seeds(corpus, metric)
            if each is None:
                continue
            value = 1 - each.mean if distance else each.mean
            if distance and value < 1e-9:
                exact = True
                continue
            points.append((arm.reached, value, each.half or 0.0))
        if points:
            x, y, half = zip(*points, strict=True)
            lower = [min(h, 0.9 * v) if distance else h for h, v in zip(half, y, strict=True)]
            axis.errorbar(x, y, yerr=[lower, half], color=colour, marker=marker, markersize=5, linewidth=1.4, capsize=3, label=LABELS[method])
    for number, (ratio, goal) in enumerate(sorted(goals.items())):
        place, value = ratio, 1 - goal if distance else goal
        axis.plot([place], [value], marker="*", markersize=12, color="#F0E442", markeredgecolor="black", linestyle="none", label=None if number else "goal")
    teacher = found.teacher(corpus, metric)
    if distance:
        axis.set_yscale("log")
        axis.invert_yaxis()
    elif teacher is not None:
        axis.axhline(teacher, color=_GREY, linewidth=1, linestyle=(0, (4, 2)), label="original" if corpus == 0 else None)
    name, _, count = found.corpora[corpus]
    axis.set_title(f"{name}, {count:,} texts", fontsize=10, loc="left")
    text = FORMATS[metric][0]
    axis.set_ylabel(f"1 - {text}, better upwards" if distance else f"{text}, better downwards")
    if exact:
        axis.text(0.98, 0.03, "ratio 1 of KAN and pruned MLP: exact, no distance", transform=axis.transAxes, ha="right", fontsize=7.5, color=_GREY)
    _plain(axis)


def _gain(axis: Any, found: StudyResult, corpus: int) -> None:
    metric, points = found.primary, []
    for ratio in ratios_of(found.arms):
        each, arm = found.difference(ratio, corpus, metric), found.arm("kan", ratio)
        if each is not None and arm is not None:
            points.append((arm.reached, each.mean, each.half or 0.0, each.values))
    for x, mean, half, values in points:
        axis.errorbar([x], [mean], yerr=[half], color=_STYLES["kan"][0], marker="o", markersize=5, capsize=3, linewidth=1.4)
        axis.plot([x] * len(values), values, linestyle="none", marker="_", markersize=9, color=_GREY)
    axis.axhline(0.0, color=_GREY, linewidth=1)
    axis.set_ylabel(f"KAN - MLP\n(better {'upwards' if PRIMARY[metric] > 0 else 'downwards'})")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", color="#DEDEDE", linewidth=0.6)
    axis.set_axisbelow(True)
