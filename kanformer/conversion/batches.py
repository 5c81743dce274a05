"""Feeding batches to a model without leaving a trace, and telling tokens from padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import DataError


@torch.no_grad()
def run_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]], current: dict[str, Any] | None = None) -> int:
    """Calls `model(**batch)` for every batch in eval mode; training flags and random state are put back.

    Args:
        batches: dicts of model inputs (tensors are moved to the model's device).
        current: filled with the batch at hand before each call, for hooks to read.

    Returns:
        The number of batches.

    Raises:
        DataError: a batch is no dict, or the model does not take it.
    """
    flags = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count = 0
    try:
        model.eval()
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise DataError("run a batch", got=type(batch).__name__, expected="a dict of model inputs such as {'input_ids': ..., 'attention_mask': ...}")
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            if current is not None:
                current.clear()
                current.update(inputs)
            try:
                model(**inputs)
            except (TypeError, IndexError) as error:
                raise DataError("run a batch", got=f"{type(model).__name__} does not take {sorted(inputs)} ({error})") from error
            count += 1
    finally:
        for module, training in flags.items():
            module.training = training
    return count


def select_tokens(x: Tensor, batch: Mapping[str, Any], path: str = "") -> Tensor:
    """The rows of activations x (..., d) that are not padding, (tokens, d).

    The mask is the batch's `attention_mask` (inside a decoder its `decoder_attention_mask`), where its shape fits.
    """
    decoder = "decoder_attention_mask" in batch and "decoder" in path
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == flat.shape[0]:
        return flat[mask.reshape(-1).to(device=x.device).bool()]
    return flat
