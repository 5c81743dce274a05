"""With whose config a patched block is saved: the transformers model around it, also inside wrappers and composed models."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from kanformer.surgery.finding.sites import Site
from kanformer.surgery.modules import get_path
from kanformer.surgery.record import QUANT_METHOD, PatchRecord


def by_holder(model: nn.Module, sites: Sequence[Site]) -> list[tuple[nn.Module, dict[str, Site]]]:
    """The sites by the outermost transformers model that holds them; what no such model holds is the given module's own.

    A wrapper (a PeftModel, a compiled model, a SentenceTransformer, a module of one's own) saves the model inside by that model's own
    save_pretrained, so the record and its paths must be that model's.

    Returns:
        (holder, sites as seen from the holder by their paths in `model`) of every holder.
    """
    paths = _outermost(model)
    groups: dict[str, dict[str, Site]] = {}
    for site in sites:
        holder = next((path for path in paths if _below(site.owner_path, path)), "")
        seen = dataclasses.replace(site, model=get_path(model, holder), owner_path=site.owner_path[len(holder) :].removeprefix("."))
        groups.setdefault(holder, {})[site.path] = seen
    return [(get_path(model, holder), group) for holder, group in groups.items()]


def recorded_parts(model: nn.Module) -> list[tuple[nn.Module, PatchRecord]]:
    """The parts of a composed model (an EncoderDecoderModel, the vision tower of a chat model) that were patched by themselves.

    Each part has a config of its own within the model's, and its record is there.
    """
    recorded = list(_recorded_configs(getattr(model, "config", None)))
    parts = {id(config): next((module for module in model.modules() if getattr(module, "config", None) is config), None) for config in recorded}
    return [(part, PatchRecord.from_dict(config.quantization_config)) for config in recorded if (part := parts[id(config)]) is not None]


def needs_call(config: Any) -> bool:
    """Whether only parts of a composed model are patched of which transformers does not see it: it looks at the model's config and its text part's.

    `from_pretrained(folder, quantization_config={"quant_method": "kan"})` loads such a model then, and what that model saves loads by itself.
    """
    seen = any(getattr(part, "quantization_config", None) is not None for part in (config, config.get_text_config(decoder=True)))
    return not seen and next(_recorded_configs(config), None) is not None


def forget_parts(model: nn.Module) -> None:
    """Drops what the configs of an unpatched model's parts say of a surgery (configs outlive the models that they were taken from)."""
    for config in _recorded_configs(getattr(model, "config", None)):
        del config.quantization_config


def _recorded_configs(config: Any) -> Iterator[Any]:
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        entry = getattr(part, "quantization_config", None)
        if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD:
            yield part
        elif part is not None:
            yield from _recorded_configs(part)


def _outermost(model: nn.Module) -> list[str]:
    """Paths of the transformers models that are in no other one."""
    transformers_model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, transformers_model) and not any(_below(path, outer) for outer in paths):
            paths.append(path)
    return paths


def _below(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")
