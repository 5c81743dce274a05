"""Many like paths as few: `encoder.layer.{0..11}.mlp` for twelve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import prod


def fold_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """(folded path, how many it stands for), in the order of their first members; together they stand for these paths and no others."""
    alike: dict[str, list[tuple[int, ...]]] = {}
    for path in dict.fromkeys(paths):
        alike.setdefault(re.sub(r"\d+", "#", path), []).append(tuple(int(number) for number in re.findall(r"\d+", path)))
    return [folded for template, rows in alike.items() for folded in _fold(template, rows)]


def few(words: Iterable[str], limit: int = 6) -> str:
    """The first words in one line, and how many more there are."""
    words = list(words)
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def _fold(template: str, rows: list[tuple[int, ...]]) -> list[tuple[str, int]]:
    columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
    if prod(map(len, columns)) == len(rows):
        return [(_fill(template, [_numbers(column) for column in columns]), len(rows))]
    fixed = next(index for index, column in enumerate(columns) if len(column) > 1)
    parts: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        parts.setdefault(row[fixed], []).append(row)
    return [folded for part in parts.values() for folded in _fold(template, part)]


def _fill(template: str, numbers: Sequence[str]) -> str:
    return "".join(text + number for text, number in zip(template.split("#"), [*numbers, ""], strict=True))


def _numbers(column: list[int]) -> str:
    """One number as it is, several in braces, runs of three and more by their ends."""
    if len(column) == 1:
        return str(column[0])
    runs: list[list[int]] = []
    for number in column:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) + "}"
