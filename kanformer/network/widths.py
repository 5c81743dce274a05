"""What the width list of a network says: sum nodes and multiplication nodes per layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from kanformer.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """The nodes between two maps: `sums` nodes that add, then `products` nodes that multiply `arity` sums each.

    The map before it gives `inner` numbers, the map after it reads `nodes`.
    """

    sums: int
    products: int = 0
    arity: int = 2

    @property
    def inner(self) -> int:
        return self.sums + self.products * self.arity

    @property
    def nodes(self) -> int:
        return self.sums + self.products

    def written(self) -> int | list[int]:
        """As in a width list."""
        return [self.sums, self.products] if self.products else self.sums


def read_widths(width: Sequence, mult: Sequence[int] | None, mult_arity: int) -> tuple[Level, ...]:
    """Levels of a width list such as [2, 5, 1], or [2, [5, 2], 1] with two multiplication nodes beside five that add; the list is not changed.

    Raises:
        ConfigError: fewer than two levels, a level without nodes, multiplication in the first one, or something that is no number.
    """
    action = "make a KAN"
    if isinstance(width, str) or not isinstance(width, Sequence) or len(width) < 2:
        raise ConfigError(action, got=f"width={width!r}", expected="inputs, hidden widths and outputs, for example [2, 5, 1]")
    if mult is not None and len(mult) != len(width):
        raise ConfigError(
            action, got=f"mult={list(mult)!r} for width={list(width)!r}", expected="a number of multiplication nodes per level, for example [0, 2, 0]"
        )
    arity = _whole(mult_arity, "mult_arity", width)
    if arity < 2:
        raise ConfigError(action, got=f"mult_arity={mult_arity!r}", expected="at least 2 factors")
    levels = []
    for place, entry in enumerate(width):
        pair = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry, 0]
        if len(pair) != 2:
            raise ConfigError(action, got=f"width={list(width)!r}", expected="a number, or a pair of sums and products, per level")
        sums, products = (_whole(value, f"width[{place}]", width) for value in pair)
        products += _whole(mult[place], f"mult[{place}]", width) if mult is not None else 0
        if sums < 0 or products < 0 or sums + products < 1:
            raise ConfigError(action, got=f"width[{place}]={entry!r}", expected="at least one node")
        if place == 0 and products:
            raise ConfigError(action, got=f"{products} multiplication nodes among the inputs", expected="none: they multiply what a map gives")
        levels.append(Level(sums, products, arity))
    return tuple(levels)


def _whole(value: object, name: str, width: Sequence) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError("make a KAN", subject=f"width={list(width)!r}", got=f"{name}={value!r}", expected="an integer") from None
