"""Finding the feed-forward blocks of a model by the specs that are known or given."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from kanformer.errors import NoFeedForwardError
from kanformer.surgery.architectures import all_specs
from kanformer.surgery.finding.candidates import forget
from kanformer.surgery.finding.maps import base_map
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.finding.structure import structural_specs
from kanformer.surgery.folding import few
from kanformer.surgery.modules import is_conv1d

_LIKELY = re.compile(r"mlp|ffn|feed_?forward|intermediate|expert", re.IGNORECASE)


def find_sites(model: nn.Module, specs: Sequence[FFNSpec] | None = None) -> list[Site]:
    """Every block of `model`, in its order: what `specs` describe first, then what the known specs and its parts tell of the rest.

    A module that hangs in several places counts once. A block that shares a map with one that `specs` describe is theirs.

    Raises:
        NoFeedForwardError: none, or a given spec is no module's; the message lists what was looked for and how to give a spec.
    """
    forget()
    given = _given_sites(model, specs or ())
    taken = {weight for sites in given.values() for site in sites for weight in _weights(site)}
    patterns = [(re.compile(spec.owner), spec) for spec in all_specs()]
    hidden = any(base_map(module) is not None for module in model.modules())
    sites = []
    for path, module in model.named_modules():
        found = [spec for pattern, spec in patterns if pattern.fullmatch(type(module).__name__)][:1]
        if not found:
            found = structural_specs(path, module) or (structural_specs(path, _with_base_maps(module)) if hidden else [])
        own = given.get(path, [])
        known = [site for site in (Site(model, path, spec) for spec in found) if not taken.intersection(_weights(site))]
        sites += own + [site for site in known if not own or site.problem() is None]
    if not sites:
        looked_for = (*(specs or ()), *all_specs())
        raise NoFeedForwardError(
            "find feed-forward blocks", subject=type(model).__name__, got=_found(model), expected=_looked_for(looked_for), hint=HOW_TO_GIVE_A_SPEC
        )
    return sites


def _given_sites(model: nn.Module, specs: Sequence[FFNSpec]) -> dict[str, list[Site]]:
    """The blocks that the given specs describe, by the path of their owner: several of one owner if they share no map."""
    found: dict[str, list[Site]] = {}
    unused = dict.fromkeys(specs)
    for path, module in model.named_modules():
        sites = [Site(model, path, spec) for spec in specs if re.fullmatch(spec.owner, type(module).__name__)]
        for site in sites:
            unused.pop(site.spec, None)
        fitting: list[Site] = []
        for site in sites:
            if site.problem() is None and not any(_weights(site) & _weights(other) for other in fitting):
                fitting.append(site)
        if sites:
            found[path] = fitting or sites[:1]
    if unused:
        owners = sorted({type(module).__name__ for module in model.modules()})
        raise NoFeedForwardError(
            "find the blocks of the given specs",
            subject=type(model).__name__,
            got="; ".join(f"no module for {spec.name!r} (owner {spec.owner})" for spec in unused),
            expected=f"the class name of a module, one of {few(owners, 12)}",
        )
    return found


def _weights(site: Site) -> set[int]:
    try:
        return {id(weight) for weight in site.weights.values()}
    except AttributeError:  # it has not these parts
        return set()


def _with_base_maps(module: nn.Module, depth: int = 2) -> nn.Module:
    """A shallow copy in which the maps under adapters and quantizers are seen, so that their blocks are found and refused by name."""
    view = object.__new__(type(module))
    children = {name: child and (base_map(child) or (_with_base_maps(child, depth - 1) if depth > 1 else child)) for name, child in module._modules.items()}
    view.__dict__.update(module.__dict__, _modules=children)
    return view


HOW_TO_GIVE_A_SPEC = (
    "Describe the block yourself: patch_model(model, specs=[kanformer.FFNSpec(name='mine', owner='MyMLP', up='fc1', activation='act', down='fc2')]), "
    "where owner is the class that holds the two linear maps; print(kanformer.discover(model, batch)) runs the model once and proposes such lines"
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
