"""Calibrations on disk: a JSON file that says what they are of, and a safetensors file per block. Nothing in them is run."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

from kanformer.conversion import FFNStatistics
from kanformer.conversion.error_curve import ErrorCurve
from kanformer.conversion.packing import from_tensors, to_tensors
from kanformer.errors import CheckpointError
from kanformer.surgery.assemble import site_path
from kanformer.surgery.calibrating.calibration import BlockForm, Calibration
from kanformer.surgery.folders import reason, recover, write_folder

INFO, FORMAT, VERSION = "calibration.json", "kanformer calibration", 1
_ACTION = "read the calibration"
_DAMAGED = "A file is damaged or cut short, or belongs to another calibration. Copy the folder again, or calibrate again."
_KEYS = {"format", "version", "model_class", "base_model", "gram", "linear", "blocks", "running"}
_BLOCK_KEYS = {"path", "site", "file", "crc32", "form", "parameters", "tokens", "linear_share", "importance", "curve"}


def load_calibration(path: str | Path) -> Calibration:
    """Reads what `Calibration.save` or `kanformer calibrate` wrote: `patch_model` makes the same bits of it as of the one in memory.

    Raises:
        CheckpointError: no such folder, files that are damaged, cut short or of something else, or a calibration that is not finished.
    """
    calibration, running = read_calibration(Path(path))
    if running is not None:
        raise CheckpointError(
            _ACTION, subject=path, got="one that is not finished", hint="Go on with it: kanformer calibrate with the same settings and --resume."
        )
    return calibration


def write_calibration(calibration: Calibration, folder: Path, running: dict[str, Any] | None = None) -> None:
    """Writes the folder; `running` is what only an unfinished one has.

    Raises:
        CheckpointError: it cannot be written.
    """

    def fill(aside: Path) -> None:
        from safetensors.torch import save_file

        blocks = []
        for number, (path, seen) in enumerate(calibration.statistics.items()):
            file = aside / f"block-{number:05}.safetensors"
            save_file(to_tensors(seen), file)
            share = seen.linear_share() if seen.tokens and running is None else None
            blocks.append({"file": file.name, "crc32": _checksum(file), "linear_share": share, **_entry(calibration, path)})
        linear = any(seen.keep_affine for seen in calibration.statistics.values())
        facts = {"model_class": calibration.model_class, "base_model": calibration.base_model, "gram": calibration.gram, "linear": linear}
        values = {"format": FORMAT, "version": VERSION, **facts, "running": running, "blocks": blocks}
        (aside / INFO).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    write_folder(folder, fill, {"format": FORMAT})


def read_calibration(folder: Path) -> tuple[Calibration, dict[str, Any] | None]:
    """The calibration in a folder, and what was said of its run if it is unfinished.

    Raises:
        CheckpointError: see `load_calibration`.
    """
    recover(folder)
    try:
        values = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = _DAMAGED if (folder / INFO).exists() else "A calibration is a folder that kanformer calibrate or Calibration.save wrote."
        raise CheckpointError(_ACTION, subject=folder, got=f"{INFO}: {reason(error)}", hint=hint) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(_ACTION, subject=folder, got=f"a {INFO} of something else", expected=f"format {FORMAT!r}")
    if type(values.get("version")) is int and values["version"] > VERSION:
        raise CheckpointError(_ACTION, subject=folder, got=f"version {values['version']}", expected=str(VERSION), hint="Install a newer kanformer.")
    try:
        return _rebuilt(folder, values), values["running"]
    except CheckpointError:
        raise
    except Exception as error:  # whatever values from a file do
        raise CheckpointError(_ACTION, subject=folder, got=f"{type(error).__name__}: {reason(error)}", hint=_DAMAGED) from error


def _entry(calibration: Calibration, path: str) -> dict[str, Any]:
    form, curve, site = calibration.forms[path], calibration.curves.get(path), site_path(path)
    return {
        "path": path,
        "site": site,
        "form": dataclasses.asdict(form),
        "parameters": form.parameters,
        "tokens": calibration.statistics[path].tokens,
        "importance": calibration.importance.get(site),
        "curve": None if curve is None else dataclasses.asdict(curve),
    }


def _rebuilt(folder: Path, values: dict[str, Any]) -> Calibration:
    if set(values) != _KEYS or values["version"] != VERSION or any(set(block) != _BLOCK_KEYS for block in values["blocks"]):
        raise ValueError(f"{INFO} has not the keys of version {VERSION}")
    texts, flags = [values["model_class"], values["base_model"]], [values["gram"], values["linear"]]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"{INFO} has values of other types")
    statistics: dict[str, FFNStatistics] = {}
    forms, importance, curves = {}, {}, {}
    for block in values["blocks"]:
        path = block["path"]
        statistics[path], forms[path] = _statistics(folder, block, values), BlockForm(**block["form"])
        seen, form = statistics[path], forms[path]
        widths = (seen.inputs.total.numel(), seen.hidden.total.numel()) if seen.tokens else (form.in_features, form.hidden_features)
        if (seen.tokens, *widths) != (block["tokens"], form.in_features, form.hidden_features):
            raise ValueError(f"{block['file']} is not of the block {path}")
        if block["importance"] is not None:
            importance[block["site"]] = float(block["importance"])
        if block["curve"] is not None:
            curve = block["curve"]
            curves[path] = ErrorCurve(tuple(map(int, curve["widths"])), tuple(map(float, curve["errors"])), float(curve["variance"]))
    return Calibration(statistics, values["gram"], forms, importance, curves, *texts)


def _statistics(folder: Path, block: dict[str, Any], values: dict[str, Any]) -> FFNStatistics:
    from safetensors.torch import load_file

    file = folder / Path(block["file"]).name
    if _checksum(file) != block["crc32"]:
        raise CheckpointError(_ACTION, subject=file, got=f"{file.stat().st_size:,} bytes with another checksum", hint=_DAMAGED)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # in memory of their own: sums go on in it, aligned as ever
    return from_tensors(block["path"], tensors, gram=values["gram"], affine=values["linear"])


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as stream:
        while piece := stream.read(2**22):
            checksum = zlib.crc32(piece, checksum)
    return checksum
