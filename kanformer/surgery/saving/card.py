"""The model card of a patched model: README.md as the Hugging Face hub reads it."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from kanformer.errors import CheckpointError
from kanformer.surgery.compare import Comparison, compare
from kanformer.surgery.folders import replace_file
from kanformer.surgery.record import get_records
from kanformer.surgery.saving.auto_classes import own_auto_class

_CARD = "README.md"
_MARK = re.compile(r"<!-- kanformer card ([0-9a-f]{16}): written anew at every save until somebody edits it -->\n")


def write_card(model: nn.Module, folder: Path, base_model: str | None = None, *, remote_code: bool = False) -> None:
    """Writes README.md into the folder of a saved model. One that somebody else wrote or changed stays, with a warning.

    Args:
        base_model: hub id or folder of the model that was patched, or of one that was patched from it; None: where the model was loaded from.
        remote_code: whether the folder carries the code for `trust_remote_code=True`.

    Raises:
        SurgeryError: the model is not patched. CheckpointError: the file cannot be written.
    """
    path = folder / _CARD
    if path.exists() and not _is_ours(path):
        warnings.warn(f"{path} was not written by kanformer, or was edited since, and stays as it is", stacklevel=3)
        return
    replace_file(path, _sign(card(model, base_model, remote_code=remote_code)))


def card(model: nn.Module, base_model: str | None = None, *, remote_code: bool = False) -> str:
    """The text of the card: YAML front matter, base model, how to load it, settings, parameters."""
    import yaml

    from kanformer import __version__

    base = named_in_card(Path(base_model)) or base_model if base_model else base_name(model)
    hub_id = base if base and is_hub_id(base) else None
    front = {**({"base_model": hub_id} if hub_id else {}), "library_name": "transformers", "tags": ["kan", "kanformer"]}
    records = get_records(model, "write a model card")
    settings = dict.fromkeys(site.config for _, record in records for site in record.sites)
    counts = compare(model)
    named = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{Path(base).name}`" if base else "a model of transformers"
    auto, trust = own_auto_class(model), ", trust_remote_code=True" if remote_code else ""
    code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("path/of/this/model"{trust})\n'
    code = code if remote_code else "import kanformer\n" + code
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {type(model).__name__} with Kolmogorov-Arnold feed-forward blocks\n",
        f"Base model: {named}. {len(counts.blocks)} of its feed-forward blocks are replaced by KAN-FFNs, in which learnable functions of one variable take the "
        f"place of a fixed activation (Kolmogorov-Arnold networks); the settings below say which functions. Saved by kanformer {__version__}.\n",
        "## Loading\n\n    pip install kanformer\n",
        f"```python\n{code}```\n",
        "Without kanformer loading stops with an error about a tensor of mismatched size.\n",
        "## Settings\n",
        *(f"```yaml\n{yaml.safe_dump(config.to_dict(), sort_keys=False)}```\n" for config in settings),
        f"## Parameters\n\n{_table(counts)}\n",
        _totals(counts),
    ]
    return "\n".join(lines) + "\n"


def base_name(model: nn.Module) -> str | None:
    """Hub id or folder that the model came from; if that is a patched one, the base model that its card names."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    return named_in_card(Path(name)) or name or None


def named_in_card(folder: Path) -> str | None:
    """The `base_model` in the card of a patched model's folder, or None. (An ordinary model's card names what that one was made from.)"""
    import yaml

    try:
        front = re.match(r"---\n(.*?)\n---\n", (folder / _CARD).read_text(encoding="utf-8"), re.DOTALL)
        values: Any = yaml.safe_load(front.group(1)) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    tags = values.get("tags") if isinstance(values, dict) else None
    if not isinstance(tags, list) or "kanformer" not in tags:
        return None
    found = values.get("base_model")
    return found if isinstance(found, str) else None


def is_hub_id(name: str) -> bool:
    """Whether this looks like `user/model` or `model` on the hub, and is no folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None and not Path(name).exists()


def _table(counts: Comparison) -> str:
    rows: list[tuple] = [(f"`{b.path}`", b.mlp_hidden, b.kan_hidden, b.mlp_parameters, b.kan_parameters, b.mlp_flops, b.kan_flops) for b in counts.blocks]
    names = ("mlp_parameters", "kan_parameters", "mlp_flops", "kan_flops")
    rows.append(("all blocks", "", "", *(counts.total(name) for name in names)))
    header = ("block", "MLP width", "KAN width", "MLP parameters", "KAN parameters", "MLP FLOPs per token", "KAN FLOPs per token")
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in line) + " |" for line in lines)


def _totals(counts: Comparison) -> str:
    model = counts.to_dict()["model"]
    return f"Whole model: {model['parameters']:,} parameters, before {model['parameters_before']:,} (ratio {model['parameters_ratio']:.3f})."


def _sign(text: str) -> str:
    """The text with a mark behind the front matter that says what the rest was when kanformer wrote it."""
    front, body = text.split("---\n", 2)[1:]
    mark = f"<!-- kanformer card {_digest(front, body)}: written anew at every save until somebody edits it -->\n"
    return f"---\n{front}---\n{mark}{body}"


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise CheckpointError("write the model card", subject=path, got=str(error)) from error
    found = _MARK.search(text)
    if found is None:
        return False
    front, body = text[: found.start()], text[found.end() :]
    return found.group(1) == _digest(front.removeprefix("---\n").removesuffix("---\n"), body)


def _digest(front: str, body: str) -> str:
    return hashlib.sha256(f"{front}---\n{body}".encode()).hexdigest()[:16]
