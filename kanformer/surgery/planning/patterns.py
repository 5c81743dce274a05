"""Names, globs and regular expressions for the paths of blocks, and what was meant where they match nothing."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable

from kanformer.errors import ConfigError
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folding import few, fold_paths
from kanformer.surgery.modules import join

Patterns = str | tuple[str, ...]


def pattern_tests(patterns: Patterns, setting: str) -> dict[str, Callable[[str], bool]]:
    """A test on paths for each pattern: a str is one regular expression for the whole path, a tuple holds globs and endings.

    Raises:
        ConfigError: no regular expression.
    """
    if isinstance(patterns, str):
        return {patterns: _expression(patterns, setting)}
    return {pattern: lambda path, pattern=pattern: fits(pattern, path) for pattern in patterns}


def fits(pattern: str, path: str) -> bool:
    """Whether a glob matches the whole path, or a name or glob its ending."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, "*." + pattern)


def near_misses(pattern: str, is_expression: bool, sites: Iterable[Site]) -> str:
    """A sentence on what the pattern could have meant, and on what there is."""
    sites = list(sites)
    paths = [site.path for site in sites]
    hint = f"The blocks are {few(path for path, _ in fold_paths(paths))}."
    if is_expression and any(fits(pattern, path) for path in paths):
        return f"A str is a regular expression for the whole path; for names and globs write a list: [{pattern!r}]. {hint}"
    for site in sites:
        part = next((part for part in site.spec.parts if fits(pattern, join(site.owner_path, part))), None)
        if part is not None:
            return f"{join(site.owner_path, part)} is a part of the block {site.path}: name the block. {hint}"
    endings = {path.split(".", start)[-1] for path in paths for start in range(path.count(".") + 1)}
    near = difflib.get_close_matches(pattern, sorted(endings), n=3, cutoff=0.6)
    return (f"Did you mean {' or '.join(map(repr, near))}? " if near else "") + hint


def _expression(pattern: str, setting: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError("read a pattern", subject=setting, got=f"{pattern!r} ({error})", expected="a regular expression or a list of globs") from error
    return lambda path: compiled.fullmatch(path) is not None
