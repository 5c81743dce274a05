"""What the learned functions do on data: statistics, scores and figures. Importing this loads no matplotlib."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kanformer.conversion.histogram import ChannelStats

# Not lazily: a lazy `collect` would be hidden by the submodule of that name once something imports it.
from kanformer.interpret.collect import LayerStats, ModelStats, collect
from kanformer.interpret.scores import MapScores, score_layer

if TYPE_CHECKING:
    from kanformer.interpret.collecting.files import load_stats
    from kanformer.interpret.collecting.memory import plan_collection
    from kanformer.interpret.drawing.health import plot_health
    from kanformer.interpret.drawing.importance import plot_importance
    from kanformer.interpret.drawing.nodes import plot_input, plot_node
    from kanformer.interpret.figures import plot_layer
    from kanformer.interpret.logits import logit_effect
    from kanformer.interpret.overview import plot_overview
    from kanformer.interpret.plot import plot_model
    from kanformer.interpret.truth.ablate import ablate
    from kanformer.interpret.truth.check import truth_check
    from kanformer.interpret.truth.faithfulness import Faithfulness, faithfulness
    from kanformer.interpret.truth.hold import Target

_LAZY = {
    "Faithfulness": "truth.faithfulness",
    "Target": "truth.hold",
    "ablate": "truth.ablate",
    "faithfulness": "truth.faithfulness",
    "load_stats": "collecting.files",
    "logit_effect": "logits",
    "plan_collection": "collecting.memory",
    "plot_health": "drawing.health",
    "plot_importance": "drawing.importance",
    "plot_input": "drawing.nodes",
    "plot_layer": "figures",
    "plot_model": "plot",
    "plot_node": "drawing.nodes",
    "plot_overview": "overview",
    "truth_check": "truth.check",
}

__all__ = [
    "ChannelStats",
    "Faithfulness",
    "LayerStats",
    "MapScores",
    "ModelStats",
    "Target",
    "ablate",
    "collect",
    "faithfulness",
    "load_stats",
    "logit_effect",
    "plan_collection",
    "plot_health",
    "plot_importance",
    "plot_input",
    "plot_layer",
    "plot_model",
    "plot_node",
    "plot_overview",
    "score_layer",
    "truth_check",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
