"""The numbers that stand above every figure, table and report: how much of the original the patched model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Faithfulness:
    """Losses per predicted token (or what the loss is a mean over), all on the same data; None where there is no such model.

    Statistics, tables and formulas carry it as `header`, and write it under that key.

    Attributes:
        patched, all_ablated: of the model, and of the model with every learned function at its mean.
        original, pruned, snapped: of the model before it was patched, and of what was made of it.
        loss_name: see `Objective`. data: name of the data. tokens: that are no padding. scored: what the losses are means over. sequences, batches.
    """

    patched: float
    all_ablated: float
    original: float | None = None
    pruned: float | None = None
    snapped: float | None = None
    loss_name: str = ""
    data: str = ""
    tokens: int = 0
    scored: float = 0.0
    sequences: int = 0
    batches: int = 0

    def recovered(self, loss: float | None = None) -> float | None:
        """(all_ablated - loss) / (all_ablated - original) of a loss, None means the patched model's: 1 is the original, 0 no functions at all.

        None without an original, or where ablating everything costs nothing. Source: Bricken et al. 2023, Towards monosemanticity.
        """
        if self.original is None or self.all_ablated <= self.original:
            return None
        return (self.all_ablated - (self.patched if loss is None else loss)) / (self.all_ablated - self.original)

    def replace(self, **losses: Any) -> Faithfulness:
        """The same with other numbers, for example pruned=."""
        return dataclasses.replace(self, **losses)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and `recovered` of each loss that there is."""
        names = [name for name in ("patched", "pruned", "snapped") if getattr(self, name) is not None]
        return {**dataclasses.asdict(self), "recovered": {name: self.recovered(getattr(self, name)) for name in names}}

    def __str__(self) -> str:
        losses = [(name.replace("_", " "), getattr(self, name)) for name in ("original", "patched", "pruned", "snapped", "all_ablated")]
        text = ", ".join(f"{name} {value:.6g}" for name, value in losses if value is not None)
        share = self.recovered()
        recovered = "" if share is None else f"; loss recovered {share:.4f}"
        where = f"{self.data}: " if self.data else ""
        return f"{self.loss_name}: {text}{recovered} ({where}{self.tokens:,} tokens in {self.sequences:,} sequences, {self.batches:,} batches)"
