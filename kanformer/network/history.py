"""What a fit did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Numbers per step.

    Attributes:
        rows: a dict per recorded step: step, loss (what was minimised), train_rmse (or train_accuracy), val_rmse where there are validation data,
            penalty, and the metrics that were asked for.
        best_step: the step whose state the network has now. metric: what "best" was decided by.
        stopped: why the fit ended: "steps", "patience", "converged", "diverged".
        notes: what the reader should know, such as a change of optimizer.
    """

    metric: str = "train_rmse"
    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str = "steps"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def best(self) -> dict[str, float]:
        """The row of the best step."""
        return next(row for row in self.rows if row["step"] == self.best_step)

    def __getitem__(self, name: str) -> list[float]:
        """A column."""
        return [row[name] for row in self.rows]

    def __str__(self) -> str:
        from kanformer.surgery.tables import table

        shown = sorted(
            {
                *range(0, len(self.rows), max(1, len(self.rows) // 8)),
                len(self.rows) - 1,
                *(i for i, row in enumerate(self.rows) if row["step"] == self.best_step),
            }
        )
        names = list(self.rows[0]) if self.rows else []
        rows = [[f"{self.rows[i][name]:.0f}" if name == "step" else f"{self.rows[i][name]:.4g}" for name in names] for i in shown if 0 <= i < len(self.rows)]
        text = table(names, rows, right=range(len(names)))
        ended = (
            f"ended after step {self.rows[-1]['step']:.0f} ({self.stopped}); kept: step {self.best_step}, the best by {self.metric}" if self.rows else "no step"
        )
        return "\n".join([text, ended, *self.notes])

    def plot(self) -> Any:
        """A matplotlib figure of the errors over steps, on a logarithmic scale."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="error")
        names = [name for name in (self.rows[0] if self.rows else ()) if name.endswith(("rmse", "loss"))]
        for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
            axes.plot(self["step"], self[name], style, label=name)
        axes.axvline(self.best_step, color="#9A9A9A", linewidth=1, label="kept")
        if any(value > 0 for name in names for value in self[name]):
            axes.set_yscale("log")
        axes.legend(frameon=False)
        return figure
