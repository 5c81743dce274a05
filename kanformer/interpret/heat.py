"""A map's scores small enough to look at: the largest score of each block of edges, so that a single strong edge survives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.errors import ShapeError


@dataclass(frozen=True)
class Heat:
    """The largest of every block of `tall` outputs by `wide` inputs.

    Attributes:
        values: (rows, columns). output, input: (rows, columns) int64, which edge that is.
        total: (rows, columns) sums of the blocks.
    """

    values: Tensor
    output: Tensor
    input: Tensor
    total: Tensor
    tall: int
    wide: int


def block_max(scores: Tensor, rows: int = 96, columns: int = 192) -> Heat:
    """Scores (outputs, inputs) in at most so many rows and columns; what is not finite counts as the least.

    Raises:
        ShapeError: no matrix.
    """
    if scores.dim() != 2 or not scores.numel() or rows < 1 or columns < 1:
        raise ShapeError("make a heat map", got=f"scores {tuple(scores.shape)} for {rows} x {columns}", expected="(outputs, inputs), at least one of each")
    scores = torch.where(scores.isfinite(), scores, torch.full_like(scores, -torch.inf))
    outputs, inputs = scores.shape
    tall, wide = -(-outputs // rows), -(-inputs // columns)
    padded = F.pad(scores, (0, -inputs % wide, 0, -outputs % tall), value=-torch.inf)
    blocks = padded.unflatten(0, (-1, tall)).unflatten(2, (-1, wide)).transpose(1, 2).flatten(2)
    best = blocks.max(2)
    row = torch.arange(best.indices.shape[0]).unsqueeze(1) * tall + best.indices // wide
    column = torch.arange(best.indices.shape[1]) * wide + best.indices % wide
    return Heat(best.values, row, column, torch.where(blocks.isfinite(), blocks, 0).sum(2), tall, wide)
