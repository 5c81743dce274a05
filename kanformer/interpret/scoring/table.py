"""Scores of edges and functions, the first of them as rows, and their files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kanformer.errors import ConfigError, did_you_mean
from kanformer.interpret.parquet import write_parquet

if TYPE_CHECKING:
    from kanformer.interpret.truth.header import Faithfulness

SCHEMA, VERSION = "kanformer.scores", 2  # 1 had no header
DEFAULT_RANKS = ("effect", "sens", "std")


@dataclass(frozen=True)
class Scores:
    """Scores of all edges of a map, or of all its shared functions.

    Attributes:
        path, map: which map of which block.
        kind: "edge": every tensor is (outputs, inputs); "function": (groups,).
        values: by name, see `scoring.edges.SCORES`; float32, or float64 for a float64 model; on the CPU.
        channels: input channels per function, 1 for edges.
        index: None, or where only the first ones were kept (n, 2) of output and input, and every tensor is (n,).
        total: number of edges or functions of the map.
        sums: of each score over all of them, where only the first ones were kept.
    """

    path: str
    map: str
    kind: str
    values: dict[str, Tensor] = field(default_factory=dict)
    channels: int = 1
    index: Tensor | None = None
    total: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((value.numel() for value in self.values.values()), 0)

    def rank_by(self, by: str | None = None) -> str:
        """The score that ranks: `by`, or the first there is of effect, sens, std.

        Raises:
            ConfigError: it was not collected.
        """
        if by is None:
            by = next((name for name in DEFAULT_RANKS if name in self.values), None)
            if by is None:
                raise ConfigError("rank", subject=f"{self.path}, {self.map}", got=f"scores {list(self.values)}", hint="collect(..., scores=('effect',)).")
        if by not in self.values:
            hint = did_you_mean(by, self.values) if self.values else "No scores were collected: collect(..., scores=('effect',))."
            raise ConfigError("rank", subject=f"{self.path}, {self.map}", got=f"by={by!r}", hint=hint)
        return by

    def top(self, n: int = 20, by: str | None = None) -> Table:
        """The first n, the largest first; equal ones by output, then input. Default rank: `effect` where it was collected, else `sens`, else `std`."""
        return top_of([self], n, by)

    def at(self, places: Tensor) -> dict[str, Tensor]:
        """Output (-1 for functions), input and all values at flat places (n,)."""
        if self.kind == "function":
            ends = {"output": torch.full_like(places, -1), "input": places}
        elif self.index is not None:
            ends = {"output": self.index[places, 0], "input": self.index[places, 1]}
        else:
            width = next(iter(self.values.values())).shape[1]
            ends = {"output": places // width, "input": places % width}
        return {**ends, **{name: value.flatten()[places] for name, value in self.values.items()}}

    def rows(self, step: int = 65_536) -> Iterator[Table]:
        """All of them in their own order, some at a time."""
        for places in torch.arange(len(self)).split(step):
            yield _table(self, places, "")


@dataclass(frozen=True)
class Table:
    """Some edges or functions as columns of equal length.

    Attributes:
        columns: layer, map, output, input (-1: all outputs), then the scores.
        by: what they are ordered by. total: how many there are in all, these included. remainder: sum of `by` over the others.
        header: how much of the original the model is, where the statistics know.
    """

    columns: dict[str, list]
    by: str = ""
    total: int = 0
    remainder: float = 0.0
    header: Faithfulness | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, row, strict=True))

    def __str__(self) -> str:
        from kanformer.surgery.tables import table

        rows = [[_short(value) for value in row.values()] for row in self]
        others = self.total - len(self)
        text = table(list(self.columns), rows, right=range(2, len(self.columns)))
        return text + (f"\nthe other {others:,}: {self.by} {self.remainder:.4g} in all" if others > 0 else "")

    def to_csv(self, path: str | Path | None = None) -> str:
        """CSV text, also written to `path`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return _written(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path`: {"schema": "kanformer.scores", "version": 2, "header", "by", "total", "remainder", "columns", "rows"}; null:
        not finite, and no header."""
        rows = [[_plain(value) for value in row] for row in zip(*self.columns.values(), strict=True)]
        header = None if self.header is None else self.header.to_dict()
        found = {"schema": SCHEMA, "version": VERSION, "header": header, "by": self.by, "total": self.total, "remainder": _plain(self.remainder)}
        return _written(json.dumps({**found, "columns": list(self.columns), "rows": rows}, allow_nan=False) + "\n", path)

    def to_parquet(self, path: str | Path) -> None:
        """A parquet file, with schema, version and header (as JSON) in its metadata.

        Raises:
            ConfigError: pyarrow is not installed (`pip install pyarrow`; datasets brings it). CheckpointError: it cannot be written.
        """
        header = {} if self.header is None else {"header": json.dumps(self.header.to_dict())}
        write_parquet(self.columns, path, {"schema": SCHEMA, "version": str(VERSION), **header, "by": self.by, "total": str(self.total)})


def top_of(scores: Sequence[Scores], n: int, by: str | None) -> Table:
    """The first n of several maps together.

    Raises:
        ConfigError: n < 1, nothing collected, or a score that was not.
    """
    if n < 1:
        raise ConfigError("rank", got=f"n={n}", expected="at least 1")
    scores = [one for one in scores if len(one)]
    if not scores:
        raise ConfigError(
            "rank", got="no scores", hint="Ask for them: kanformer.collect(model, batches, scores=('std', 'effect')); functions need shared edges."
        )
    by = scores[0].rank_by(by)
    chosen, best, total, number = [], [], 0.0, 0
    for which, one in enumerate(scores):
        value = one.values[one.rank_by(by)].flatten()
        total, number = total + one.sums.get(by, float(value.double().sum())), number + max(one.total, len(one))
        places = first_places(value, n)
        chosen.append(torch.stack([torch.full_like(places, which), places], 1))
        best.append(value[places])
    order = torch.cat(best).argsort(descending=True, stable=True)[:n]
    kept, shown = torch.cat(chosen)[order], torch.cat(best)[order]
    parts = [_table(scores[int(which)], place.view(1), by) for which, place in kept]
    names = list(dict.fromkeys(name for part in parts for name in part.columns))
    columns = {name: [value for part in parts for value in part.columns.get(name, [None])] for name in names}
    return Table(columns, by, number, total - float(shown.double().sum()))


def keep_first(scores: dict[str, Scores], top: int) -> None:
    """Replaces scores of edges by those of the first `top` of each map."""
    for name, one in scores.items():
        places = first_places(one.values[one.rank_by()].flatten(), top)
        found = one.at(places)
        index = torch.stack([found.pop("output"), found.pop("input")], 1)
        sums = {score: float(value.double().sum()) for score, value in one.values.items()}
        scores[name] = Scores(one.path, one.map, one.kind, found, one.channels, index, one.total, sums)


def first_places(values: Tensor, n: int) -> Tensor:
    """Places of the n largest, descending, equal ones in the order of their places; NaN counts as the least."""
    values = torch.where(values.isnan(), -torch.inf, values)
    n = min(n, len(values))
    least = values.topk(n).values[-1]
    above, equal = torch.nonzero(values > least).flatten(), torch.nonzero(values == least).flatten()
    places = torch.cat([above, equal[: n - len(above)]])
    return places[values[places].argsort(descending=True, stable=True)]


def _table(one: Scores, places: Tensor, by: str) -> Table:
    columns: dict[str, list] = {"layer": [one.path] * len(places), "map": [one.map] * len(places)}
    return Table(columns | {name: value.tolist() for name, value in one.at(places).items()}, by, one.total)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        from kanformer.surgery.folders import replace_file

        replace_file(Path(path), text)
    return text


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
