"""Which Auto classes of transformers load a model, and by which class."""

from __future__ import annotations

from typing import Any

from torch import nn

_LAST = ("AutoModelForPreTraining", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")


def auto_classes(model: nn.Module) -> dict[str, str]:
    """{name of an Auto class: name of the class that it loads for this model's config}, of transformers' own classes."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping: Any = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(model.config) not in mapping:
            continue
        classes = mapping[type(model.config)]
        names = [cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))]
        chosen = type(model).__name__ if type(model).__name__ in names else names[0]
        if hasattr(transformers, chosen):
            found[name] = chosen
    return found


def own_auto_class(model: nn.Module) -> str:
    """The Auto class that loads this very class, else the class' own name."""
    own = [name for name, cls in auto_classes(model).items() if cls == type(model).__name__]
    return min(own, key=lambda name: (name in _LAST, name), default=type(model).__name__)
