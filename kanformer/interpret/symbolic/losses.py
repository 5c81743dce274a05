"""The loss that snapping is measured by: the model's own, the caller's, or how far the outputs move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import token_mask, untouched
from kanformer.errors import DataError, KanformerError

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
_IGNORED = -100


class Measure:
    """Mean loss of a model over fixed batches.

    Args:
        batches: mappings of model inputs; a single mapping is one batch. With labels the model's own loss counts, each batch weighted by its labels
            that are not -100; without, the mean squared change of the output relative to its mean square, padding left out.
        loss: (outputs, batch) -> number, instead; each batch counts alike.

    Raises:
        DataError: no batches, or something else than mappings.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> None:
        self.batches: list[Any] = [batches] if isinstance(batches, Mapping) else list(batches)
        self.loss = loss
        if not self.batches or not all(isinstance(batch, Mapping) for batch in self.batches):
            raise DataError("measure the loss", got="no batches" if not self.batches else "batches that are no mappings", expected="mappings of model inputs")
        labelled = all(isinstance(batch.get("labels"), Tensor) for batch in self.batches)
        self.name = "given" if loss else "the model's loss" if labelled else "relative squared change of the output"

    def __call__(self, model: nn.Module, original: Callable[[], AbstractContextManager]) -> float:
        """The loss of the model as it is; within `original()` it is as it was."""
        total = weight = 0.0
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with untouched(model):
            for number, batch in enumerate(self.batches, 1):
                inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                value, count = self._of_batch(model, inputs, original)
                if math.isnan(value):
                    raise DataError("measure the loss", subject=f"batch {number}", got="NaN", hint="Look at the model's outputs on this batch.")
                total, weight = total + value * count, weight + count
        return total / max(weight, 1e-300)

    def _of_batch(self, model: nn.Module, inputs: dict[str, Any], original) -> tuple[float, float]:
        outputs = _run(model, inputs)
        if self.loss is not None:
            return float(self.loss(outputs, inputs)), 1.0
        own = getattr(outputs, "loss", None)
        if own is not None:
            labels = inputs.get("labels")
            return float(own), float((labels != _IGNORED).sum()) if isinstance(labels, Tensor) else 1.0
        with original():
            reference = _rows(_run(model, inputs), inputs)
        change = (_rows(outputs, inputs) - reference).square().mean()
        return float(change / reference.square().mean().clamp(min=1e-300)), float(len(reference))


def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    try:
        return model(**inputs)
    except KanformerError:
        raise
    except (TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError("measure the loss", got=f"{type(model).__name__} does not take {sorted(inputs)} ({reason})") from error


def _rows(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """The first floating point output, (tokens, d) in float64, without padding."""
    values = [outputs] if isinstance(outputs, Tensor) else list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)
    found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim()), None)
    if found is None:
        raise DataError("measure the loss", got="no floating point output", hint="Give labels, or loss=.")
    mask = token_mask(found, batch)
    rows = found.reshape(-1, found.shape[-1])
    return (rows if mask is None else rows[mask]).double()
