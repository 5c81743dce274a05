"""The lists of layers that blocks lie in, and which of their layers a config means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kanformer.selection import LayerRange
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.modules import get_path


@dataclass(frozen=True)
class Place:
    """Where a block lies: in which list of layers (its path), at which number, of how many layers."""

    layers: str
    number: int
    length: int

    def within(self, wanted: LayerRange) -> bool:
        """Whether this layer is meant."""
        first, last = wanted.within(self.length)
        return first <= self.number <= last

    def has_all_of(self, wanted: LayerRange) -> bool:
        """Whether the list has every layer that is meant."""
        first, last = wanted.within(self.length)
        return 0 <= first <= last < self.length


def places(sites: Iterable[Site], patterns: tuple[str, ...] | None) -> dict[str, Place]:
    """The place of each block by its path, of those that have one.

    Args:
        patterns: names of the lists that count; None takes the first number in a path.
    """
    sites = list(sites)
    found = {site.path: position for site in sites if (position := _position(site.path, patterns)) is not None}
    highest: dict[str, int] = {}
    for layers, number in found.values():
        highest[layers] = max(highest.get(layers, 0), number)
    lengths = {layers: _length(sites[0], layers, highest[layers]) for layers in highest}
    return {path: Place(layers, number, lengths[layers]) for path, (layers, number) in found.items()}


def layer_lists(found: Iterable[Place]) -> str:
    """The lists for a message: `encoder.layers (0 to 11)`."""
    return ", ".join(dict.fromkeys(f"{place.layers or 'the model itself'} (0 to {place.length - 1})" for place in found)) or "no layers at all"


def _position(path: str, patterns: tuple[str, ...] | None) -> tuple[str, int] | None:
    names = path.split(".")
    for index, name in enumerate(names):
        if name.isdigit() and (patterns is None or (index and names[index - 1] in patterns)):
            return ".".join(names[:index]), int(name)
    return None


def _length(site: Site, layers: str, highest: int) -> int:
    """How many layers the list has, with and without blocks."""
    try:
        return max(len(get_path(site.model, layers)), highest + 1)
    except (AttributeError, TypeError):
        return highest + 1
