"""The functions that changed most between two models, both curves in one cell."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from kanformer.errors import ConfigError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.curves import pick
from kanformer.interpret.differences import Diff
from kanformer.interpret.drawing.canvas import canvas, quiet
from kanformer.interpret.drawing.nodes import draw_density
from kanformer.interpret.figures import BLUE, VERMILLION
from kanformer.interpret.scoring.table import top_of
from kanformer.interpret.words import number

_POINTS = 121


def plot_changes(model: nn.Module, other: nn.Module, stats: ModelStats, diff: Diff, *, top: int = 24, names: tuple[str, str] = ("first", "second")) -> Figure:
    """Draws the learned functions with the largest distance, over the first model's data; the first model's curve solid, the second's dashed.

    Args:
        diff: what `compare_functions(model, other, stats)` returned. names: of the models.

    Raises:
        ConfigError: top < 1, or no learned functions.
    """
    curves = [one for maps in diff.maps.values() for name, one in maps.items() if name in stats[one.path].maps]
    if not curves or top < 1:
        raise ConfigError("draw what changed", got=f"{len(curves)} maps with learned functions, top={top}", expected="one at least")
    ranked = top_of(curves, top, "distance")
    rows, columns = -(-len(ranked) // 6), min(6, len(ranked))
    height = 1.25 + 1.5 * rows
    lines = [
        f"distance: rms difference over the data, means removed, relative to the node; drawn: the {len(ranked):,} largest of {ranked.total:,} functions",
        f"the other {ranked.total - len(ranked):,}: distance {number(ranked.remainder)} in all; {stats.data.tokens:,} tokens",
    ]
    figure, ceiling = canvas(2.15 * max(columns, 4), height, "What changed: the learned functions that moved most", lines)
    handles = [Line2D([], [], color=BLUE, label=names[0]), Line2D([], [], color=VERMILLION, linestyle=(0, (4, 2)), label=names[1])]
    figure.legend(handles=handles, loc="upper right", frameon=False, fontsize=8.5, ncols=2)
    grid = figure.add_gridspec(rows, columns, left=0.06, right=0.985, top=ceiling - 0.28 / height, bottom=0.3 / height, hspace=0.75, wspace=0.4)
    blocks = find_blocks(model), find_blocks(other)
    for place, row in enumerate(ranked):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        seen = stats[row["layer"]].maps[row["map"]]
        low, high = (float(seen.quantile(q)[row["input"]]) for q in (0.001, 0.999))
        margin = 0.04 * (high - low) or 1e-3
        for found, colour, style in zip(blocks, (BLUE, VERMILLION), ("-", (0, (4, 2))), strict=True):
            ends = None if row["output"] < 0 else torch.tensor([row["output"]])
            curve = pick(getattr(found[row["layer"]], row["map"]), torch.tensor([row["input"]]), ends)
            x = torch.linspace(low - margin, high + margin, _POINTS, dtype=curve.coef.dtype).unsqueeze(1)
            axes.plot(x[:, 0], curve.learned(x)[:, 0], color=colour, linestyle=style, linewidth=1.4)
        draw_density(axes, seen, row["input"], low - margin, high + margin)
        what = f"#{row['input']}" if row["output"] < 0 else f"{row['input']}→{row['output']}"
        axes.set_title(f"{list(stats).index(row['layer'])}: {what}  {number(row['distance'])}", fontsize=8, loc="left")
        axes.set_xlim(low - margin, high + margin)
        quiet(axes)
    return figure
