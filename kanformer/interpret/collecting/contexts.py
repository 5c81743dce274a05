"""The tokens at which each input channel lies where: the largest, the smallest, and some of every tenth of its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.conversion import processes

SAMPLE = 1024  # tokens of which every channel's value is kept, for the bins
BINS = 10
WINDOW = 8  # tokens on either side


@dataclass(frozen=True)
class Contexts:
    """Token contexts by position on the curve, per input channel of a map (an edge function sees no more of the token than its x).

    Attributes:
        values: (channels, 2 + bins, n) float32: slot 0 the largest, descending; slot 1 the smallest, ascending; then the bins from low to high. NaN: nothing.
        tokens: (channels, 2 + bins, n) int64, the token's number in `ids`; -1 for nothing.
        edges: (channels, bins + 1) quantiles that bound the bins, of the sample; the outer ones are its least and greatest.
        ids: (stored,) int32, the tokens that are shown, with their surroundings; -1 where the batches had no input_ids.
        starts: (sequences + 1,) where each sequence starts in `ids`.
        sampled: tokens from which the bins were filled.
    """

    values: Tensor
    tokens: Tensor
    edges: Tensor
    ids: Tensor
    starts: Tensor
    sampled: int

    @property
    def bins(self) -> int:
        return self.edges.shape[1] - 1

    def place(self, token: int) -> tuple[int, int]:
        """(sequence, offset in it) of a token's number."""
        sequence = int(torch.searchsorted(self.starts, token, right=True)) - 1
        return sequence, token - int(self.starts[sequence])

    def window(self, token: int, around: int = WINDOW) -> tuple[list[int], int]:
        """(the ids from `around` tokens before to `around` after within its sequence, which of them is the token)."""
        sequence, _ = self.place(token)
        first, last = max(int(self.starts[sequence]), token - around), min(int(self.starts[sequence + 1]), token + around + 1)
        return self.ids[first:last].tolist(), token - first

    def records(self, channel: int, slot: int, decode: Callable[[list[int]], str] | None = None, around: int = WINDOW) -> list[dict]:
        """What a slot of a channel holds: value, sequence, offset, ids, index of the token among them, and with `decode` before, token and after as text."""
        found = []
        for value, token in zip(self.values[channel, slot].tolist(), self.tokens[channel, slot].tolist(), strict=True):
            if token < 0:
                continue
            ids, index = self.window(token, around)
            sequence, offset = self.place(token)
            record = {"value": value, "sequence": sequence, "offset": offset, "ids": ids, "index": index}
            if decode is not None:
                record |= {"before": decode(ids[:index]), "token": decode(ids[index : index + 1]), "after": decode(ids[index + 1 :])}
            found.append(record)
        return found


class ContextRecorder:
    """Gathers `Contexts` batch by batch in memory that does not grow with the data: n largest and smallest per channel, and one uniform sample
    of tokens (by the smallest priorities, so the same tokens in every layer and whatever the batches).

    Equal values are ordered by the tokens' priorities, which come from their content: no result depends on order, batch size or number of processes.
    """

    def __init__(self, channels: int, count: int, sample: int = SAMPLE) -> None:
        self.channels, self.count, self.sample = channels, count, sample
        self.top, self.bottom = _Best(channels, count), _Best(channels, count)
        self.rows = torch.empty(0, channels)
        self.ordinal = self.priority = torch.empty(0, dtype=torch.int64)

    def add(self, rows: Tensor, ordinal: Tensor, priority: Tensor) -> None:
        """Takes in rows (tokens, channels) and their tokens' numbers and priorities (tokens,)."""
        rows, ordinal, priority = rows.float().cpu(), ordinal.cpu(), priority.cpu()
        high = _ascending(rows)
        self.top.add(high, ordinal, priority)
        self.bottom.add(~high, ordinal, priority)
        chosen = priority.argsort(stable=True)[: self.sample]
        if len(self.priority) == self.sample:
            chosen = chosen[priority[chosen] <= self.priority[-1]]
        self._keep(torch.cat([self.rows, rows[chosen]]), torch.cat([self.ordinal, ordinal[chosen]]), torch.cat([self.priority, priority[chosen]]))

    def _keep(self, rows: Tensor, ordinal: Tensor, priority: Tensor) -> None:
        order = priority.argsort(stable=True)[: self.sample]
        self.rows, self.ordinal, self.priority = rows[order], ordinal[order], priority[order]

    def all_reduce(self, first: int) -> None:
        """Takes in what all other processes kept; this one's tokens are numbered from `first` on."""
        if not processes.several():
            return
        for best in (self.top, self.bottom):
            best.all_reduce(first)
        missing = self.sample - len(self.priority)
        rows = torch.nn.functional.pad(self.rows, (0, 0, 0, missing))
        ordinal, priority = (
            torch.nn.functional.pad(value, (0, missing), value=-1) for value in (torch.where(self.ordinal < 0, -1, self.ordinal + first), self.priority)
        )
        rows, ordinal, priority = processes.gathered(rows).flatten(0, 1), processes.gathered(ordinal).flatten(), processes.gathered(priority).flatten()
        real = priority >= 0
        self._keep(rows[real], ordinal[real], priority[real])

    def finish(self, ids: Tensor, starts: Tensor) -> Contexts:
        """With the store of all processes' tokens."""
        edges = torch.full((self.channels, BINS + 1), torch.nan)
        values = torch.full((self.channels, 2 + BINS, self.count), torch.nan)
        tokens = torch.full(values.shape, -1, dtype=torch.int64)
        for slot, best in enumerate((self.top, self.bottom)):
            number = best.keys.shape[1]
            tokens[:, slot, :number] = best.ordinal
            values[:, slot, :number] = _value(best.ordered if slot == 0 else ~best.ordered)
        if len(self.rows):
            ordered = self.rows.sort(0)
            last = len(self.rows) - 1
            bounds = torch.linspace(0, last, BINS + 1).round().long()
            edges = ordered.values[bounds].t().contiguous()
            for index in range(BINS):
                self._fill(values[:, 2 + index], tokens[:, 2 + index], ordered.indices[bounds[index] : int(bounds[index + 1]) + (index == BINS - 1)])
        return Contexts(values, tokens, edges, ids, starts, len(self.rows))

    def _fill(self, values: Tensor, tokens: Tensor, members: Tensor) -> None:
        """Of the members (tokens, channels) of a bin the first `count` by priority, which is the order of the sample."""
        chosen = members.sort(0).values[: self.count]
        values[:, : len(chosen)] = self.rows.gather(0, chosen).t()
        tokens[:, : len(chosen)] = self.ordinal[chosen].t()


class _Best:
    """The `count` largest ordered integers per channel, ties by priority."""

    def __init__(self, channels: int, count: int) -> None:
        self.count = count
        self.keys = self.ordinal = torch.empty(channels, 0, dtype=torch.int64)

    @property
    def ordered(self) -> Tensor:
        return (self.keys >> 31).to(torch.int32)

    def add(self, ordered: Tensor, ordinal: Tensor, priority: Tensor) -> None:
        keys = (ordered.t().long() << 31) | priority
        self._merge(*self._largest(keys, ordinal.expand_as(keys)))

    def _merge(self, keys: Tensor, ordinal: Tensor) -> None:
        self.keys, self.ordinal = self._largest(torch.cat([self.keys, keys], 1), torch.cat([self.ordinal, ordinal], 1))

    def _largest(self, keys: Tensor, ordinal: Tensor) -> tuple[Tensor, Tensor]:
        best = keys.topk(min(self.count, keys.shape[1]), 1)
        return best.values, ordinal.gather(1, best.indices)

    def all_reduce(self, first: int) -> None:
        missing = self.count - self.keys.shape[1]
        lowest = torch.iinfo(torch.int64).min
        keys = torch.nn.functional.pad(self.keys, (0, missing), value=lowest)
        ordinal = torch.nn.functional.pad(torch.where(self.ordinal < 0, -1, self.ordinal + first), (0, missing), value=-1)
        keys, ordinal = (torch.cat(list(processes.gathered(value)), 1) for value in (keys, ordinal))
        self.keys, self.ordinal = self._largest(keys, ordinal)
        real = int((self.keys != lowest).sum(1).max()) if self.keys.numel() else 0
        self.keys, self.ordinal = self.keys[:, :real], self.ordinal[:, :real]


def _ascending(values: Tensor) -> Tensor:
    """Float32 as int32 of the same order."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # + 0.0: of -0 and 0 neither is less
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(ordered: Tensor) -> Tensor:
    """The float32 of which `ordered` is the order."""
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).contiguous().view(torch.float32)


def gather_store(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, int]:
    """The token store of all processes one after the other, and this one's first number in it."""
    if not processes.several():
        return ids, starts, 0
    lengths = processes.gathered(torch.tensor([len(ids), len(starts)])).tolist()
    longest, most = (max(length[index] for length in lengths) for index in (0, 1))
    all_ids = processes.gathered(torch.nn.functional.pad(ids, (0, longest - len(ids))))
    all_starts = processes.gathered(torch.nn.functional.pad(starts, (0, most - len(starts))))
    firsts = [sum(length[0] for length in lengths[:index]) for index in range(len(lengths))]
    parts = [all_ids[index, : length[0]] for index, length in enumerate(lengths)]
    bounds = [all_starts[index, : length[1] - 1] + firsts[index] for index, length in enumerate(lengths)]
    return torch.cat(parts), torch.cat([*bounds, torch.tensor([sum(length[0] for length in lengths)])]), firsts[processes.rank()]
