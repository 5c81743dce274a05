"""Fits as CSV, JSON and parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kanformer.interpret import parquet
from kanformer.interpret.plot import write_file
from kanformer.interpret.symbolic.fits import OUTCOMES, MapFits, SymbolicFits

SCHEMA, VERSION = "kanformer.symbolic", 2  # 1 had no header and no score
_FORMULA = "c * f(a * (x - t)) + e * x + d"
_NUMBERS = ("r2", "r2_uniform", "nrmse", "weight", "max_error", "std", "condition", "low", "high")
COLUMNS = ("layer", "map", "input", "output", "outcome", "family", "a", "t", "c", "e", "d", *_NUMBERS, "score", "equivalent")


def records(one: MapFits) -> Iterator[dict[str, Any]]:
    """A mapping per function, in plain values; numbers that are not finite are None."""
    columns = {name: getattr(one, name).tolist() for name in ("input", "output", "outcome", "family", *_NUMBERS)}
    numbers = one.numbers.tolist()
    scores = [math.nan] * len(one) if one.score is None else one.score.tolist()
    for place in range(len(one)):
        row: dict[str, Any] = {"layer": one.path, "map": one.map, "input": columns["input"][place], "output": columns["output"][place]}
        row |= {"outcome": OUTCOMES[columns["outcome"][place]], "family": one.families[columns["family"][place]]}
        row |= {name: _finite(value) for name, value in zip(("a", "t", "c", "e", "d"), numbers[place], strict=True)}
        row |= {name: _finite(columns[name][place]) for name in _NUMBERS}
        yield {**row, "score": _finite(scores[place]), "equivalent": one.equivalence(place)}


def to_dict(fits: SymbolicFits) -> dict[str, Any]:
    """The versioned JSON: the header, settings and counts per map, and all its functions."""
    maps = []
    for one in fits.all_maps():
        head = {name: getattr(one, name) for name in ("path", "map", "shared", "base", "tokens", "n_functions", "node_source", "score_name", "settings")}
        head |= {"outcomes": one.counts(), "complexities": dict(zip(one.families, one.complexities, strict=True))}
        maps.append({**head, "functions": list(records(one))})
    return {"schema": SCHEMA, "version": VERSION, "header": _header(fits), "formula": _FORMULA, "maps": maps}


def write_json(fits: SymbolicFits, path: str | Path) -> Path:
    """Writes `to_dict` whole or not at all. Raises CheckpointError."""
    return write_file(Path(path), json.dumps(to_dict(fits), allow_nan=False).encode())


def write_csv(fits: SymbolicFits, path: str | Path) -> Path:
    """Writes a row per function, whole or not at all. Raises CheckpointError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in fits.all_maps():
        for row in records(one):
            row["equivalent"] = " ".join(row["equivalent"])
            writer.writerow("" if row[name] is None else f"{row[name]:.9g}" if isinstance(row[name], float) else row[name] for name in COLUMNS)
    return write_file(Path(path), text.getvalue().encode())


def write_parquet(fits: SymbolicFits, path: str | Path) -> Path:
    """Writes a row per function, whole or not at all; schema, version and header (as JSON) are in its metadata. Raises CheckpointError, ConfigError."""
    rows = [row for one in fits.all_maps() for row in records(one)]
    metadata = {"schema": SCHEMA, "version": str(VERSION), "header": json.dumps(_header(fits)), "formula": _FORMULA}
    parquet.write_parquet({name: [row[name] for row in rows] for name in COLUMNS}, path, metadata)
    return Path(path)


def _header(fits: SymbolicFits) -> dict[str, Any] | None:
    return None if fits.header is None else fits.header.to_dict()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
