"""Statistics in a folder: one safetensors file and one JSON file, no pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.errors import CheckpointError
from kanformer.interpret.collecting.contexts import Contexts
from kanformer.interpret.collecting.stats import DataUsed, HiddenStats, LayerStats, ModelStats, OutputStats
from kanformer.interpret.logits import LogitEffect
from kanformer.interpret.scoring.table import Scores
from kanformer.interpret.truth.header import Faithfulness
from kanformer.surgery.folders import MARKER, reason, write_folder

SCHEMA, VERSION = "kanformer.stats", 2  # 1 had no header; it is still read
_JSON, _TENSORS = "stats.json", "stats.safetensors"
_KINDS = {kind.__name__: kind for kind in (ChannelStats, Contexts, DataUsed, Faithfulness, HiddenStats, LayerStats, LogitEffect, OutputStats, Scores)}


def save_stats(stats: ModelStats, folder: str | Path) -> None:
    """Writes `stats.json` and `stats.safetensors`, whole or not at all; a folder of an earlier save is replaced, any other refused.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / _JSON).exists())):
        raise CheckpointError("save the statistics", subject=folder, got="something that is no folder of statistics", hint="Choose another folder.")
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    content = {"schema": SCHEMA, "version": VERSION, "model": stats.model, "logits_note": stats.logits_note, "header": _pack(stats.header, tensors, names)}
    content |= {"data": _pack(stats.data, tensors, names), "logits": _pack(stats.logits, tensors, names), "layers": _pack(dict(stats), tensors, names)}

    def fill(place: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / _TENSORS)
        (place / _JSON).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    write_folder(folder, fill)


def load_stats(folder: str | Path) -> ModelStats:
    """What `ModelStats.save` wrote, to the bit.

    Raises:
        CheckpointError: no such folder, an unfinished or damaged one, or one of a later version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        if not (folder / MARKER).exists():
            raise FileNotFoundError(f"no {MARKER} in it")
        content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError("load the statistics", subject=folder, got=reason(error), expected="a folder that stats.save(folder) wrote") from error
    if content.get("schema") != SCHEMA or content.get("version") not in (1, VERSION):
        got = f"{content.get('schema')} version {content.get('version')}"
        raise CheckpointError("load the statistics", subject=folder, got=got, expected=f"{SCHEMA} version {VERSION}", hint="Use the kanformer that wrote it.")
    try:
        stats = ModelStats(_unpack(content["layers"], tensors), data=_unpack(content["data"], tensors), model=content["model"])
        stats.logits, stats.logits_note = _unpack(content["logits"], tensors), content["logits_note"]
        stats.header = _unpack(content.get("header"), tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("load the statistics", subject=folder, got=f"files that do not belong together ({error})") from error
    return stats


def _pack(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The value as JSON, tensors by their number; one that occurs twice is stored once."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = value
        return {"tensor": names[id(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _pack(getattr(value, field.name), tensors, names) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        return {"items": [[key, _pack(each, tensors, names)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(each, tensors, names) for each in value]}
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "kind" in value:
        return _KINDS[value["kind"]](**{name: _unpack(each, tensors) for name, each in value["fields"].items()})
    if "items" in value:
        return {key: _unpack(each, tensors) for key, each in value["items"]}
    return tuple(_unpack(each, tensors) for each in value["tuple"])
