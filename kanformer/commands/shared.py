"""What the commands share: models, tokenizers and texts by name, and checks of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("csv", "json", "parquet")


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def table_formats(text: str, out: str) -> list[str]:
    """The formats of tables that were asked for, with commas between them.

    Raises:
        ConfigError: another one, none, or parquet without pyarrow.
    """
    from kanformer.errors import ConfigError, did_you_mean
    from kanformer.interpret.parquet import need_pyarrow

    found = list(dict.fromkeys(words(text)))
    for each in found:
        if each not in FORMATS:
            raise ConfigError("write tables", got=f"format={each!r}", hint=did_you_mean(each, FORMATS))
    if not found:
        raise ConfigError("write tables", got=f"format={text!r}", expected=f"some of {', '.join(FORMATS)}")
    if "parquet" in found:
        need_pyarrow(out)
    return found


def layers_of(text: str | None) -> list[str | int] | None:
    """Paths or numbers of blocks, with commas between them; None: all."""
    return None if text is None else [int(word) if word.lstrip("-").isdigit() else word for word in words(text)]


def load_original(name: str | None, model: nn.Module) -> nn.Module | None:
    """The model that `model` was before it was patched.

    Raises:
        ConfigError: one that is patched itself, or of another class.
    """
    from kanformer.errors import ConfigError
    from kanformer.layers import KANFeedForward

    if name is None:
        return None
    original = load(name)
    if any(isinstance(module, KANFeedForward) for module in original.modules()):
        raise ConfigError("compare with the original", subject=name, got="a patched model", hint="Name the model as it was before patching.")
    if type(original) is not type(model):
        got, expected = type(original).__name__, type(model).__name__
        raise ConfigError("compare with the original", subject=name, got=got, expected=f"{expected}, as the patched model is")
    return original


def text_name(text: str | None) -> str:
    """What the data are called in headers."""
    return "docstrings of Python's standard library" if text is None else Path(text).name


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


def need_no_file(out: str) -> None:
    from kanformer.errors import ConfigError

    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError("write into a folder", subject=f"out={out}", got="a file", hint="Choose a new folder.")


def need_free(out: str) -> None:
    from kanformer.errors import ConfigError

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError("write the patched model", subject=f"out={out}", got="a path that is in use", hint="Choose a new folder.")
