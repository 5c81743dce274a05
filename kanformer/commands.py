"""The short commands: patch, compare, plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kanformer.training.arguments import option

if TYPE_CHECKING:
    from torch import nn

    from kanformer.config import KANConfig
    from kanformer.surgery.calibrating.calibration import Calibration


@dataclass
class PatchArguments:
    """Settings of `kanformer patch`."""

    model: str = option("", "folder or hub id")
    out: str = option("", "folder for the patched model")
    kan: dict | list = option({}, "KANConfig values, for example --kan.init prune --kan.param_ratio 0.5, or a list of them")
    text: str | None = option(None, "calibration text, a text per line")
    calibration_samples: int = option(256, "texts to calibrate on", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    calibration: str | None = option(None, "folder that kanformer calibrate wrote, instead of text")
    param_ratios: str = option("uniform", "of the blocks: kan.param_ratio for each, or by importance so that all together have it", ("uniform", "importance"))
    ratio_floor: float | None = option(None, "least ratio of a block, by importance; absent: a quarter of kan.param_ratio", gt=0, le=1)
    ratio_ceil: float = option(1.0, "greatest ratio of a block, by importance", gt=0, le=1)
    remote_code: bool = option(False, "write code beside it, so that trust_remote_code=True loads it without importing kanformer")
    dry_run: bool = option(False, "print the plan and stop")


@dataclass
class CompareArguments:
    """Settings of `kanformer compare`."""

    model: str = option("", "folder or hub id of a patched model")
    json: bool = option(False, "print JSON")


@dataclass
class PlotArguments:
    """Settings of `kanformer plot`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("figures", "folder for the figures and functions.csv")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    top: int = option(48, "functions to draw per layer", ge=1)
    y: str = option("free", "y-scale: one per function, or shared in a figure so that small functions look small", ("free", "shared"))
    format: str = option("png", "of the figures", ("png", "svg", "pdf"))


def patch(arguments: PatchArguments) -> None:
    """Patches a checkpoint and saves it, with a model card, and its tokenizer where it has one."""
    from kanformer.configs import configs_from
    from kanformer.errors import ConfigError
    from kanformer.surgery.calibrating.files import load_calibration
    from kanformer.surgery.compare import compare as count
    from kanformer.surgery.folders import write_folder
    from kanformer.surgery.planning.plan import plan_surgery
    from kanformer.surgery.replacing.apply import patch_model
    from kanformer.surgery.saving.hub import save_pretrained

    _need(arguments.model, "model")
    configs = configs_from(arguments.kan, keep_original=False)
    if arguments.calibration and arguments.text:
        raise ConfigError("calibrate", got="calibration and text", expected="one of them")
    calibration = None if arguments.calibration is None else load_calibration(arguments.calibration)
    model = _load(arguments.model)
    config = _divided(model, configs, calibration, arguments) if arguments.param_ratios == "importance" else configs
    if arguments.dry_run:
        print(plan_surgery(model, config))
        return
    _need(arguments.out, "out")
    _need_free(arguments.out)
    batches = None if arguments.text is None else _batches(model, arguments.model, arguments.text, arguments.calibration_samples, arguments.max_length)
    patch_model(model, config, calibration=calibration or batches)
    print(count(model))
    tokenizer = _tokenizer(arguments.model)

    write_folder(Path(arguments.out), lambda folder: save_pretrained(model, folder, tokenizer=tokenizer, remote_code=arguments.remote_code))
    print(f"saved: {arguments.out}")


def _divided(model: nn.Module, configs: tuple[KANConfig, ...], calibration: Calibration | None, arguments: PatchArguments) -> list[KANConfig]:
    """A config per block that the one config selects, see `ratios_from_importance`."""
    from kanformer.errors import ConfigError
    from kanformer.surgery.calibrating.ratios import SELECTING, ratios_from_importance
    from kanformer.surgery.planning.plan import plan_surgery

    action = "divide the parameters by importance"
    if calibration is None:
        raise ConfigError(action, got="no calibration", hint="Make one with kanformer calibrate, and give it with --calibration.")
    first, *others = configs
    if others or first.param_ratio is None:
        raise ConfigError(action, got=f"{len(configs)} configs, init={first.init!r}", expected="one config with init='prune' and a param_ratio")
    paths = [block.path for block in plan_surgery(model, first).blocks]
    bounds = {"floor": arguments.ratio_floor, "ceil": arguments.ratio_ceil}
    return ratios_from_importance(calibration, first.param_ratio, config=first.replace(**SELECTING), paths=paths, **bounds)


def compare(arguments: CompareArguments) -> None:
    """Prints the comparison as a table or JSON."""
    from kanformer.surgery.compare import compare as count

    _need(arguments.model, "model")
    found = count(_load(arguments.model))
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)


def plot(arguments: PlotArguments) -> None:
    """Draws every layer on data and says where the files are."""
    from kanformer.interpret import plot_model

    _need(arguments.model, "model")
    model = _load(arguments.model)
    batches = _batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length)
    files = plot_model(model, batches, Path(arguments.out), top=arguments.top, formats=(arguments.format,), y=arguments.y, progress=print)
    print(f"{len(files)} files in {arguments.out}")


def _load(name: str):
    from kanformer.surgery.saving.loading import load_model, quiet_transformers

    quiet_transformers()
    return load_model(name)


def _tokenizer(name: str):
    from kanformer.errors import CheckpointError
    from kanformer.surgery.saving.loading import load_tokenizer

    try:
        return load_tokenizer(name)
    except CheckpointError:
        return None  # image models have none


def _batches(model: nn.Module, name: str, text: str | None, count: int, max_length: int):
    from kanformer.demo.corpus import standard_library
    from kanformer.surgery.saving.loading import load_tokenizer
    from kanformer.training.data import read_lines
    from kanformer.training.models import calibration_batches, check_length

    check_length(model, max_length)
    if text is None:
        print("data: docstrings of Python's standard library (give your own with --text FILE)")
    texts = read_lines(text) if text is not None else standard_library().held_out
    return calibration_batches(load_tokenizer(name), texts, count, max_length)


def _need(value: str, name: str) -> None:
    from kanformer.errors import ConfigError

    if not value:
        raise ConfigError("run the command", got=f"no {name}", hint=f"Give --{name}; see --help.")


def _need_free(out: str) -> None:
    from kanformer.errors import ConfigError

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError("write the patched model", subject=f"out={out}", got="a path that is in use", hint="Choose a new folder.")
