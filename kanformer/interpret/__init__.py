"""What the learned functions do on data: statistics, scores and figures. Importing this loads no matplotlib."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kanformer.conversion.histogram import ChannelStats

# Not lazily: a lazy `collect` would be hidden by the submodule of that name once something imports it.
from kanformer.interpret.collect import LayerStats, collect
from kanformer.interpret.scores import MapScores, score_layer

if TYPE_CHECKING:
    from kanformer.interpret.figures import plot_layer
    from kanformer.interpret.overview import plot_overview
    from kanformer.interpret.plot import plot_model

_LAZY = {"plot_layer": "figures", "plot_model": "plot", "plot_overview": "overview"}

__all__ = ["ChannelStats", "LayerStats", "MapScores", "collect", "plot_layer", "plot_model", "plot_overview", "score_layer"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
