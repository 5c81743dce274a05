"""The numbers that stand above every figure and report: how much of the original the patched model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches
from kanformer.errors import DataError
from kanformer.interpret.collect import collect
from kanformer.interpret.collecting.losses import Objective, UserLoss
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.truth.hold import Positions, all_held
from kanformer.ops import use_backend


@dataclass(frozen=True)
class Faithfulness:
    """Losses per predicted token (or what the loss is a mean over), all on the same data; None where there is no such model.

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


def faithfulness(
    model: nn.Module,
    batches: Iterable[Mapping],
    *,
    original: nn.Module | None = None,
    stats: ModelStats | None = None,
    loss: UserLoss | None = None,
    name: str = "",
) -> Faithfulness:
    """Measures the header's numbers.

    Args:
        model: a patched model. batches: kept as a list.
        original: the model that was patched; of an encoder without a head the movement is then away from its hidden states, else from `model`'s.
        stats: where the means come from, see `collect`; None gathers them from these batches.
        loss: see `Objective`. name: of the data.
    """
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if stats is None:
        stats = collect(model, batches, 2**62, scores=("std",))
    tally = _Tally(model, original, stats, loss)
    with use_backend("eager"):
        processes.together("measure the losses", lambda: tally.run(batches))
    return tally.result(name or stats.data.name)


class _Tally:
    """Sums over batches."""

    def __init__(self, model: nn.Module, original: nn.Module | None, stats: ModelStats, loss: UserLoss | None) -> None:
        self.model, self.original, self.stats, self.objective = model, original, stats, Objective(model, loss)
        self.positions = Positions(stats.data.skip_first_token)
        self.sums = torch.zeros(7, dtype=torch.float64)  # losses of patched, ablated, original; counts, tokens, sequences, batches

    @torch.no_grad()
    def run(self, batches: list[Mapping]) -> None:
        for batch in batches:
            found: dict[str, Any] = {}

            def look(key: str, found: dict = found) -> Callable:
                return lambda outputs, given: found.update({key: outputs, "inputs": given})

            run_batches(self.model, [batch], look=look("patched"))
            inputs = found["inputs"]
            self.positions.start(inputs)
            with all_held(self.model, self.stats, self.positions):
                run_batches(self.model, [inputs], look=look("ablated"))
            if self.original is not None:
                run_batches(self.original, [batch], look=look("original"))
            reference = found.get("original", found["patched"])
            measured = [self.objective(found[key], inputs, reference) if key in found else None for key in ("patched", "ablated", "original")]
            losses = [0.0 if one is None else float(one.total) for one in measured]
            assert measured[0] is not None
            self.sums += torch.tensor([*losses, measured[0].count, *_size(inputs), 1.0], dtype=torch.float64)

    def result(self, name: str) -> Faithfulness:
        patched, ablated, original, scored, tokens, sequences, batches = processes.reduced(self.sums).tolist()
        if not scored:
            raise DataError("measure the losses", got="nothing to predict", expected="batches with sequences of two tokens or more, or labels")
        before = original / scored if self.original is not None else None
        numbers = {"loss_name": self.objective.name, "data": name, "tokens": int(tokens), "sequences": int(sequences), "batches": int(batches)}
        return Faithfulness(patched / scored, ablated / scored, before, scored=scored, **numbers)


def _size(inputs: Mapping[str, Any]) -> tuple[float, float]:
    """(tokens that are no padding, sequences) of a batch."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    source = mask if isinstance(mask, torch.Tensor) else ids
    if not isinstance(source, torch.Tensor):
        first = next((value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()), None)
        return (0.0, float(len(first))) if first is not None else (0.0, 0.0)
    return float((mask != 0).sum() if isinstance(mask, torch.Tensor) else source.numel()), float(len(source))
