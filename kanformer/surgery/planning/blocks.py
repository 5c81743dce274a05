"""What is known of a feed-forward block before it is replaced, after planning, and when it is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from kanformer.config import KANConfig
from kanformer.conversion.build import hidden_width
from kanformer.conversion.widths import kan_parameters, mlp_parameters
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.modules import layer_number
from kanformer.surgery.planning.towers import towers_of


@dataclass(frozen=True)
class FoundBlock:
    """One block of the model as it is: what `where=` is asked about.

    Attributes:
        path: of the slot that a KAN-FFN would take. owner: class of the module that holds the parts.
        family: name of the spec. structure: see `FFNSpec.structure`.
        layer: first number in the path. towers: see `kanformer.surgery.planning.towers`. expert: whether it is an expert of a mixture.
        experts: how many blocks of these widths it holds, for a module with all experts of a mixture; the parameters are those of all.
        in_features, mlp_hidden, mlp_parameters: widths and count; 0 (and activation, dtype and device "") where the block cannot be read, which is
            then refused.
    """

    path: str
    owner: str
    family: str
    structure: str
    layer: int | None
    towers: tuple[str, ...]
    expert: bool
    in_features: int = 0
    mlp_hidden: int = 0
    gated: bool = False
    activation: str = ""
    up_bias: bool = False
    down_bias: bool = False
    dtype: str = ""
    device: str = ""
    mlp_parameters: int = 0
    experts: int = 1


@dataclass(frozen=True)
class PlannedBlock(FoundBlock):
    """One block that will be replaced, by a KAN-FFN of this width, with these parameters, made by this config."""

    kan_hidden: int = 0
    kan_down_bias: bool = False
    kan_parameters: int = 0
    config: KANConfig = dataclasses.field(default_factory=KANConfig)


@dataclass(frozen=True)
class Refusal:
    """One block that was found and cannot be replaced."""

    path: str
    family: str
    reason: str
    owner: str = ""


def is_expert(site: Site) -> bool:
    """Whether the block is an expert (or all experts) of a mixture; an expert that every token passes (`shared_expert`) is not."""
    return site.spec.experts is not None or "experts" in site.path.split(".")


def describe(site: Site) -> FoundBlock:
    """What can be said of the block without touching it."""
    known: dict[str, Any] = {
        "path": site.path,
        "owner": type(site.owner).__name__,
        "family": site.spec.name,
        "structure": site.spec.structure,
        "layer": layer_number(site.path),
        "towers": towers_of(site.model, site.owner_path),
        "expert": is_expert(site),
    }
    if site.problem() is not None:
        return FoundBlock(**known)
    denses = site.denses()
    dense = denses[0]
    form: dict[str, Any] = {"gated": dense.gated, "up_bias": dense.expanding_bias, "down_bias": dense.down_bias is not None}
    return FoundBlock(
        **known,
        **form,
        in_features=dense.in_features,
        mlp_hidden=dense.hidden_features,
        activation=activation_name(site),
        dtype=str(dense.up_weight.dtype).removeprefix("torch."),
        device=str(dense.up_weight.device),
        mlp_parameters=len(denses) * (mlp_parameters(dense.in_features, dense.hidden_features, **form) + dense.other_parameters),
        experts=len(denses),
    )


def plan_block(site: Site, config: KANConfig) -> PlannedBlock:
    """What the block becomes with this config."""
    found, dense = describe(site), site.dense()
    hidden = hidden_width(dense, config)
    down_bias = found.down_bias or config.init == "prune"
    parameters = kan_parameters(found.in_features, hidden, config, gated=found.gated, up_bias=found.up_bias, down_bias=down_bias)
    parameters = found.experts * (parameters + dense.other_parameters)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return PlannedBlock(**values, kan_hidden=hidden, kan_down_bias=down_bias, kan_parameters=parameters, config=config)


def activation_name(site: Site) -> str:
    """The activation's class or function, for messages."""
    activation = site.activation
    name = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "function")
    return name.removesuffix("Activation")
