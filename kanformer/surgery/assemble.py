"""From blocks to the module that stands in a site's slot: one KAN-FFN, or all experts of a mixture."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from kanformer.conversion import DenseFFN
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.finding.fused import expert_count
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.sentinel import add_sentinel

KANModule = KANFeedForward | KANExperts
_EXPERT = ".kan_experts."


def block_paths(site: Site) -> list[str]:
    """A name for each of a site's blocks, in their order: the site's path, or one below it per expert."""
    if not site.spec.experts:
        return [site.path]
    return [f"{site.path}{_EXPERT}{i}" for i in range(expert_count(site.owner, site.spec))]


def dense_blocks(site: Site) -> dict[str, DenseFFN]:
    """A site's blocks as plain tensors, by `block_paths`."""
    return dict(zip(block_paths(site), site.denses(), strict=True))


def blocks_of(module: KANModule) -> list[KANFeedForward]:
    """The KAN-FFNs that a slot holds: one, or one per expert."""
    return [module] if isinstance(module, KANFeedForward) else list(module.kan_experts)  # type: ignore[list-item]


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
