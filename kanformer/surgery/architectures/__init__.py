"""One small declarative file per way of writing a feed-forward block. A file with `SPECS` is found by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from kanformer.surgery.finding.spec import FFNSpec


@functools.cache
def all_specs() -> tuple[FFNSpec, ...]:
    """Every spec of this folder, in the order of the file names."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in sorted(info.name for info in pkgutil.iter_modules(__path__)))
    return tuple(spec for module in modules for spec in module.SPECS)
