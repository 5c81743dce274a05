"""A fair sample of a stream of rows, of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion import processes

_LIMIT = 256


class RowSample:
    """At most `limit` rows of a stream, every row with the same chance: those with the smallest of the numbers that are drawn for all.

    The numbers come from a generator of its own. Unlike every n-th row it does not fall into step with the length of sequences.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self.limit = limit
        self.generator = torch.Generator("cpu").manual_seed(processes.rank())
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Takes in rows (tokens, channels), kept in float32."""
        keys = torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64, device="cpu")
        chosen = keys.topk(min(self.limit, len(keys)), largest=False).indices.sort().values
        self._join(keys[chosen], rows[chosen.to(rows.device)].float())

    def all_reduce(self, channels: int, device: torch.device) -> None:
        """Makes it the sample of all processes' rows, also where none came here."""
        rows = torch.zeros(0, channels, device=device) if self.rows is None else self.rows
        missing = self.limit - rows.shape[0]
        keys = processes.gathered(torch.nn.functional.pad(self.keys, (0, missing), value=torch.inf)).reshape(-1)
        everything = processes.gathered(torch.nn.functional.pad(rows, (0, 0, 0, missing))).reshape(-1, channels)
        self.keys, self.rows = self.keys[:0], None
        self._join(keys, everything)
        drawn = self.keys.isfinite()
        self.keys, self.rows = self.keys[drawn], self.rows[drawn.to(rows.device)]  # type: ignore[index]

    def outside(self, lo: Tensor, hi: Tensor, channels: Tensor) -> Tensor:
        """Fraction of the values of these channels, given by number, outside [lo, hi], each (channels,)."""
        assert self.rows is not None
        rows = self.rows[:, channels]
        return ((rows < lo) | (rows > hi)).double().mean(0)

    def _join(self, keys: Tensor, rows: Tensor) -> None:
        keys, rows = torch.cat([self.keys, keys]), rows if self.rows is None else torch.cat([self.rows, rows])
        kept = keys.topk(min(self.limit, len(keys)), largest=False).indices.sort().values
        self.keys, self.rows = keys[kept], rows[kept.to(rows.device)]
