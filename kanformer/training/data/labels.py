"""Classes: their names, and the numbers of what stands in a column."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kanformer.errors import DataError
from kanformer.training.data.streams import Rows
from kanformer.training.data.tables import Table


@dataclass(frozen=True)
class Classes:
    """The names of a column's classes, in the order of their numbers.

    Attributes:
        given: whether the settings name them. indexed: whether whole numbers in the column are places in `names`, to which the settings give names.
    """

    column: str
    names: tuple[str, ...]
    given: bool = False
    indexed: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What a transformers config says of them."""
        return {"num_labels": len(self.names), "id2label": dict(enumerate(self.names)), "label2id": dict(self._numbers)}

    def as_in(self, label2id: Mapping[str, int] | None) -> Classes:
        """The same classes with a checkpoint's numbers, where it has the same names: its head was trained with these. Numbers that the settings give stay."""
        if self.given or not label2id or set(label2id) != set(self.names):
            return self
        return dataclasses.replace(self, names=tuple(sorted(label2id, key=lambda name: label2id[name])))

    def number(self, value: Any, part: Table | Rows) -> int:
        """The number of a value of the column.

        Raises:
            DataError: it is none of the classes.
        """
        found = self._find(value, part)
        if found is None:
            expected = f"one of {', '.join(self.names[:20])}"
            raise DataError("read the classes", subject=_place(part, self.column), got=f"class {class_name(value, part, self.column)!r}", expected=expected)
        return found

    def check(self, values: Iterable[Any], part: Table) -> None:
        """Refuses a held-out part with classes that the training part does not have.

        Raises:
            DataError: there are some; they are named.
        """
        unknown = sorted({class_name(value, part, self.column) for value in values if self._find(value, part) is None})
        if unknown:
            got = f"unseen held-out classes {unknown[:3]}" + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise DataError(
                "read the classes", subject=_place(part, self.column), got=got, expected=f"those of the training data ({', '.join(self.names[:20])})"
            )

    def _find(self, value: Any, part: Table | Rows) -> int | None:
        if self.indexed and type(value) is int and not _known_names(part, self.column):
            return value if 0 <= value < len(self.names) else None
        return self._numbers.get(class_name(value, part, self.column))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def find_classes(part: Table | Rows, column: str, given: Sequence[Any] | None, values: Iterable[Any]) -> Classes:
    """The classes that the settings give, that datasets knows (`ClassLabel`), or that stand in the training data: numbers by size, words by letters.

    Args:
        values: all that stand in the column; not asked for where the part is a stream.

    Raises:
        DataError: fewer than two classes, or a stream that does not say which there are.
    """
    names = [str(name) for name in given] if given else list(_known_names(part, column))
    if not names:
        if isinstance(part, Rows):
            hint = "Give label_names, a list of all names (a stream is not read to its end to find them)."
            raise DataError("read the classes", subject=_place(part, column), got="a stream that does not say which there are", hint=hint)
        names = _sorted({class_name(value, part, column): value for value in values})
    if len(names) < 2 or len(set(names)) < len(names):
        got = f"one class only ({names})" if len(names) < 2 else f"the same name twice ({names})"
        raise DataError("read the classes", subject=_place(part, column), got=got, expected="at least two, each with a name of its own")
    return Classes(column, tuple(names), given=bool(given), indexed=bool(given) and not any(name.lstrip("-").isdigit() for name in names))


def class_name(value: Any, part: Table | Rows, column: str) -> str:
    """What a value of the column is called.

    Raises:
        DataError: a number to which the dataset gives no name.
    """
    names = _known_names(part, column)
    if not names or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(names):
        raise DataError("read the classes", subject=_place(part, column), got=f"number {value}", expected=f"0 to {len(names) - 1}")
    return names[value]


def _known_names(part: Table | Rows, column: str) -> list[str]:
    feature = part.feature(column)
    if isinstance(feature, list):
        feature = feature[0]
    feature = getattr(feature, "feature", feature)  # of a list: of its entries
    return list(getattr(feature, "names", None) or ())


def _sorted(found: dict[str, Any]) -> list[str]:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found.values())
    return sorted(found, key=(lambda name: found[name]) if numbers else None)


def _place(part: Table | Rows, column: str) -> str:
    return f"{part.name}, column {column!r}"
