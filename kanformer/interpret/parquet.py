"""Columns as a parquet file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from kanformer.errors import CheckpointError, ConfigError


def need_pyarrow(path: str | Path) -> None:
    """Raises ConfigError where pyarrow is missing (`pip install pyarrow`; datasets brings it)."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError("write a parquet file", subject=path, got="no pyarrow", hint="pip install pyarrow, or write CSV or JSON.") from error


def write_parquet(columns: Mapping[str, list], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all. A column without any value is one of numbers.

    Raises:
        ConfigError: pyarrow is not installed. CheckpointError: it cannot be written.
    """
    need_pyarrow(path)
    import pyarrow
    import pyarrow.parquet as parquet

    arrays = {name: pyarrow.array(values, pyarrow.float64() if all(value is None for value in values) else None) for name, values in columns.items()}
    found = pyarrow.table(arrays).replace_schema_metadata(dict(metadata))
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        parquet.write_table(found, aside)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise CheckpointError("write a file", subject=path, got=error.strerror or str(error)) from error
