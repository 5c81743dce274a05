"""Trackers (tensorboard, wandb, trackio, whatever accelerate knows) that get the lines of metrics.jsonl too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kanformer.errors import ConfigError, did_you_mean
from kanformer.training.settings import LoopArguments


def wanted_trackers(report_to: str | list) -> list[str]:
    """The names in `report_to`, each of them a tracker that can be imported; "none" and "all" are what they are in transformers.

    Raises:
        ConfigError: an unknown name, or a tracker that is not installed.
    """
    names = [str(name).strip() for name in (report_to.split(",") if isinstance(report_to, str) else report_to)]
    names = [name for name in dict.fromkeys(names) if name not in ("", "none")]
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = sorted(str(name) for name in get_available_trackers())
    if "all" in names:
        if not installed:
            raise ConfigError("report the metrics", subject="report_to=all", got="no tracker that is installed", hint="Install one: pip install tensorboard.")
        return installed
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            raise ConfigError("report the metrics", subject="report_to", got=repr(name), hint=did_you_mean(name, ["none", "all", *known]))
        if name not in installed:
            hint = f"pip install {name.replace('_', '-')}, or set report_to to {' or '.join(['none', *installed])}."
            raise ConfigError("report the metrics", subject=f"report_to={name}", got=f"{name}, which is not installed", hint=hint)
    return names


def start_trackers(accelerator: Any, arguments: LoopArguments, start_step: int) -> None:
    """Opens a run in every tracker of the accelerator, with the settings; after a resume tensorboard drops what the crash had left after `start_step`."""
    if not accelerator.log_with:
        return
    name = arguments.run_name or Path(arguments.output_dir).name
    options = {
        "tensorboard": {"purge_step": start_step + 1} if start_step else {},
        "wandb": {"name": name, "dir": arguments.output_dir},
        "trackio": {"name": name},
    }
    plain = {key: value if isinstance(value, bool | int | float | str) else repr(value) for key, value in dataclasses.asdict(arguments).items()}
    project = "tensorboard" if [str(tracker) for tracker in accelerator.log_with] == ["tensorboard"] else arguments.project
    accelerator.init_trackers(project, config=plain, init_kwargs=options)
