"""The mean loss of a model over fixed batches, measured as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches
from kanformer.errors import DataError
from kanformer.interpret.collecting.losses import Objective, UserLoss


class MeanLoss:
    """`Objective` over batches, each counted by what it scores; with several processes over those of all of them.

    Args:
        batches: mappings of model inputs; a single mapping is one batch. loss: see `Objective`.

    Raises:
        DataError: no batches, or something else than mappings.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], loss: UserLoss | None = None) -> None:
        self.batches: list[Any] = [batches] if isinstance(batches, Mapping) else list(batches)
        if not self.batches or not all(isinstance(batch, Mapping) for batch in self.batches):
            raise DataError("measure the loss", got="no batches" if not self.batches else "batches that are no mappings", expected="mappings of model inputs")
        self.objective = Objective(model, loss)

    @property
    def name(self) -> str:
        """What was measured, see `Objective`."""
        return self.objective.name

    def __call__(self, model: nn.Module, original: Callable[[], AbstractContextManager]) -> float:
        """The loss of the model as it is; within `original()` it is as it was, which movements are measured from.

        Raises:
            DataError: a batch that the model does not take, no loss to be made of it, or one that is not finite.
        """
        sums = torch.zeros(2, dtype=torch.float64)

        def look(outputs: Any, inputs: dict[str, Any]) -> None:
            found = {"reference": outputs}
            if self.objective.needs_reference(outputs, inputs):
                with original():
                    run_batches(model, [inputs], look=lambda before, _: found.update(reference=before))
            measured = self.objective(outputs, inputs, found["reference"])
            sums.add_(torch.tensor([float(measured.total), measured.count], dtype=torch.float64))

        processes.together("measure the loss", lambda: run_batches(model, self.batches, look=look))
        total, count = processes.reduced(sums).tolist()
        if not count:
            raise DataError("measure the loss", got="nothing to predict", expected="batches with sequences of two tokens or more, or labels")
        return total / count
