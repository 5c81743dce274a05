"""Which columns a task reads, and whether a row can be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.errors import DataError, did_you_mean
from kanformer.training.data.sources import Source, reading_error

TEXT, WORDS, IMAGE, VALUE = "text", "words", "image", "value"


@dataclass(frozen=True)
class Column:
    """A column by its name, and what must stand in it: a text, a list of words, an image, or any value."""

    name: str
    kind: str = VALUE


def pick(source: Source, columns: Sequence[Column]) -> Source:
    """The source with these columns only; images are left as they lie, to be opened when they are needed.

    The only column of plain text takes the name that is wanted.

    Raises:
        DataError: a column that is not there.
    """
    table, names = source.table, column_names(source)
    if source.plain and columns[0].kind == TEXT and columns[0].name != "text":
        table, names = table.rename_column("text", columns[0].name), [columns[0].name]
    for column in columns:
        if column.name in names:
            continue
        if source.plain:
            wanted = ", ".join(each.name for each in columns)
            raise DataError(
                "read labelled text",
                subject=source.name,
                got=f"a {Path(source.name).suffix or 'plain'} file",
                expected=f".jsonl, .csv or .parquet with the columns {wanted}",
            )
        raise DataError("read the data", subject=source.name, got=f"no column {column.name!r}", hint=did_you_mean(column.name, names))
    if len({column.name for column in columns}) < len(columns):
        raise DataError("read the data", subject=source.name, got="a column that shall be two things: " + ", ".join(each.name for each in columns))
    table = table.select_columns([column.name for column in columns])
    for column in columns:
        if column.kind == IMAGE and type((table.features or {}).get(column.name)).__name__ == "Image":
            from datasets import Image

            table = table.cast_column(column.name, Image(decode=False))
    return Source(source.name, table, source.plain)


def column_names(source: Source) -> list[str]:
    """The names of its columns; of a stream that does not know them, those of its first row.

    Raises:
        DataError: a stream whose first row cannot be read, or that has none.
    """
    if source.table.column_names is not None:
        return list(source.table.column_names)
    try:
        return list(next(iter(source.table)))
    except StopIteration:
        raise DataError("read the data", subject=source.name, got="no row in it") from None
    except DataError:
        raise
    except Exception as error:
        raise DataError("read the data", subject=source.name, got=reading_error(error)) from error


def usable(row: dict[str, Any], columns: Sequence[Column], source: str) -> bool:
    """Whether a row has what is wanted; one whose first column is empty is left out. Columns that were not read are not looked at.

    Raises:
        DataError: a value of the wrong kind, or none in another column than the first.
    """
    for number, column in enumerate(columns):
        if column.name not in row:
            continue
        value = row[column.name]
        if value is None or (isinstance(value, str | list) and not (value.strip() if isinstance(value, str) else value)):
            if number == 0:
                return False
            if value is None or column.kind != VALUE:
                raise DataError("read the data", subject=source, got=f"a row whose column {column.name!r} has no value")
        _check_kind(value, column, source)
    return True


def _check_kind(value: Any, column: Column, source: str) -> None:
    if column.kind == TEXT and not isinstance(value, str):
        raise DataError("read the text", subject=source, got=f"{value!r} in column {column.name!r}", expected="text")
    if column.kind == WORDS and not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise DataError("read the text", subject=source, got=f"{value!r} in column {column.name!r}", expected="a list of words")
    if column.kind == IMAGE and not isinstance(value, str | dict):
        raise DataError("read the images", subject=source, got=f"{type(value).__name__} in column {column.name!r}", expected="images or paths of images")
