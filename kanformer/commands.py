"""The short commands: patch, compare, plot, symbolic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass
class SymbolicArguments:
    """Settings of `kanformer symbolic`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("formulas", "folder for formulas.csv and formulas.json, and for the snapped model (model)")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    layer: str | None = option(None, "paths or numbers of blocks, with commas between them; absent: all")
    top: int | None = option(None, "functions to fit per map, the most important ones; absent: all", ge=1)
    library: str | None = option(None, "families of formulas, with commas between them, for example tanh,silu,x^2; absent: all")
    tol_node: float = option(0.01, "largest error of a formula relative to its node's standard deviation", ge=0)
    r2_min: float = option(0.99, "least R2 of a formula", ge=0, le=1)
    tie: float = option(0.001, "R2 within which families are equally good, so that the simplest of them is taken", ge=0)
    snap: bool = option(False, "replace the functions by their formulas, measure the loss, and save the model")
    loss_budget: float | None = option(None, "how much the loss may rise by snapping; absent: no limit", ge=0)
    trainable: bool = option(False, "the formulas' numbers become parameters of the snapped model")


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


def symbolic(arguments: SymbolicArguments) -> None:
    """Fits formulas, prints the outcomes per layer, writes the tables, and on demand saves a snapped model."""
    from kanformer.errors import ConfigError
    from kanformer.interpret import collect
    from kanformer.interpret.plot import make_folder
    from kanformer.interpret.symbolic import fit_symbolic, snap, write_csv, write_json
    from kanformer.surgery.folders import write_folder

    _need(arguments.model, "model")
    if arguments.loss_budget is not None and not arguments.snap:
        raise ConfigError("fit formulas", got="a loss_budget without snapping", hint="Add --snap.")
    out = Path(arguments.out)
    if arguments.snap:
        _need_free(str(out / "model"))
    model = _load(arguments.model)
    batches = list(_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    layers = None if arguments.layer is None else [int(word) if word.lstrip("-").isdigit() else word for word in _words(arguments.layer)]
    library = None if arguments.library is None else _words(arguments.library)
    tolerances: dict[str, Any] = {"tol_node": arguments.tol_node, "r2_min": arguments.r2_min, "tie": arguments.tie}
    fits = fit_symbolic(model, collect(model, batches), layer=layers, edges=arguments.top, library=library, progress=print, **tolerances)
    print(fits)
    make_folder(out, "the formulas")
    write_csv(fits, out / "formulas.csv")
    write_json(fits, out / "formulas.json")
    print(f"formulas.csv and formulas.json in {out}")
    if not arguments.snap:
        return
    done = snap(model, fits, loss_budget=arguments.loss_budget, batches=_labelled(model, batches), trainable=arguments.trainable, inplace=True)
    print(done)
    tokenizer = _tokenizer(arguments.model)
    write_folder(out / "model", lambda folder: _save(model, tokenizer, folder))
    print(f"saved: {out / 'model'}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _save(model: nn.Module, tokenizer, folder: Path) -> None:
    from kanformer.surgery.saving.hub import save_pretrained

    save_pretrained(model, folder, tokenizer=tokenizer)


def _labelled(model: nn.Module, batches: list) -> list:
    """With labels for a causal language model; other models are measured by how far their outputs move."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return batches
    return [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in batches]


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
