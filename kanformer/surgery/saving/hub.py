"""A folder that is ready for the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from kanformer.errors import ConfigError, SurgeryError
from kanformer.surgery.holders import needs_call, recorded_parts
from kanformer.surgery.record import COMPOSED, get_records
from kanformer.surgery.saving.card import write_card
from kanformer.surgery.saving.remote_code import write_remote_code


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    base_model: str | None = None,
    tokenizer: Any = None,
    model_card: bool = True,
    remote_code: bool = False,
    **kwargs: Any,
) -> None:
    """Saves a patched model as `model.save_pretrained(folder)` does, with what a reader of the hub needs beside it.

    Args:
        model: patched, of a class of transformers.
        base_model: hub id of the model that was patched, for the card; None: where it was loaded from.
        tokenizer: tokenizer or processor, saved into the same folder.
        model_card: write README.md: base model, how to load it, settings, parameters. One of your own stays, with a warning.
        remote_code: write modeling_kanformer.py, so that `from_pretrained(folder, trust_remote_code=True)` works where kanformer is
            installed but not imported. Without it a program imports kanformer first.
        kwargs: for `model.save_pretrained`: max_shard_size, state_dict, is_main_process, ...

    Raises:
        SurgeryError: the model is not patched, or of a class that config.json cannot describe. ConfigError: push_to_hub. CheckpointError: a file that
        cannot be written.
    """
    _prepare_config(model)
    if kwargs.get("push_to_hub"):
        raise ConfigError("save", got="push_to_hub=True", hint="Save first, then huggingface_hub.upload_folder(folder_path=folder, repo_id=...).")
    folder = Path(folder)
    model.save_pretrained(folder, **kwargs)  # type: ignore[operator]
    if not kwargs.get("is_main_process", True):
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if remote_code:
        write_remote_code(model, folder)
    if model_card:
        write_card(model, folder, base_model, remote_code=remote_code)


def _prepare_config(model: nn.Module) -> None:
    """Makes sure that config.json will say that the model is patched, also where it is composed of parts that were patched by themselves."""
    get_records(model, "save")
    config: Any = getattr(model, "config", None)
    if config is not None and needs_call(config):
        config.quantization_config = dict(COMPOSED)
    if getattr(config, "quantization_config", None) is None and not (config is not None and next(iter(recorded_parts(model)), None)):
        raise SurgeryError(
            "save", subject=type(model).__name__, got="a model whose config knows nothing of the patch", hint="Save the transformers model inside."
        )
