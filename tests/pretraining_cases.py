"""A minute-sized grid: text, settings, and what a test wants to know of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kanformer.pretraining.settings import PretrainArguments
from training_cases import WORDS

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 8, "grid_size": 4, "full_grid_size": 3}
SIZES: dict[str, Any] = {**SHAPE, "mlp_width": 96, "swiglu_width": 64}
GRID: dict[str, Any] = {
    **SIZES,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "eval_blocks": 10,
    "tolerance": 0.08,
    "learning_rates": [1e-3, 1e-2],
    "seeds": 2,
    "time_rounds": 3,
    "backend": "eager",
    "disable_tqdm": True,
}


def write_story(path: Path, words: int = 700, seed: int = 0) -> str:
    """A text of made-up words, with line breaks and letters of more than one byte; returns its path."""
    dice = random.Random(seed)
    path.write_text("".join(dice.choice(WORDS) + dice.choice(["  ", " ", ",\n", " ä"]) for _ in range(words)), encoding="utf-8")
    return str(path)


def settings(folder: Path, **changes: Any) -> PretrainArguments:
    """A grid in `folder` over a text beside it."""
    text = folder / "story.txt"
    if not text.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_story(text)
    return PretrainArguments(**{"text": str(text), "output_dir": str(folder / "out"), **GRID, **changes})


def results(folder: Path) -> dict[str, dict]:
    """The finished runs of a grid by their path under the corpus' folder."""
    base = folder / "out" / "story"
    return {str(path.parent.relative_to(base)): json.loads(path.read_text()) for path in sorted(base.glob("*/*/*/all_results.json"))}
