"""kanformer turns the feed-forward blocks of Hugging Face transformers into Kolmogorov-Arnold networks.

Importing it registers the `kan` checkpoints with transformers (when transformers itself is imported) and loads nothing else;
every public name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kanformer.surgery import register as _register

__version__ = "0.2.0"

_PUBLIC = {
    "KANConfig": "kanformer.config",
    "KANLinear": "kanformer.layers",
    "SharedKANLinear": "kanformer.layers",
    "KANFeedForward": "kanformer.layers",
    "FFNSpec": "kanformer.surgery.finding.spec",
    "KAN": "kanformer.network",
    "discover": "kanformer.surgery.tracing.discovery",
    "plan_surgery": "kanformer.surgery.planning.plan",
    "patch_model": "kanformer.surgery.replacing.apply",
    "unpatch_model": "kanformer.surgery.replacing.restore",
    "save_pretrained": "kanformer.surgery.saving.hub",
    "save_delta": "kanformer.surgery.saving.delta",
    "load_delta": "kanformer.surgery.saving.delta",
    "use_backend": "kanformer.ops",
    "calibrate": "kanformer.surgery.calibrating.calibrate",
    "load_calibration": "kanformer.surgery.calibrating.files",
    "ratios_from_importance": "kanformer.surgery.calibrating.ratios",
    "regularize": "kanformer.conversion.regularize",
    "without_functions": "kanformer.conversion.functions_off",
    "compare": "kanformer.surgery.compare",
    "update_grids": "kanformer.surgery.grids",
    "refine_grids": "kanformer.surgery.grids",
    "outside_fractions": "kanformer.surgery.grids",
    "KANCallback": "kanformer.training.callback",
    "make_optimizer": "kanformer.training.optimizer",
    "collect": "kanformer.interpret",
    "plot_layer": "kanformer.interpret",
    "plot_model": "kanformer.interpret",
    "fit_symbolic": "kanformer.interpret.symbolic",
    "prune": "kanformer.interpret.pruning",
    "prune_curve": "kanformer.interpret.pruning",
    "snap": "kanformer.interpret.symbolic",
    "unsnap": "kanformer.interpret.symbolic",
    "register_function": "kanformer.interpret.symbolic",
    "unregister_function": "kanformer.interpret.symbolic",
    "KanformerError": "kanformer.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from kanformer.config import KANConfig
    from kanformer.conversion.functions_off import without_functions
    from kanformer.conversion.regularize import regularize
    from kanformer.errors import KanformerError
    from kanformer.interpret import collect, plot_layer, plot_model
    from kanformer.interpret.pruning import prune, prune_curve
    from kanformer.interpret.symbolic import fit_symbolic, register_function, snap, unregister_function, unsnap
    from kanformer.layers import KANFeedForward, KANLinear, SharedKANLinear
    from kanformer.network import KAN
    from kanformer.ops import use_backend
    from kanformer.surgery.calibrating.calibrate import calibrate
    from kanformer.surgery.calibrating.files import load_calibration
    from kanformer.surgery.calibrating.ratios import ratios_from_importance
    from kanformer.surgery.compare import compare
    from kanformer.surgery.finding.spec import FFNSpec
    from kanformer.surgery.grids import outside_fractions, refine_grids, update_grids
    from kanformer.surgery.planning.plan import plan_surgery
    from kanformer.surgery.replacing.apply import patch_model
    from kanformer.surgery.replacing.restore import unpatch_model
    from kanformer.surgery.saving.delta import load_delta, save_delta
    from kanformer.surgery.saving.hub import save_pretrained
    from kanformer.surgery.tracing.discovery import discover
    from kanformer.training.callback import KANCallback
    from kanformer.training.optimizer import make_optimizer


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kanformer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_register.register()
