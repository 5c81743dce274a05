"""Code beside a checkpoint, so that `from_pretrained(..., trust_remote_code=True)` loads it in a process that never imported kanformer."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from kanformer.errors import CheckpointError, SurgeryError
from kanformer.surgery.folders import reason, replace_file
from kanformer.surgery.saving.auto_classes import auto_classes

MODULE = "modeling_kanformer"
_HEAD = '''"""Lets transformers load this checkpoint with trust_remote_code=True: importing kanformer is all that it takes.

The classes are transformers' own; kanformer (pip install kanformer) puts the Kolmogorov-Arnold blocks into them.
"""

import kanformer
import transformers


class _Stock:
    @classmethod
    def is_custom_code(cls):
        return False  # so that transformers treats names of weights as in its own class
'''


def write_remote_code(model: nn.Module, folder: Path) -> None:
    """Adds modeling_kanformer.py to the folder of a saved model, and `auto_map` to its config.json.

    Raises:
        SurgeryError: the model is of a class that transformers does not have. CheckpointError: a file cannot be written.
    """
    import transformers

    names = auto_classes(model)
    own = type(model).__name__
    if not hasattr(transformers, own):
        raise SurgeryError("write the code beside the model", subject=own, got="a class that is not one of transformers'", hint="Leave remote_code=True out.")
    names.setdefault("AutoModel", own)
    classes = [f'\n\nclass {name}(_Stock, transformers.{name}):\n    """With KAN-FFNs."""\n' for name in sorted({*names.values(), own})]
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("write the code beside the model", subject=path, got=reason(error)) from error
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in sorted(names.items())}
    replace_file(folder / f"{MODULE}.py", _HEAD + "".join(classes))
    replace_file(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
