"""A network on disk: config.json and model.safetensors in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kanformer.errors import CheckpointError, ConfigError
from kanformer.network.kan import KAN
from kanformer.surgery.folders import reason, write_folder

SCHEMA, VERSION = "kanformer.kan", 1


def save(network: KAN, folder: str | Path) -> None:
    """See `KAN.save`."""
    from safetensors.torch import save_file

    if not isinstance(network.settings["base"], str):
        raise ConfigError("save a KAN", got=f"base={network.settings['base']!r}", expected="a base function by name, so that loading can find it")
    config = {
        "schema": SCHEMA,
        "version": VERSION,
        "width": network.width,
        "mult_arity": network.levels[0].arity,
        **network.settings,
        "dtype": str(network.maps[0].kan_coef.dtype).removeprefix("torch."),
    }

    def fill(place: Path) -> None:
        (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, place / "model.safetensors")

    write_folder(Path(folder), fill)


def load(folder: str | Path, *, device=None) -> KAN:
    """See `KAN.load`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    action, place = "load a KAN", Path(folder)
    config = _config(place)
    try:
        state = load_file(place / "model.safetensors", device=str(device or "cpu"))
        dtype = getattr(torch, config.pop("dtype"))
        network = KAN(config.pop("width"), seed=0, device=device, dtype=dtype, **{**config, "grid_range": tuple(config["grid_range"])})
        network.load_state_dict(state)
    except OSError as error:
        raise CheckpointError(action, subject=str(place), got=reason(error)) from error
    except (SafetensorError, RuntimeError, ConfigError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(action, subject=str(place), got=str(error).splitlines()[0], expected="the files that KAN.save wrote") from error
    return network


def _config(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / "config.json").read_text())
    except OSError as error:
        raise CheckpointError("load a KAN", subject=str(place), got=reason(error), expected="a folder that KAN.save wrote") from error
    except ValueError as error:
        raise CheckpointError("load a KAN", subject=f"{place}/config.json", got=f"no JSON: {error}") from error
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA or found.pop("version", None) != VERSION:
        raise CheckpointError("load a KAN", subject=f"{place}/config.json", got="another schema or version", expected=f"{SCHEMA}, version {VERSION}")
    return found
