"""From blocks to the module that stands in a site's slot: one KAN-FFN, or all experts of a mixture."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.sentinel import add_sentinel
from kanformer.surgery.sites import Site

KANModule = KANFeedForward | KANExperts
_EXPERT = ".kan_experts."


def block_paths(site: Site) -> list[str]:
    """A name for each of a site's blocks, in their order: the site's path, or one below it per expert."""
    if not site.spec.experts:
        return [site.path]
    return [f"{site.path}{_EXPERT}{i}" for i in range(len(site.denses()))]


def site_path(path: str) -> str:
    """The site's path of one of its `block_paths`."""
    return path.partition(_EXPERT)[0]


def assemble(site: Site, blocks: Sequence[KANFeedForward]) -> KANModule:
    """The module that takes the slot of `site`, made of one block or of one per expert."""
    spec = site.spec
    if not spec.experts:
        module: KANModule = blocks[0]
        blocks[0].takes_residual = spec.residual is not None
    else:
        norm: nn.Module | None = copy.deepcopy(site.part(spec.expert_norm)) if spec.expert_norm else None
        identities = spec.experts == "identities"
        module = KANExperts(blocks, "routed" if identities else spec.experts, identities=identities, expert_norm=norm)
    add_sentinel(module, spec)
    return module
