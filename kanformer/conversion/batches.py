"""Feeding batches to a model without leaving a trace, and telling tokens from padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import DataError, KanformerError
from kanformer.layers.experts import rows_at_work


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags and random numbers come back as they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def run_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    current: dict[str, Any] | None = None,
    after: Callable[[int], bool] | None = None,
    look: Callable[[Any, dict[str, Any]], None] | None = None,
    gradients: bool = False,
) -> int:
    """Calls `model(**batch)` for every batch, see `untouched`.

    Args:
        batches: mappings of model inputs (tensors are moved to the model's device); a single mapping is one batch.
        current: filled with the batch at hand before each call, for hooks to read.
        after: called with the number of batches so far; True stops.
        look: called with the outputs and the inputs of each batch.
        gradients: whether they are recorded, in the call and in `look`.

    Returns:
        The number of batches.

    Raises:
        DataError: a batch is no mapping, or the model does not take it.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    number = 0
    with untouched(model):
        stream: Iterable[Any] = [batches] if isinstance(batches, Mapping) else batches
        for number, batch in enumerate(stream, 1):
            if not isinstance(batch, Mapping):
                raise DataError("run the model", subject=f"batch {number}", got=type(batch).__name__, expected="a mapping of model inputs such as input_ids")
            inputs: dict[str, Any] = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            if current is not None:
                current.clear()
                current.update(inputs)
            try:
                with torch.set_grad_enabled(gradients):  # for each batch: a generator of batches may have changed it
                    outputs = model(**inputs)
            except KanformerError:
                raise
            except (TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise DataError("run the model", subject=f"batch {number}", got=f"{type(model).__name__} does not take {sorted(inputs)} ({reason})") from error
            if look is not None:
                with torch.set_grad_enabled(gradients):
                    look(outputs, inputs)
            del outputs
            if after is not None and after(number):
                break
    return number


def token_mask(x: Tensor, batch: Mapping[str, Any], path: str = "") -> Tensor | None:
    """Which of the flattened positions of activations x (..., d) are no padding, (tokens,), or None when no mask speaks about them.

    The mask is the batch's `attention_mask`, inside a decoder that has its own input its `decoder_attention_mask`, where its shape fits;
    within an expert, of the tokens that the router gave to it.
    """
    decoder = "decoder" in path.split(".") and ("decoder_input_ids" in batch or "decoder_attention_mask" in batch)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    flat, expert = (mask != 0).reshape(-1).to(x.device), rows_at_work()
    if expert is not None:
        rows, tokens = expert
        return flat[rows] if tokens == mask.numel() else None
    fits = x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel())
    return flat if fits else None


def select_tokens(x: Tensor, batch: Mapping[str, Any], path: str = "") -> Tensor:
    """The rows of activations x (..., d) that are not padding, (tokens, d)."""
    mask = token_mask(x, batch, path)
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask]
