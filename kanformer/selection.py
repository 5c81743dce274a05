"""What a config may say about which blocks it is for, as plain values: layer numbers and ranges, towers, experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOWERS = ("encoder", "decoder", "text", "vision", "audio")
EXPERTS = ("include", "only", "exclude")
LAYERS_EXPECTED = 'layer numbers (negative: from the end) or ranges such as "0-5", "4-", "-3-"'
_RANGE = re.compile(r"(-?\d+)-(-?\d+)?")


@dataclass(frozen=True)
class LayerRange:
    """Layers `first` to `last`, both included; negative numbers count from the end of a list of layers."""

    first: int
    last: int

    def within(self, length: int) -> tuple[int, int]:
        """(first, last) in a list of so many layers; they may lie outside of it."""
        return self.first + (length if self.first < 0 else 0), self.last + (length if self.last < 0 else 0)


def read_layers(value: Any) -> Any:
    """Layers as a config keeps them: a tuple of whole numbers and of ranges as text; anything that cannot be read stays as it is."""
    if isinstance(value, str):
        return tuple(_plain(part.replace(" ", "")) for part in value.split(","))
    if _is_number(value):
        return (value,)
    if isinstance(value, tuple | list | set | range):
        return tuple(_plain(item.replace(" ", "")) if isinstance(item, str) else item for item in value)
    return value


def layers_are_good(layers: Any) -> bool:
    """Whether this is None, or what `read_layers` makes of layers that can be meant."""
    return layers is None or (isinstance(layers, tuple) and all(_is_number(item) or (isinstance(item, str) and _good_range(item)) for item in layers))


def layer_ranges(layers: Iterable[int | str]) -> dict[int | str, LayerRange]:
    """Each entry of a config's `layers_to_transform` as a range; a number is a range of one."""
    return {item: LayerRange(item, item) if isinstance(item, int) else _range(item) for item in layers}


def _range(text: str) -> LayerRange:
    match = _RANGE.fullmatch(text)
    assert match is not None  # layers_are_good has seen it
    return LayerRange(int(match[1]), -1 if match[2] is None else int(match[2]))


def _good_range(text: str) -> bool:
    if not _RANGE.fullmatch(text):
        return False
    span = _range(text)
    return (span.first < 0) != (span.last < 0) or span.first <= span.last


def _plain(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
