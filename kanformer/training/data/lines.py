"""Text files: a text per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kanformer.errors import DataError


def read_lines(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        DataError: missing, empty or not UTF-8.
    """
    lines = list(iterate_lines([path]))
    if not lines:
        raise DataError("read the text", subject=path, got="an empty file", expected="a text per line")
    return lines


def iterate_lines(paths: Sequence[str | Path]) -> Iterator[str]:
    """The same lines of several files one after the other, read as they are asked for.

    Raises:
        DataError: a file that is missing or not UTF-8.
    """
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:
                for physical in file:
                    yield from (line.strip() for line in physical.splitlines() if line.strip())
        except UnicodeDecodeError as error:
            raise DataError(
                "read the text",
                subject=path,
                got=f"bytes that are not UTF-8{_position(path)}",
                hint="Convert the file to UTF-8, for example with iconv.",
            ) from error
        except OSError as error:
            raise DataError("read the text", subject=path, got=error.strerror or str(error)) from error


def _position(path: str | Path) -> str:
    """Where in the file the first bad byte is; the decoder that reads piece by piece counts from the piece's start."""
    read = 0
    with open(path, "rb") as file:
        for line in file:  # no character of UTF-8 goes over a line's end
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f" at position {read + error.start:,}"
            read += len(line)
    return ""
