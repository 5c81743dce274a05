"""Examples of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def pad(examples: Sequence[Sequence[int]], pad_id: int, round_to: int = 1, limit: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (examples, longest), with longest rounded up to a multiple of `round_to` but not above `limit`.

    Few different shapes keep the caches of compiled GEMMs small.
    """
    longest = max(len(example) for example in examples)
    rounded = -(-longest // round_to) * round_to
    longest = rounded if limit is None else max(longest, min(rounded, limit))
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example)
        mask[row, : len(example)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_token(tokenizer: Any) -> int:
    """The padding token's number; models without one are padded with the end-of-text token, which the mask hides."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
