"""One run in a process of its own: `python -m kanformer.study.one FOLDER`, where FOLDER/run.json says what is to be done."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanformer.config import KANConfig
from kanformer.demo.children import save
from kanformer.errors import KanformerError, TrainingDiverged
from kanformer.study.linear import load_maps
from kanformer.study.measure import measure
from kanformer.surgery.folders import MARKER, recover, replace_file, write_folder
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model, load_tokenizer, quiet_transformers
from kanformer.training.arguments import from_mapping
from kanformer.training.checkpoint import RESULTS
from kanformer.training.distill import distill
from kanformer.training.entry import BAD_INPUT, DIVERGED
from kanformer.training.settings import DistillArguments

RUN, RESULT = "run.json", "result.json"


def run_one(folder: Path) -> dict[str, Any]:
    """Trains, or builds, and measures; writes and returns the result, in which `settings` are those of run.json."""
    started = time.time()
    quiet_transformers()
    task = json.loads((folder / RUN).read_text(encoding="utf-8"))
    settings, places = task["settings"], task["places"]
    if settings["method"] == "linear":
        found = measure(_patched(places, [{"edges": "mlp", "keep_original": False}]), places, load_maps(Path(places["start"])))
    elif not places["stages"]:
        found = measure(_patched(places, settings["configs"]), places)
    else:
        found = _trained(folder, settings, places)
    result = {**found, "seconds": round(time.time() - started, 1), "settings": settings}
    replace_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    _tidy(folder)
    return result


def _patched(places: dict[str, Any], configs: list[dict[str, Any]]) -> nn.Module:
    """The teacher, patched without data."""
    model = load_model(places["teacher"], attn_implementation=places["attn_implementation"])
    return patch_model(model, [KANConfig.from_dict(values) for values in configs])


def _trained(folder: Path, settings: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    model = Path(places["start"]) if places["start"] else _random_start(folder, settings, places)
    stages = []
    for number, values in enumerate(places["stages"]):
        out = folder / f"stage-{number}"
        recover(out / "model")
        if (out / RESULTS).is_file() and (out / "model" / MARKER).is_file():
            stages.append(json.loads((out / RESULTS).read_text(encoding="utf-8")))
        else:
            stages.append(distill(from_mapping(DistillArguments, {**values, "model_name_or_path": str(model), "output_dir": str(out)}, "run.json")))
        model = out / "model"
    found = measure(load_model(str(model), attn_implementation=places["attn_implementation"]), places)
    if places["keep_model"]:
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.copytree(model, folder / "model")
    return {**found, "tokens": sum(stage["tokens"] for stage in stages), "steps": sum(stage["steps"] for stage in stages), "stages": stages}


def _random_start(folder: Path, settings: dict[str, Any], places: dict[str, Any]) -> Path:
    start = folder / "start"
    if not (start / MARKER).is_file():
        torch.manual_seed(settings["seed"])
        model, tokenizer = _patched(places, settings["configs"]), load_tokenizer(places["teacher"])
        write_folder(start, lambda aside: save(model, tokenizer, aside))
    return start


def _tidy(folder: Path) -> None:
    """Leaves of a finished run its result, its curve and, if asked for, its model."""
    shutil.rmtree(folder / "start", ignore_errors=True)
    for stage in folder.glob("stage-*"):
        for path in (*stage.glob("checkpoint-*"), stage / "model"):
            shutil.rmtree(path, ignore_errors=True)


def _end_with_parent() -> None:
    """Ends this process when the one that holds the other end of its standard input does: no run goes on unseen beside its own repetition."""
    while os.read(0, 1024):  # not by sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def main() -> None:
    """Exits with 2 on bad input and 3 when the loss diverged, as the training scripts do."""
    if not sys.stdin.isatty():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_one(Path(sys.argv[1]))
    except KanformerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(DIVERGED if isinstance(error, TrainingDiverged) else BAD_INPUT) from None


if __name__ == "__main__":
    main()
