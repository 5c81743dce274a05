"""Finding the feed-forward blocks of a model by the specs that are known or given."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from kanformer.errors import NoFeedForwardError
from kanformer.surgery.architectures import all_specs
from kanformer.surgery.maps import base_map
from kanformer.surgery.modules import is_conv1d
from kanformer.surgery.sites import Site
from kanformer.surgery.spec import FFNSpec
from kanformer.surgery.structure import structural_specs

_LIKELY = re.compile(r"mlp|ffn|feed_?forward|intermediate|expert", re.IGNORECASE)


def find_sites(model: nn.Module, specs: Sequence[FFNSpec] | None = None) -> list[Site]:
    """Every block of `model` whose owner's class matches a spec, or without `specs` looks like a block; a module that hangs in several places counts once.

    Raises:
        NoFeedForwardError: none; the message lists what was looked for and how to give a spec.
    """
    known = tuple(specs) if specs else all_specs()
    patterns = [(re.compile(spec.owner), spec) for spec in known]
    hidden = any(base_map(module) is not None for module in model.modules())
    sites = []
    for path, module in model.named_modules():
        found = [spec for pattern, spec in patterns if pattern.fullmatch(type(module).__name__)][:1]
        if not found and not specs:
            found = structural_specs(path, module) or (structural_specs(path, _with_base_maps(module)) if hidden else [])
        sites += [Site(model, path, spec) for spec in found]
    if not sites:
        raise NoFeedForwardError(
            "find feed-forward blocks", subject=type(model).__name__, got=_found(model), expected=_looked_for(known), hint=HOW_TO_GIVE_A_SPEC
        )
    return sites


def _with_base_maps(module: nn.Module, depth: int = 2) -> nn.Module:
    """A shallow copy in which the maps under adapters and quantizers are seen, so that their blocks are found and refused by name."""
    view = object.__new__(type(module))
    children = {name: child and (base_map(child) or (_with_base_maps(child, depth - 1) if depth > 1 else child)) for name, child in module._modules.items()}
    view.__dict__.update(module.__dict__, _modules=children)
    return view


HOW_TO_GIVE_A_SPEC = (
    "Describe the block yourself: patch_model(model, specs=[kanformer.FFNSpec(name='mine', owner='MyMLP', up='fc1', activation='act', down='fc2')]), "
    "where owner is the class that holds the two linear maps"
)


def _looked_for(specs: Sequence[FFNSpec]) -> str:
    return "one of " + "; ".join(f"{spec.name} ({spec.owner} with {', '.join(spec.parts)})" for spec in specs)


def _found(model: nn.Module) -> str:
    """What in the model looks like a block: modules that hold at least two linear maps, likely names first."""
    owners: dict[str, str] = {}
    for path, module in sorted(model.named_modules(), key=lambda item: not _LIKELY.search(item[0] + type(item[1]).__name__)):
        linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear) or is_conv1d(child)]
        if len(linear) >= 2:
            owners.setdefault(type(module).__name__, f"{path or 'the model itself'} with {', '.join(linear[:4])}")
    if owners:
        return "no known block; these hold linear maps: " + "; ".join(f"{cls} at {where}" for cls, where in list(owners.items())[:6])
    classes = sorted({type(module).__name__ for module in model.modules()})
    return f"no known block among its classes {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}"
