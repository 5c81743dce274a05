"""Where a row of activations stands in the batch, which rows count, and the token ids that were seen."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kanformer.layers.experts import rows_at_work

SPAN = 128  # tokens of a sequence that are looked at together


@dataclass(frozen=True)
class TokenGrid:
    """One batch as a grid of (sequences, length) positions, all tensors flattened on the model's device.

    Attributes:
        shape: (sequences, length).
        keep: (positions,) which of them count: no padding, and no first tokens where these are left out. None means all.
        ordinal: (positions,) number of the token in `TokenStore`, -1 for padding.
        priority: (positions,) pseudo-random number >= 0 made from the sequence's content and the token's place in it.
    """

    shape: tuple[int, int]
    keep: Tensor | None
    ordinal: Tensor
    priority: Tensor


@dataclass
class TokenStore:
    """The ids of all tokens that were seen, padding left out, 4 bytes each: windows of context are cut from it.

    Attributes:
        ids: (tokens,) int32, sequence after sequence; -1 where the batch has no ids. starts: first token of each sequence, and the end.
    """

    pieces: list[Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])

    @property
    def ids(self) -> Tensor:
        return torch.cat(self.pieces) if self.pieces else torch.empty(0, dtype=torch.int32)

    def add(self, ids: Tensor | None, mask: Tensor) -> Tensor:
        """Takes in a batch's ids and mask, both (sequences, length); gives the tokens' numbers (sequences, length), -1 for padding."""
        flat = mask.flatten()
        ordinal = torch.where(flat, self.starts[-1] + flat.cumsum(0) - 1, -1).view(mask.shape)
        chosen = torch.full((int(flat.sum()),), -1, dtype=torch.int32) if ids is None else ids.cpu().to(torch.int32)[mask]
        self.pieces.append(chosen)
        for length in mask.sum(1).tolist():
            self.starts.append(self.starts[-1] + length)
        return ordinal


def make_grid(batch: Mapping[str, Any], store: TokenStore, skip_first: bool, prefix: str = "") -> TokenGrid | None:
    """The grid of a batch's `input_ids` (or `inputs_embeds`, or mask), with "decoder_" before the names if so; None where it has none."""
    ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
    embeds = batch.get(f"{prefix}inputs_embeds")
    ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    source = ids if ids is not None else embeds if isinstance(embeds, Tensor) and embeds.dim() == 3 else mask
    if source is None:
        return None
    shape = (source.shape[0], source.shape[1])
    real = torch.ones(shape, dtype=torch.bool) if mask is None or mask.shape != shape else (mask != 0).cpu()
    keep = real.clone()
    if skip_first:
        keep[torch.arange(shape[0]), real.int().argmax(1)] = False
    ordinal = store.add(ids, real)
    priority = torch.stack([_priorities(row, kept) for row, kept in zip(source.detach().cpu(), real, strict=True)])
    everything = bool(keep.all()) and mask is None
    return TokenGrid(shape, None if everything else keep.flatten().to(source.device), ordinal.flatten().to(source.device), priority.flatten().to(source.device))


def content_seed(values: Tensor) -> int:
    """A number made from a tensor's bits, the same wherever the tensor turns up."""
    return zlib.crc32(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _priorities(row: Tensor, real: Tensor) -> Tensor:
    """(length,) in [0, 2^31); 0 for padding, whatever its amount."""
    generator = torch.Generator().manual_seed(content_seed(row[real]))
    found = torch.zeros(len(real), dtype=torch.int64)
    found[real] = torch.randint(0, 2**31, (int(real.sum()),), generator=generator)
    return found


@dataclass(frozen=True)
class Located:
    """Which rows of an activation count.

    Attributes:
        keep: (rows,) or None for all of them. place: (kept rows,) flat position in the grid, or None where no grid fits.
        segment: (kept rows,) non-decreasing number of the stretch of at most 128 tokens of one sequence that a row belongs to.
    """

    keep: Tensor | None
    place: Tensor | None
    segment: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The rows of x (..., d) that count, (tokens, d)."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.keep is None else flat[self.keep]

    def sizes(self) -> list[int]:
        """Rows of each segment, in their order."""
        return torch.unique_consecutive(self.segment, return_counts=True)[1].tolist()


def locate(x: Tensor, grid: TokenGrid | None) -> Located:
    """Finds the rows of x (..., d) in the batch: by shape, and within an expert by what the router gave to it.

    Where no grid fits, all rows count, and the first dimension is taken for the sequences.
    """
    count, expert = x.numel() // x.shape[-1], rows_at_work()
    if grid is not None and _fits(x, grid, expert):
        place = torch.arange(count, device=x.device) if expert is None else expert[0].to(x.device)
        keep = None if grid.keep is None else grid.keep.to(x.device)[place]
        place = place if keep is None else place[keep]
        return Located(keep, place, _segments(place, grid.shape[1]))
    length = count // x.shape[0] if x.dim() > 2 and x.shape[0] else SPAN
    return Located(None, None, _segments(torch.arange(count, device=x.device), max(1, length)))


def _fits(x: Tensor, grid: TokenGrid, expert: tuple[Tensor, int] | None) -> bool:
    number = grid.shape[0] * grid.shape[1]
    if expert is not None:
        return expert[1] == number
    return x.shape[:-1] == grid.shape or (x.dim() == 2 and x.shape[0] == number)


def _segments(place: Tensor, length: int) -> Tensor:
    pieces = -(-length // SPAN)
    return place // length * pieces + place % length // SPAN
