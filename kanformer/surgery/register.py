"""Makes stock `from_pretrained` understand patched checkpoints, without importing transformers before it is needed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def register() -> None:
    """Registers the `kan` entry of transformers' quantizer table now, or when that module is imported."""
    if _TARGET in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_now() -> None:
    from kanformer.surgery.saving import persist

    persist.register_with_transformers()


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the target be imported as usual, and registers right after."""

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)  # the ordinary finders take over, and nothing of ours stays
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register_now()

    def __getattr__(self, name: str):
        return getattr(self.inner, name)
