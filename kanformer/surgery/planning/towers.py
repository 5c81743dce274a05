"""Which part of a model a block lies in: encoder or decoder; text, vision or audio.

Encoder or decoder, the first that says so:
1. the config of the nearest enclosing PreTrainedModel has is_decoder=True: decoder;
2. the outermost name in the path that is or ends in "encoder" or "decoder" (`encoder.layer.0...`, `vision_encoder...`, `model.decoder.layers.3.fc1`);
3. the modules of the block's layer that have `is_causal` (transformers' attention): decoder if one is True, else encoder;
4. the enclosing model's type is in transformers' table of causal language models and not in that of masked ones: decoder; else encoder.

Text, vision or audio, the first that says so:
1. the innermost name in the path with one of these words in it, or "visual", "image", "video", "language", "speech" (`vision_tower`, `language_model`);
2. the type of the nearest enclosing PreTrainedModel ("clip_vision_model");
3. its `main_input_name`: input_ids is text, pixel_values vision, input_features, input_values and spectrograms audio;
4. its `input_modalities`, where it names one kind only. Time series, states of a robot and the like are none of the three.

So a decoder-only language model is "decoder" and "text", a ViT "encoder" and "vision", Whisper's decoder "decoder" and "text".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from kanformer.surgery.modules import get_path

_WORDS = {
    "text": "text",
    "language": "text",
    "vision": "vision",
    "visual": "vision",
    "image": "vision",
    "video": "vision",
    "audio": "audio",
    "speech": "audio",
}
_INPUTS = {"input_ids": "text", "pixel": "vision", "input_features": "audio", "input_values": "audio", "spectrogram": "audio", "audio": "audio"}


def towers_of(model: nn.Module, path: str) -> tuple[str, ...]:
    """The towers that the module at `path` lies in, in the order of `kanformer.selection.TOWERS`."""
    holders = list(_holders(model, path))
    holder = next((module for module in holders if _model_type(module) is not None), None)
    kind = _kind(path, holder)
    return (_side(path, holder, holders), *((kind,) if kind else ()))


def _holders(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at `path` and those that hold it, innermost first."""
    names = path.split(".") if path else []
    for depth in range(len(names), -1, -1):
        yield get_path(model, ".".join(names[:depth]))


def _side(path: str, holder: nn.Module | None, holders: Iterable[nn.Module]) -> str:
    if getattr(getattr(holder, "config", None), "is_decoder", False) is True:
        return "decoder"
    named = next((match[1] for name in path.split(".") if (match := re.fullmatch(r"(?:.*_)?(encoder|decoder)", name))), None)
    if named is not None:
        return named
    causal = _causal_attention(path, list(holders))
    if causal is None:
        causal = _is_causal_type(_model_type(holder))
    return "decoder" if causal else "encoder"


def _causal_attention(path: str, holders: list[nn.Module]) -> bool | None:
    """Whether an attention of the block's layer (the module under the first number in the path) is causal; None if there is none that says so."""
    names = path.split(".")
    first = next((index for index, name in enumerate(names) if name.isdigit()), None)
    if first is None:
        return None
    layer = holders[len(names) - first - 1]
    flags = [module.__dict__["is_causal"] for module in layer.modules() if isinstance(module.__dict__.get("is_causal"), bool)]
    return any(flags) if flags else None


def _is_causal_type(model_type: str | None) -> bool:
    if model_type is None:
        return False
    from transformers.models.auto import modeling_auto as tables

    return model_type in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _kind(path: str, holder: nn.Module | None) -> str | None:
    found = (_by_words(name) for name in reversed(path.split(".")))
    kind = next((kind for kind in found if kind), None) or _by_words(_model_type(holder) or "")
    if kind or holder is None:
        return kind
    inputs = getattr(holder, "main_input_name", "")
    kind = next((kind for word, kind in _INPUTS.items() if isinstance(inputs, str) and word in inputs), None)
    if kind:
        return kind
    given = getattr(holder, "input_modalities", ())
    kinds = {_WORDS.get(word) for word in ([given] if isinstance(given, str) else given)}
    return kinds.pop() if len(kinds) == 1 else None


def _by_words(name: str) -> str | None:
    kinds = {_WORDS[word] for word in re.split(r"[-_]", name) if word in _WORDS}
    return kinds.pop() if len(kinds) == 1 else None


def _model_type(module: nn.Module | None) -> str | None:
    """The type that a PreTrainedModel's config names; None for other modules."""
    name = getattr(getattr(module, "config", None), "model_type", None) if hasattr(module, "main_input_name") else None
    return name if isinstance(name, str) else None
