"""All edges of a map in one picture: block maxima of a score, outputs by inputs."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.drawing.canvas import canvas
from kanformer.interpret.heat import block_max
from kanformer.interpret.scoring.edges import DESCRIPTIONS
from kanformer.interpret.words import number


def plot_importance(stats: ModelStats, layer: str | int = -1, *, map: str | None = None, by: str | None = None, rows: int = 96, columns: int = 192) -> Figure:
    """Draws the score of every edge of a map as the maximum of blocks of edges, on a logarithmic scale; what is 0 or less is drawn as the least.

    Args:
        stats: what `collect` returned, with scores of all edges. layer, map: None means the last map. by: see `Scores.rank_by`.
        rows, columns: at most so many blocks.

    Raises:
        ConfigError: no such layer, map or score, or scores of the first edges only.
    """
    seen = stats.layer(layer)
    if not seen.scores:
        raise ConfigError("draw an importance map", subject=seen.path, got="no scores of edges", hint="collect(model, batches, scores=('effect',)).")
    name = map or list(seen.scores)[-1]
    if name not in seen.scores:
        raise ConfigError("draw an importance map", subject=seen.path, got=f"map={name!r}", expected=f"one of {', '.join(seen.scores)}")
    one = seen.scores[name]
    if one.index is not None:
        raise ConfigError("draw an importance map", subject=seen.path, got="scores of the first edges only", hint="Collect without top=.")
    by = one.rank_by(by)
    values = one.values[by]
    heat = block_max(values, rows, columns)
    positive = heat.values[heat.values > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1e-12, 1.0)
    low = max(low, high * 1e-6)
    best = int(values.nan_to_num().argmax())
    lines = [
        f"{by}: {DESCRIPTIONS[by]}; each cell is the largest of {heat.tall} outputs x {heat.wide} inputs",
        f"{values.numel():,} edges, {int((values <= 0).sum()):,} of them at 0 or below; "
        f"largest: input {best % values.shape[1]} -> output {best // values.shape[1]}, {number(float(values.max()))}",
    ]
    height = min(7.5, max(3.6, 1.6 + 9 * heat.values.shape[0] / heat.values.shape[1]))
    figure, top = canvas(10, height, f"{seen.path or '(the model itself)'}: importance of the {name.removeprefix('kan_')} map's edges", lines)
    axes = figure.add_axes((0.08, 0.62 / height, 0.80, top - 0.75 / height))
    shown = heat.values.clamp(min=low).numpy()
    extent = (0, heat.values.shape[1] * heat.wide, heat.values.shape[0] * heat.tall, 0)
    image = axes.imshow(np.asarray(shown), cmap="cividis", norm=LogNorm(low, max(high, low * 10)), aspect="auto", interpolation="nearest", extent=extent)
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))
    axes.set_xlabel("input channel", fontsize=9)
    axes.set_ylabel("output channel", fontsize=9)
    axes.tick_params(labelsize=8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.90, 0.62 / height, 0.018, top - 0.75 / height)))
    bar.ax.tick_params(labelsize=8)
    return figure
