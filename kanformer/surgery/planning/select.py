"""Which of the found blocks each config gets. An entry of a selection that fits no block is an error that names what there is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kanformer.config import KANConfig
from kanformer.errors import NoFeedForwardError
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folding import few, fold_paths
from kanformer.surgery.planning.blocks import FoundBlock, describe
from kanformer.surgery.planning.criteria import Criterion, criteria
from kanformer.surgery.planning.patterns import near_misses, pattern_tests

Where = Callable[[FoundBlock], bool]


def assign(sites: Sequence[Site], configs: Sequence[KANConfig], where: Where | None = None) -> list[tuple[Site, KANConfig]]:
    """Each site with the first config that selects it, in the order of the model; sites that none selects are left out.

    Raises:
        NoFeedForwardError: a config selects nothing, earlier ones took all its blocks, or an entry of its lists fits nothing.
        ConfigError: a pattern that is no regular expression.
    """
    wanted = None if where is None else {site.path for site in sites if where(describe(site))}
    taken: dict[str, KANConfig] = {}
    for number, config in enumerate(configs):
        name = f"config {number} of {len(configs)}" if len(configs) > 1 else None
        chosen = _select(sites, config, wanted, name)
        free = [site.path for site in chosen if site.path not in taken]
        if not free:
            raise _nothing(
                name,
                f"no block: earlier configs took all {len(chosen)} that it selects ({_folded(chosen)})",
                "A block gets the first config that selects it: put the narrower selection first.",
            )
        taken.update(dict.fromkeys(free, config))
    return [(site, taken[site.path]) for site in sites if site.path in taken]


def _select(sites: Sequence[Site], config: KANConfig, wanted: Collection[str] | None, name: str | None) -> list[Site]:
    settings = list(criteria(sites, config, wanted))
    for criterion in (criterion for entries in settings for criterion in entries):
        if not criterion.met_by(sites):
            part = any(map(criterion.fits, sites))
            raise _nothing(name, f"{_shown(criterion)}, which {'goes beyond what there is' if part else 'fits no block'}", criterion.hint(sites))
    chosen = [site for site in sites if all(any(criterion.fits(site) for criterion in entries) for entries in settings)]
    for criterion in (criterion for entries in settings for criterion in entries):
        if not criterion.met_by(chosen):
            others = ", ".join(dict.fromkeys(entries[0].setting for entries in settings if entries and criterion not in entries))
            hint = f"All settings together leave {_folded(chosen)}." if chosen else "The settings have no block in common."
            raise _nothing(name, f"{_shown(criterion)}, which with {others} selects nothing, or not all that it asks for", hint)
    excluded = _excluded(config, sites, name)
    left = [site for site in chosen if not excluded(site.path)]
    if not left:
        got = f"nothing left after exclude_modules={config.exclude_modules!r}" if chosen else "an empty list, or settings that have no block in common"
        raise _nothing(name, got, f"Before it there were {_folded(chosen or sites)}.")
    return left


def _excluded(config: KANConfig, sites: Sequence[Site], name: str | None) -> Callable[[str], bool]:
    patterns = config.exclude_modules
    tests = {} if patterns is None else pattern_tests(patterns, "exclude_modules")
    for pattern, test in tests.items():
        if not any(test(site.path) for site in sites):
            raise _nothing(name, f"exclude_modules={pattern!r}, which fits no block", near_misses(pattern, isinstance(patterns, str), sites))
    return lambda path: any(test(path) for test in tests.values())


def _nothing(name: str | None, got: str, hint: str) -> NoFeedForwardError:
    return NoFeedForwardError("select feed-forward blocks", subject=name, got=got, hint=hint)


def _shown(criterion: Criterion) -> str:
    return f"{criterion.setting}={criterion.entry!r}"


def _folded(sites: Sequence[Site]) -> str:
    return few(path for path, _ in fold_paths(site.path for site in sites))
