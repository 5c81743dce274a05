"""What pruning would do: the loss over the fraction of edges or channels taken out, before anything is changed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kanformer.conversion import processes
from kanformer.errors import ConfigError
from kanformer.interpret.collecting.losses import UserLoss
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.pruning.choose import Masks, masks_by_sparsity
from kanformer.interpret.pruning.edges import taken_out
from kanformer.interpret.pruning.neurons import as_masks, channels_by_sparsity
from kanformer.interpret.truth.ablate import Meter
from kanformer.interpret.truth.hold import Positions
from kanformer.ops import use_backend
from kanformer.surgery.folders import replace_file
from kanformer.surgery.tables import table

SCHEMA, VERSION = "kanformer.prune_curve", 1
POINTS = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
WHAT = ("edges", "neurons")


@dataclass(frozen=True)
class PruneCurve:
    """Rows of {"sparsity", "removed", "total", "change", "error"}: the measured change of the loss, per prediction, and its standard error.

    Attributes:
        loss, loss_name: of the model as it is. what: "edges" or "neurons" (edges of the down maps are counted then). data: name of the statistics' data.
    """

    rows: list[dict[str, float]]
    loss: float
    loss_name: str
    what: str
    data: str = ""

    def __str__(self) -> str:
        shown = [(f"{row['sparsity']:.4f}", f"{row['removed']:,.0f}", f"{row['change']:+.6g}", f"{row['error']:.2g}") for row in self.rows]
        text = table(("sparsity", "edges removed", "change of the loss", "error"), shown, right=range(4))
        return f"{self.loss_name} {self.loss:.6g} with all {self.what}\n{text}"

    def to_csv(self, path: str | Path | None = None) -> str:
        """CSV text, also written to `path`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return _written(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text with schema and version, also written to `path`."""
        head = {"schema": SCHEMA, "version": VERSION, "loss": self.loss, "loss_name": self.loss_name, "what": self.what, "data": self.data}
        return _written(json.dumps({**head, "rows": self.rows}) + "\n", path)

    def plot(self) -> Any:
        """A matplotlib figure with its own canvas."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=f"fraction of {self.what} taken out", ylabel=f"change of the loss\n({self.loss_name})")
        x, y, error = ([row[name] for row in self.rows] for name in ("sparsity", "change", "error"))
        axes.errorbar(x, y, yerr=error, marker="o", color="#0072B2", capsize=3)
        axes.axhline(0, color="#9A9A9A", linewidth=1)
        return figure


def prune_curve(
    model: nn.Module,
    stats: ModelStats,
    batches: Iterable[Mapping],
    *,
    points: Sequence[float] = POINTS,
    what: str = "edges",
    by: str | None = None,
    loss: UserLoss | None = None,
    progress: Callable[[str], None] | None = None,
) -> PruneCurve:
    """Measures several sparsities in one pass over the batches. The model is as it was afterwards.

    Args:
        stats: what `collect` returned, with scores of all edges. points: fractions, each in [0, 1]. by: the score, see `Scores.rank_by`.

    Raises:
        ConfigError: a wrong point or option. DataError: no batches, or nothing to predict in them.
    """
    if what not in WHAT:
        raise ConfigError("prune", got=f"what={what!r}", expected=" or ".join(WHAT))
    if not points or not all(0 <= point <= 1 for point in points):
        raise ConfigError("prune", got=f"points={list(points)}", expected="fractions from 0 to 1")
    masks = [masks_for(model, stats, what, by, point) for point in points]
    change, error, meter = measured(model, stats, batches, masks, loss, progress)
    rows = []
    for point, some, moved, spread in zip(points, masks, change, error, strict=True):
        removed = sum(int((~mask).sum()) for mask in some.values())
        rows.append({"sparsity": point, "removed": removed, "total": sum(mask.numel() for mask in some.values()), "change": moved, "error": spread})
    return PruneCurve(rows, meter.loss, meter.objective.name, what, stats.data.name)


def masks_for(model: nn.Module, stats: ModelStats, what: str, by: str | None, sparsity: float) -> Masks:
    """The edges that stay when this fraction of edges or units goes."""
    return masks_by_sparsity(stats, sparsity, by) if what == "edges" else as_masks(model, channels_by_sparsity(model, stats, sparsity, by))


def measured(
    model: nn.Module, stats: ModelStats, batches: Iterable[Mapping], masks: Sequence[Masks], loss: UserLoss | None, progress=None
) -> tuple[list[float], list[float], Meter]:
    """(changes of the loss, their standard errors, the meter with the loss before) with each of the masks' edges taken out."""
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    meter = Meter(model, loss, Positions(stats.data.skip_first_token))
    changes = [lambda some=some: taken_out(model, stats, some) for some in masks]
    with use_backend("eager"):
        processes.together("prune", lambda: meter.run(batches, changes, progress))
    change, error = meter.result()
    return change.tolist(), error.tolist(), meter


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        replace_file(Path(path), text)
    return text
