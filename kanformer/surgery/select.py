"""Which of the found blocks the config asks for; a selection that matches nothing is an error."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

from kanformer.config import KANConfig
from kanformer.errors import ConfigError, NoFeedForwardError, did_you_mean
from kanformer.surgery.modules import layer_number
from kanformer.surgery.sites import Site


def assign(sites: list[Site], configs: tuple[KANConfig, ...]) -> list[tuple[Site, KANConfig]]:
    """Each site with the first config that selects it, in the order of the model; sites that none selects are left out.

    Raises:
        NoFeedForwardError: a config selects nothing, or earlier ones took all its blocks.
    """
    taken: dict[str, KANConfig] = {}
    for number, config in enumerate(configs):
        chosen = [site.path for site in select(sites, config)]
        free = [path for path in chosen if path not in taken]
        if not free:
            raise NoFeedForwardError(
                "select feed-forward blocks",
                subject=f"config {number}",
                got=f"no block: earlier configs took all {len(chosen)} that it selects ({', '.join(chosen[:3])}{', ...' if len(chosen) > 3 else ''})",
                hint="A block gets the first config that selects it: put the narrower selection first.",
            )
        taken.update(dict.fromkeys(free, config))
    return [(site, taken[site.path]) for site in sites if site.path in taken]


def select(sites: list[Site], config: KANConfig) -> list[Site]:
    """The sites that `target_modules`, `layers_to_transform` and `exclude_modules` leave.

    Raises:
        NoFeedForwardError: a pattern or a layer number matches no block; the message names the near ones.
    """
    paths = [site.path for site in sites]
    chosen = sites
    if config.target_modules is not None:
        matches = _matcher(config.target_modules, "target_modules", paths)
        chosen = [site for site in chosen if matches(site.path)]
    if config.layers_to_transform is not None:
        numbers = {layer_number(path) for path in paths}
        missing = [number for number in config.layers_to_transform if number not in numbers]
        if missing:
            present = sorted(number for number in numbers if number is not None)
            raise NoFeedForwardError("select layers", got=f"layers_to_transform {missing}", expected=f"layers of {present[:1]} to {present[-1:]}")
        chosen = [site for site in chosen if layer_number(site.path) in config.layers_to_transform]
    if config.exclude_modules is not None:
        matches = _matcher(config.exclude_modules, "exclude_modules", paths)
        chosen = [site for site in chosen if not matches(site.path)]
    if not chosen:
        raise NoFeedForwardError(
            "select feed-forward blocks",
            got="nothing left after target_modules, layers_to_transform and exclude_modules",
            expected=f"some of {', '.join(paths[:6])}, ...",
        )
    return chosen


def _matcher(patterns: str | tuple[str, ...], name: str, paths: list[str]) -> Callable[[str], bool]:
    """A test on paths: a str is a regular expression for the whole path, a tuple holds globs or endings; each must match something."""
    if isinstance(patterns, str):
        try:
            compiled = re.compile(patterns)
        except re.error as error:
            raise ConfigError("read a pattern", subject=name, got=f"{patterns!r} ({error})", expected="a regular expression or a list of globs") from error
        tests: dict[str, Callable[[str], bool]] = {patterns: lambda path: compiled.fullmatch(path) is not None}
    else:
        tests = {pattern: lambda path, pattern=pattern: fnmatch.fnmatchcase(path, pattern) or path.endswith("." + pattern) for pattern in patterns}
    for pattern, test in tests.items():
        if not any(test(path) for path in paths):
            raise NoFeedForwardError("select feed-forward blocks", subject=name, got=f"{pattern!r}, which matches nothing", hint=did_you_mean(pattern, paths))
    return lambda path: any(test(path) for test in tests.values())
