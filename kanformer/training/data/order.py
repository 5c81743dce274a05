"""Which example stands at which position: the order depends on nothing but (seed, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

_WINDOW = 64  # groups among which texts are sorted by length
_MIX = 1_000_003


class Positions(Protocol):
    """From a position in the endless stream of epochs to the number of an example."""

    def __getitem__(self, position: int, /) -> int: ...


def generator(*numbers: int) -> torch.Generator:
    """A random generator for these numbers (seed, epoch, ...), independent of the global one."""
    seed = 0
    for number in numbers:
        seed = seed * _MIX + number
    return torch.Generator().manual_seed(seed % 2**63)


class Order:
    """Which example stands at which position of the endless stream of shuffled epochs.

    Args:
        size: number of examples.
        seed: of the shuffling; the stream depends on nothing else, so it can be entered anywhere.
        lengths: tokens of each example; given, steps of `group` examples hold texts of similar length, to save padding.
        group: examples per optimizer step, over all processes.
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.size, self.seed, self.lengths, self.group = size, seed, lengths, group
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            dice = generator(self.seed, epoch)
            order = torch.randperm(self.size, generator=dice).tolist()
            self._epoch, self._order = epoch, order if self.lengths is None else self._by_length(order, self.lengths, dice)
        return self._order[index]

    def _by_length(self, order: list[int], lengths: Sequence[int], dice: torch.Generator) -> list[int]:
        """Sorts windows of _WINDOW groups by length and shuffles the groups in each; what fills no group stays at the end."""
        grouped: list[int] = []
        whole = self.size - self.size % self.group
        for start in range(0, whole, _WINDOW * self.group):
            window = sorted(order[start : min(start + _WINDOW * self.group, whole)], key=lambda index: lengths[index])
            for number in torch.randperm(len(window) // self.group, generator=dice).tolist():
                grouped += window[number * self.group : (number + 1) * self.group]
        return grouped + order[whole:]


class Straight:
    """Examples as they come, epoch after epoch; without a size, as in a stream, the position itself."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __getitem__(self, position: int) -> int:
        return position if self.size is None else position % self.size


def micro_batches(order: Positions, step: int, rank: int, world: int, batch_size: int, accumulation: int) -> Iterator[list[int]]:
    """The examples of one process in one step, micro-batch by micro-batch; all processes together read consecutive positions."""
    start = step * world * batch_size * accumulation
    for micro in range(accumulation):
        first = start + (micro * world + rank) * batch_size
        yield [order[position] for position in range(first, first + batch_size)]
