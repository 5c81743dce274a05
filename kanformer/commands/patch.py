"""`kanformer patch`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kanformer.commands.shared import load, need, need_free, text_batches, tokenizer_of
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

    need(arguments.model, "model")
    configs = configs_from(arguments.kan, keep_original=False)
    if arguments.calibration and arguments.text:
        raise ConfigError("calibrate", got="calibration and text", expected="one of them")
    calibration = None if arguments.calibration is None else load_calibration(arguments.calibration)
    model = load(arguments.model)
    config = _divided(model, configs, calibration, arguments) if arguments.param_ratios == "importance" else configs
    if arguments.dry_run:
        print(plan_surgery(model, config))
        return
    need(arguments.out, "out")
    need_free(arguments.out)
    batches = None if arguments.text is None else text_batches(model, arguments.model, arguments.text, arguments.calibration_samples, arguments.max_length)
    patch_model(model, config, calibration=calibration or batches)
    print(count(model))
    tokenizer = tokenizer_of(arguments.model)

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
