"""The settings of a selection as tests on blocks, each with what it says where nothing fits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kanformer.config import KANConfig
from kanformer.selection import LayerRange, layer_ranges
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.planning.blocks import is_expert
from kanformer.surgery.planning.layer_lists import Place, layer_lists, places
from kanformer.surgery.planning.patterns import near_misses, pattern_tests
from kanformer.surgery.planning.towers import towers_of


@dataclass(frozen=True)
class Criterion:
    """One entry of one setting. A block fits a setting if it fits one of its entries; each entry must be met by the blocks that are chosen.

    Attributes:
        fits: whether a block is meant.
        hint: a sentence on what there is among these blocks.
        all_there: whether these blocks are all that is meant, and not a part of it.
    """

    setting: str
    entry: object
    fits: Callable[[Site], bool]
    hint: Callable[[Sequence[Site]], str]
    all_there: Callable[[Sequence[Site]], bool] = lambda _: True

    def met_by(self, sites: Sequence[Site]) -> bool:
        return any(map(self.fits, sites)) and self.all_there(sites)


def criteria(sites: Sequence[Site], config: KANConfig, wanted: Collection[str] | None) -> Iterator[list[Criterion]]:
    """The entries of each setting that selects; `wanted` are the paths for which `where` is true."""
    if wanted is not None:
        yield [Criterion("where", "a function", lambda site: site.path in wanted, lambda _: "It must be true for a block: where=lambda block: ...")]
    if config.towers is not None:
        towers = {site.path: towers_of(site.model, site.owner_path) for site in sites}
        yield [_tower(tower, towers) for tower in config.towers]
    if config.experts != "include":
        only = config.experts == "only"
        yield [Criterion("experts", config.experts, lambda site: is_expert(site) == only, lambda _: f"The model has {'no' if only else 'only'} experts.")]
    if config.target_modules is not None:
        yield _targets(config.target_modules)
    if config.layers_to_transform is not None or config.layers_pattern is not None:
        yield _layers(sites, config.layers_to_transform, config.layers_pattern)


def _tower(tower: str, towers: Mapping[str, tuple[str, ...]]) -> Criterion:
    def hint(sites: Sequence[Site]) -> str:
        counts = Counter(each for site in sites for each in towers[site.path])
        return f"There are {', '.join(f'{name} ({count} blocks)' for name, count in counts.items()) or 'no blocks'}."

    return Criterion("towers", tower, lambda site: tower in towers[site.path], hint)


def _targets(patterns: str | tuple[str, ...]) -> list[Criterion]:
    expression = isinstance(patterns, str)

    def criterion(pattern: str, test: Callable[[str], bool]) -> Criterion:
        return Criterion("target_modules", pattern, lambda site: test(site.path), lambda sites: near_misses(pattern, expression, sites))

    return [criterion(pattern, test) for pattern, test in pattern_tests(patterns, "target_modules").items()]


def _layers(sites: Sequence[Site], layers: tuple[int | str, ...] | None, patterns: tuple[str, ...] | None) -> list[Criterion]:
    found = places(sites, patterns)

    def of(chosen: Sequence[Site]) -> list[Place]:
        return [found[site.path] for site in chosen if site.path in found]

    def hint(chosen: Sequence[Site]) -> str:
        return f"The layers are {layer_lists(of(chosen) or places(sites, None).values())}."

    def criterion(entry: int | str, wanted: LayerRange) -> Criterion:
        return Criterion(
            "layers_to_transform",
            entry,
            lambda site: site.path in found and found[site.path].within(wanted),
            hint,
            lambda chosen: any(place.has_all_of(wanted) for place in of(chosen)),
        )

    named = [] if patterns is None else list(patterns)
    if layers is None:
        return [Criterion("layers_pattern", name, lambda site, name=name: site.path in places([site], (name,)), hint) for name in named]
    return [criterion(entry, wanted) for entry, wanted in layer_ranges(layers).items()]
