"""What the commands share: models, tokenizers and texts by name, and checks of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    from kanformer.surgery.saving.hub import save_pretrained

    save_pretrained(model, folder, tokenizer=tokenizer)


def load(name: str):
    from kanformer.surgery.saving.loading import load_model, quiet_transformers

    quiet_transformers()
    return load_model(name)


def tokenizer_of(name: str):
    from kanformer.errors import CheckpointError
    from kanformer.surgery.saving.loading import load_tokenizer

    try:
        return load_tokenizer(name)
    except CheckpointError:
        return None  # image models have none


def text_batches(model: nn.Module, name: str, text: str | None, count: int, max_length: int):
    from kanformer.demo.corpus import standard_library
    from kanformer.surgery.saving.loading import load_tokenizer
    from kanformer.training.data import read_lines
    from kanformer.training.models import calibration_batches, check_length

    check_length(model, max_length)
    if text is None:
        print("data: docstrings of Python's standard library (give your own with --text FILE)")
    texts = read_lines(text) if text is not None else standard_library().held_out
    return calibration_batches(load_tokenizer(name), texts, count, max_length)


def need(value: str, name: str) -> None:
    from kanformer.errors import ConfigError

    if not value:
        raise ConfigError("run the command", got=f"no {name}", hint=f"Give --{name}; see --help.")


def need_free(out: str) -> None:
    from kanformer.errors import ConfigError

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError("write the patched model", subject=f"out={out}", got="a path that is in use", hint="Choose a new folder.")
