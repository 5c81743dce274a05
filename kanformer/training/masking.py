"""Masked language modelling: which tokens are hidden, and what stands in their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of what is not predicted


def mask_tokens(tokenizer: Any, ids: Tensor, labels: Tensor, probability: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(inputs, labels) by BERT's masking: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        ids: (texts, length). labels: the same, `IGNORED` where there is padding; special tokens are never chosen.
        probability: of a token to be chosen.
        generator: of the choices; None is the global random state.
    """
    special = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokenizer.all_special_ids:
        special |= ids == token
    chosen = (torch.rand(ids.shape, generator=generator) < probability) & ~special & (labels != IGNORED)
    dice = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(tokenizer), ids.shape, generator=generator)
    masked = torch.where(chosen & (dice < 0.8), tokenizer.mask_token_id, ids)
    masked = torch.where(chosen & (dice >= 0.8) & (dice < 0.9), noise, masked)
    return masked, labels.masked_fill(~chosen, IGNORED)
