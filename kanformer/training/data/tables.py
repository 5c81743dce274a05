"""Rows that can be read in any order, and what is held out of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from kanformer.errors import DataError
from kanformer.training.data.columns import IMAGE, Column, pick, usable
from kanformer.training.data.order import generator
from kanformer.training.data.sources import Source


class Table:
    """The usable rows of a part of the data.

    Args:
        name: of the source, for messages.
        columns: what is read of it.
        rows: a `datasets.Dataset`; images lie in it as {"bytes", "path"}.
    """

    streamed = False

    def __init__(self, name: str, columns: Sequence[Column], rows: Any) -> None:
        self.name, self.columns, self.rows = name, tuple(columns), rows

    @classmethod
    def read(cls, source: Source, columns: Sequence[Column]) -> Table:
        """The rows of a source that are not empty.

        Raises:
            DataError: a column that is not there, a value of the wrong kind, or no row that can be used.
        """
        source = pick(source, columns)
        total, names = len(source.table), [column.name for column in columns if column.kind != IMAGE]
        values = zip(*(list(source.table[name]) for name in names), strict=True) if names else itertools.repeat((), total)
        kept = [number for number, row in enumerate(values) if usable(dict(zip(names, row, strict=True)), columns, source.name)]
        if not kept:
            raise DataError("read the data", subject=source.name, got="no text in it" if total else "no row in it")
        return cls(source.name, columns, source.table if len(kept) == total else source.table.select(kept))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def values(self, name: str) -> list[Any]:
        """A whole column."""
        return list(self.rows[name])

    def all(self) -> dict[str, list]:
        """All columns."""
        return {column.name: self.values(column.name) for column in self.columns}

    def feature(self, name: str) -> Any:
        """What datasets knows of a column (`ClassLabel`, ...), or None."""
        return (self.rows.features or {}).get(name)

    def only(self, numbers: Sequence[int]) -> Table:
        """These rows in this order."""
        return Table(self.name, self.columns, self.rows.select(numbers))

    def first(self, limit: int | None) -> Table:
        """Not more than `limit` rows."""
        return self if limit is None or limit >= len(self) else self.only(range(limit))

    def mixed(self) -> Table:
        """The same rows in an order that is always the same and has nothing to do with theirs: files are often sorted by class."""
        return self.only(torch.randperm(len(self), generator=generator(0)).tolist())


def hold_out(table: Table, percent: float) -> tuple[Table, Table]:
    """(the first rows, the last `percent` of them, at least one).

    Raises:
        DataError: fewer than two rows.
    """
    total = len(table)
    if total < 2:
        raise DataError("hold out validation data", got=f"{total} row", expected="at least 2", hint="Give more data, or a validation_file.")
    cut = max(1, round(total * percent / 100))
    return table.only(range(total - cut)), table.only(range(total - cut, total))
