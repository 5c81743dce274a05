"""Loading checkpoints for the command line and the scripts: stock Auto classes, with errors that say what is wrong with the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kanformer.errors import CheckpointError, KanformerError
from kanformer.layers import KANFeedForward
from kanformer.surgery.holders import needs_call
from kanformer.surgery.record import COMPOSED


def load_model(name_or_path: str, auto_class: str | None = None, attn_implementation: str | None = None, **kwargs: Any) -> nn.Module:
    """A model in eval mode, by `transformers.<auto_class>.from_pretrained`.

    Args:
        name_or_path: a folder or hub id, patched or not.
        auto_class: for example "AutoModelForCausalLM"; None takes the class that config.json names.
        attn_implementation: as in from_pretrained; None leaves the choice to transformers.

    Raises:
        CheckpointError: no such folder, or files that are missing, cut short or do not belong together.
    """
    import transformers

    _check_folder(name_or_path)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    try:
        cls = getattr(transformers, auto_class) if auto_class else _own_class(name_or_path)
        if needs_call(transformers.AutoConfig.from_pretrained(name_or_path)):
            kwargs.setdefault("quantization_config", dict(COMPOSED))
        model, info = cls.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except KanformerError:
        raise
    except Exception as error:
        raise CheckpointError("load the model", subject=name_or_path, got=_first_line(error), hint=_hint(name_or_path)) from error
    whole = type(model).__name__ in (model.config.architectures or ()) and any(isinstance(module, KANFeedForward) for module in model.modules())
    if whole and info["missing_keys"]:
        raise CheckpointError(
            "load the model",
            subject=name_or_path,
            got=f"no tensors for {', '.join(sorted(info['missing_keys'])[:3])}",
            hint="The weight files and config.json do not belong together.",
        )
    return model.eval()


def quiet_transformers() -> None:
    """Leaves the terminal to our own messages: transformers says errors only and draws no bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(name_or_path: str) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    _check_folder(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:
        raise CheckpointError(
            "load the tokenizer", subject=name_or_path, got=_first_line(error), hint="Save it beside the model: tokenizer.save_pretrained(folder)."
        ) from error


def _own_class(name_or_path: str) -> Any:
    """The transformers class that config.json names, or AutoModel."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name_or_path)
    names = getattr(config, "architectures", None) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError("load the model", subject=name_or_path, got=f"architectures {names!r} in config.json", expected="a list of class names")
    return getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel


def _check_folder(name_or_path: str) -> None:
    path = Path(name_or_path)
    looks_local = path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise CheckpointError(
            "load the model",
            subject=name_or_path,
            got="no config.json there" if path.exists() else "no such folder",
            expected="a folder written by save_pretrained, or a hub id",
        )


def _hint(name_or_path: str) -> str:
    """What the weight files themselves say."""
    from safetensors import safe_open

    for path in sorted(Path(name_or_path).glob("*.safetensors")) if Path(name_or_path).is_dir() else ():
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except Exception as error:
            return f"{path.name} is damaged or cut short ({_first_line(error)}); {path.stat().st_size:,} bytes are there. Copy it again."
    return "Check the name, the files and the network."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
