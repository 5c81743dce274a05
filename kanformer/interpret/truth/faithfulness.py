"""Measuring the header: the losses of a model, of what it was, and of what was made of it, on the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches
from kanformer.errors import DataError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collect import collect
from kanformer.interpret.collecting.losses import Objective, UserLoss
from kanformer.interpret.collecting.stats import DataUsed, ModelStats
from kanformer.interpret.truth.header import Faithfulness
from kanformer.interpret.truth.hold import Positions, all_held
from kanformer.ops import use_backend

__all__ = ["Faithfulness", "faithfulness"]


def faithfulness(
    model: nn.Module,
    batches: Iterable[Mapping],
    *,
    original: nn.Module | None = None,
    pruned: nn.Module | None = None,
    snapped: nn.Module | None = None,
    stats: ModelStats | None = None,
    loss: UserLoss | None = None,
    name: str = "",
) -> Faithfulness:
    """Measures the header's numbers.

    Args:
        model: a patched model. batches: kept as a list.
        original: the model that was patched; a movement (see `Objective`) is then away from its outputs, else from `model`'s.
        pruned, snapped: what was made of `model`.
        stats: where the means come from, see `collect`; None, and statistics of some layers only or without scores, gathers them from these batches.
        loss: see `Objective`. name: of the data.
    """
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if stats is None or not _knows_all(stats, model):
        known = stats.data if stats is not None else DataUsed()
        stats = collect(model, batches, 2**62, scores=("std",), skip_first_token=known.skip_first_token, name=known.name)
    others = {"original": original, "pruned": pruned, "snapped": snapped}
    tally = _Tally(model, {key: other for key, other in others.items() if other is not None}, stats, loss)
    with use_backend("eager"):
        processes.together("measure the losses", lambda: tally.run(batches))
    return tally.result(name or stats.data.name)


class _Tally:
    """Sums over batches."""

    def __init__(self, model: nn.Module, others: dict[str, nn.Module], stats: ModelStats, loss: UserLoss | None) -> None:
        self.model, self.others, self.stats, self.objective = model, others, stats, Objective(model, loss)
        self.positions = Positions(stats.data.skip_first_token)
        self.names = ("patched", "all_ablated", *others)
        self.sums = torch.zeros(len(self.names) + 4, dtype=torch.float64)  # losses; counts, tokens, sequences, batches

    @torch.no_grad()
    def run(self, batches: list[Mapping]) -> None:
        for batch in batches:
            found: dict[str, Any] = {}

            def look(key: str, found: dict = found) -> Callable:
                return lambda outputs, given: found.update({key: outputs, "inputs": given})

            for key, other in self.others.items():
                run_batches(other, [batch], look=look(key))
            run_batches(self.model, [batch], look=look("patched"))
            inputs = found["inputs"]
            self.positions.start(inputs)
            with all_held(self.model, self.stats, self.positions):
                run_batches(self.model, [inputs], look=look("all_ablated"))
            reference = found.get("original", found["patched"])
            measured = {key: self.objective(found[key], inputs, reference) for key in self.names}
            losses = [float(one.total) for one in measured.values()]
            self.sums += torch.tensor([*losses, measured["patched"].count, *_size(inputs), 1.0], dtype=torch.float64)

    def result(self, name: str) -> Faithfulness:
        *losses, scored, tokens, sequences, batches = processes.reduced(self.sums).tolist()
        if not scored:
            raise DataError("measure the losses", got="nothing to predict", expected="batches with sequences of two tokens or more, or labels")
        means: dict[str, Any] = {key: total / scored for key, total in zip(self.names, losses, strict=True)}
        numbers: dict[str, Any] = {"tokens": int(tokens), "sequences": int(sequences), "batches": int(batches)}
        return Faithfulness(**means, loss_name=self.objective.name, data=name, scored=scored, **numbers)


def _knows_all(stats: ModelStats, model: nn.Module) -> bool:
    """Whether there are means of every block that a token reached."""
    return set(find_blocks(model)) <= set(stats) and all("kan_down" in layer.outputs for layer in stats.values() if layer.tokens)


def _size(inputs: Mapping[str, Any]) -> tuple[float, float]:
    """(tokens that are no padding, sequences) of a batch."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    source = mask if isinstance(mask, torch.Tensor) else ids
    if not isinstance(source, torch.Tensor):
        first = next((value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()), None)
        return (0.0, float(len(first))) if first is not None else (0.0, 0.0)
    return float((mask != 0).sum() if isinstance(mask, torch.Tensor) else source.numel()), float(len(source))
