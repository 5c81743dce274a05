"""Where transformers keeps the loss of a model, and how its Trainer cuts a step into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in a model's output, if it has one."""
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) and output else None
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The output of a model that has a loss, with another one."""
    if isinstance(output, MutableMapping):
        output["loss"] = loss
        return output
    return (loss, *output[1:])


def micro_batches(arguments: Any, state: Any, dataloader: Any) -> int:
    """Into how many micro-batches the step after `state.global_step` falls: fewer than `gradient_accumulation_steps` where an epoch ends."""
    accumulation = arguments.gradient_accumulation_steps
    try:
        batches = len(dataloader)
    except TypeError:  # a stream
        return accumulation
    steps = -(-batches // accumulation)
    last = state.global_step % steps == steps - 1
    return (batches % accumulation or accumulation) if last else accumulation
