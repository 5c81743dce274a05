"""What a delta says of itself: kanformer.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from kanformer.errors import CheckpointError
from kanformer.surgery.folders import reason
from kanformer.surgery.saving.verify import short

INFO = "kanformer.json"
VERSION = 1


@dataclass(frozen=True)
class DeltaInfo:
    """kanformer.json: which model and which base the tensors belong to."""

    version: int
    base_model: str | None
    base_sha256: str
    model_class: str
    dtype: str

    @classmethod
    def read(cls, path: str) -> DeltaInfo:
        """Reads what `write` wrote.

        Raises:
            CheckpointError: no such file, a newer version, missing or foreign keys, wrong types.
        """
        action, names = "read the KAN delta", {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(action, subject=path, got=reason(error)) from error
        if isinstance(values, dict) and type(values.get("version")) is int and values["version"] > VERSION:
            raise CheckpointError(action, subject=path, got=f"version {values['version']}", expected=str(VERSION), hint="Install a newer kanformer.")
        texts = [values.get(name) for name in names - {"version", "base_model"}] if isinstance(values, dict) else []
        good = texts and set(values) == names and values["version"] == VERSION and all(isinstance(text, str) for text in texts)
        if not good or not isinstance(values["base_model"], str | None) or not isinstance(getattr(torch, values["dtype"], None), torch.dtype):
            raise CheckpointError(action, subject=path, got=short(values), expected=f"version {VERSION}, a dtype, and texts for {sorted(names)}")
        return cls(**values)

    def write(self, path: Path) -> None:
        """The JSON beside the tensors of a delta."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
