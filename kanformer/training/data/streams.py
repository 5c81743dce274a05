"""Examples of a stream: read window by window, in an order that depends on (seed, position) only, entered anywhere.

A window of rows is what memory holds. Its rows are shuffled by (seed, epoch, where it starts), so that a run that goes on needs no more than to find
the window: the rows before it are read past, but neither tokenized nor decoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kanformer.errors import DataError, KanformerError
from kanformer.training.data.columns import Column, usable
from kanformer.training.data.order import generator
from kanformer.training.data.packing import Packer
from kanformer.training.data.sources import Source, reading_error
from kanformer.training.data.tables import Table


@dataclass(frozen=True)
class Rows:
    """The rows of a streamed source, window by window.

    Attributes:
        source: the columns that are read, see `pick`.
        window: rows in a window; a window is shuffled as a whole where there is a seed.
        skip: rows at the beginning that are held out. limit: rows after them that are used; None means all.
    """

    source: Source
    columns: tuple[Column, ...]
    window: int
    seed: int | None = None
    skip: int = 0
    limit: int | None = None
    streamed = True

    @property
    def name(self) -> str:
        return self.source.name

    def feature(self, name: str) -> Any:
        """What datasets knows of a column (`ClassLabel`, ...), or None."""
        return (self.source.table.features or {}).get(name)

    def windows(self, epoch: int, start: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(where it starts, its usable rows) for the windows of an epoch from row `start` on.

        Raises:
            DataError: rows that cannot be read or used.
        """
        table = self.source.table.skip(self.skip)
        table = table if self.limit is None else table.take(self.limit)
        rows = iter(table.skip(start) if start else table)
        while raw := read_rows(rows, self.window, self.source.name):
            kept = [row for row in raw if usable(row, self.columns, self.source.name)]
            if self.seed is not None:
                order = torch.randperm(len(kept), generator=generator(self.seed, epoch, start)).tolist()
                kept = [kept[number] for number in order]
            yield start, kept
            start += len(raw)


def read_rows(rows: Iterator[dict[str, Any]], count: int, source: str) -> list[dict[str, Any]]:
    """The next `count` rows of a stream, fewer at its end.

    Raises:
        DataError: the stream breaks off.
    """
    try:
        return list(itertools.islice(rows, count))
    except KanformerError:
        raise
    except Exception as error:
        raise DataError("read the stream", subject=source, got=reading_error(error), hint="Go on by --resume when it can be read.") from error


class Stream:
    """Examples by their positions in the endless stream of epochs; positions are asked for in rising order, going back starts anew.

    Args:
        rows: where they come from.
        encode: makes an example of a row (or of a block of tokens), when it is asked for.
        packer: cuts blocks of tokens from the rows' texts; None leaves a row an example. `text`: the column of these texts.
        tell: takes a line about the packing at the end of the first epoch that is read to its end.
    """

    streamed = True

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[Any], Any],
        packer: Packer | None = None,
        text: str = "text",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.rows, self.encode, self.packer, self.text, self.tell = rows, encode, packer, text, tell
        self.load(_START)

    def __getitem__(self, position: int) -> Any:
        if position < self._first:
            self.load(_START)
        while position >= self._first + len(self._items):
            self._advance()
        return self.encode(self._items[position - self._first])

    def first(self, count: int) -> Iterator[Any]:
        """The first examples, `count` of them or as many as an epoch has."""
        for position in range(count):
            example = self[position]
            if self._epoch:
                return
            yield example

    def state(self) -> dict[str, Any]:
        """Where the present window starts, for `load`: plain numbers."""
        return {"epoch": self._epoch, "row": self._start, "position": self._first, "rest": list(self._rest_before), "seen": self._seen_before}

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was called; nothing is read yet."""
        self._epoch, self._start, self._first = state["epoch"], state["row"], state["position"]
        self._rest, self._seen = list(state["rest"]), state["seen"]
        self._rest_before, self._seen_before = self._rest, self._seen
        self._items: list[Any] = []
        self._windows = self.rows.windows(self._epoch, self._start)

    def _advance(self) -> None:
        """The next window, of the next epoch where one ends."""
        self._first += len(self._items)
        window = next(self._windows, None)
        if window is None:
            self._next_epoch()
            return
        self._rest_before, self._seen_before = self._rest, self._seen
        self._start, rows = window
        if self.packer is None:
            self._items = rows
        else:
            self._items, self._rest = self.packer.cut([row[self.text] for row in rows], self._rest)
        self._seen += len(self._items)

    def _next_epoch(self) -> None:
        if self.packer is not None:
            self.packer.check(self._seen, len(self._rest), self.rows.name)
            if self.tell is not None:
                self.tell(self.packer.summary(self._seen, len(self._rest)))
                self.tell = None
        elif not self._seen:
            raise DataError("read the stream", subject=self.rows.source.name, got="no row that can be used")
        self.load({"epoch": self._epoch + 1, "row": 0, "position": self._first, "rest": [], "seen": 0})


_START = {"epoch": 0, "row": 0, "position": 0, "rest": [], "seen": 0}


def hold_out_first(source: Source, columns: Sequence[Column], count: int) -> tuple[Table, int]:
    """(the first `count` usable rows of a stream, how many rows were read for that).

    Raises:
        DataError: no row that can be used.
    """
    from datasets import Dataset

    rows, found, read = iter(source.table), [], 0
    while len(found) < count and (raw := read_rows(rows, 1, source.name)):
        read += 1
        found += [row for row in raw if usable(row, columns, source.name)]
    if not found:
        raise DataError("read the stream", subject=source.name, got="no row that can be used")
    return Table(source.name, columns, Dataset.from_list(found, features=source.table.features)), read
