"""Whether a ranking is to be trusted: predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.losses import UserLoss
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.scoring.table import Scores
from kanformer.interpret.truth.ablate import Ablations, ablate
from kanformer.interpret.truth.hold import Target
from kanformer.interpret.truth.ranks import ranks, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TruthCheck:
    """Scores of some edges or functions beside their measured mean ablation. Tensors are float64 (n,).

    Attributes:
        by: the score. predicted: its values. measured: what `ablate` found.
        chosen: whether it is one of the first k by the score; the others are drawn at random from the rest.
        values: all collected scores of the same targets, by name.
    """

    by: str
    predicted: Tensor
    measured: Ablations
    chosen: Tensor
    values: dict[str, Tensor]

    @property
    def spearman(self) -> float:
        """Of the score with the measured change, over all of them."""
        return spearman(self.predicted, self.measured.change)

    def correlations(self) -> dict[str, dict[str, float]]:
        """Spearman of every collected score: "all", "top" (the first k) and "random" (the sample)."""
        parts = {"all": torch.ones_like(self.chosen), "top": self.chosen, "random": ~self.chosen}
        change = self.measured.change
        return {name: {part: spearman(value[rows], change[rows]) for part, rows in parts.items()} for name, value in self.values.items()}

    @property
    def misplaced(self) -> Tensor:
        """(n,) where predicted and measured ranks differ by more than a tenth of n."""
        return (ranks(self.predicted) - ranks(self.measured.change)).abs() > 0.1 * len(self.predicted)

    @property
    def resolved(self) -> Tensor:
        """(n,) where the measured change is more than two standard errors from zero."""
        return self.measured.change.abs() > 2 * self.measured.error

    def plot(self) -> Figure:
        """A figure, predicted against measured."""
        from kanformer.interpret.truth.figure import plot_truth

        return plot_truth(self)

    def __str__(self) -> str:
        found = self.correlations()[self.by]
        parts = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        count = len(self.predicted)
        return (
            f"Spearman of {self.by} with measured mean ablation: {parts} ({count} targets, {int(self.resolved.sum())} of them beyond two standard errors, "
            f"{int(self.misplaced.sum())} more than {count // 10} ranks off)"
        )


def truth_check(
    model: nn.Module,
    batches: Iterable[Mapping],
    stats: ModelStats,
    *,
    k: int = 50,
    random: int = 50,
    by: str | None = None,
    functions: bool = False,
    loss: UserLoss | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TruthCheck:
    """Measures the mean ablation of the first k edges of the model and of a random sample of the rest.

    Args:
        model, stats: a patched model and what `collect` returned for it, with scores.
        batches: on which the ablation is measured: those of `collect`, or other text to see whether the ranking holds there.
        k, random: how many of either kind. by: see `Scores.rank_by`. functions: whole shared functions instead of edges.
        loss: as for `collect`. seed: of the sample.
    """
    if k < 0 or random < 0 or k + random < 2:
        raise ConfigError("check a ranking", got=f"k={k}, random={random}", expected="at least two in all")
    tables = [one for layer in stats.values() for one in (layer.functions if functions else layer.scores).values() if len(one)]
    rows = list(stats.top(k, by, functions)) if k else []
    by = tables[0].rank_by(by) if tables else stats.top(1, by, functions).by
    known = {_key(row) for row in rows}
    drawn = [row for row in _sample(tables, random + len(known), seed) if _key(row) not in known][:random]
    every = rows + drawn
    targets = [Target(row["layer"], row["map"], row["output"], row["input"]) for row in every]
    measured = ablate(model, batches, targets, stats=stats, loss=loss, progress=progress)
    names = [name for name in tables[0].values if all(name in one.values for one in tables)]
    values = {name: torch.tensor([row[name] for row in every], dtype=torch.float64) for name in names}
    return TruthCheck(by, values[by], measured, torch.arange(len(every)) < len(rows), values)


def _sample(tables: list[Scores], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows drawn evenly from all edges of all maps, each once."""
    sizes = torch.tensor([len(one) for one in tables])
    total, generator = int(sizes.sum()), torch.Generator().manual_seed(seed)
    if count >= total:
        places = torch.randperm(total, generator=generator)
    else:
        places = torch.randint(0, total, (4 * count + 64,), generator=generator).unique()
        places = places[torch.randperm(len(places), generator=generator)][:count]
    ends = sizes.cumsum(0)
    rows = []
    for place in places.tolist():
        which = int(torch.searchsorted(ends, place, right=True))
        one = tables[which]
        found = one.at(torch.tensor([place - int(ends[which]) + int(sizes[which])]))
        rows.append({"layer": one.path, "map": one.map, **{name: value.tolist()[0] for name, value in found.items()}})
    return rows


def _key(row: Mapping[str, Any]) -> tuple:
    return row["layer"], row["map"], row["output"], row["input"]
