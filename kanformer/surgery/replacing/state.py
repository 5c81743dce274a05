"""What a KAN-FFN takes over from the block in whose place it stands: training modes, requires_grad, hooks."""

from __future__ import annotations

import sys

from torch import nn

from kanformer.layers import KANFeedForward
from kanformer.layers.kan_linear import KANLinear
from kanformer.surgery.assemble import KANModule, blocks_of
from kanformer.surgery.finding.sites import Site

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_FULL = "_is_full_backward_hook"


def keep_state(site: Site, module: KANModule) -> None:
    """Gives a new block, or all experts of a mixture, the state of the old one; hooks where the old one was a module of its own."""
    slot = site.part(site.spec.slot) if site.spec.slot else site.owner
    module.train(slot.training)
    trained = _trained(site)
    for block in blocks_of(module):
        _keep_modes(site, slot, block)
        _keep_gradients(trained, block)
    if site.spec.structure in ("module", "experts"):
        _share_hooks(slot, module)


def give_back(block: nn.Module, current: nn.Module, original: nn.Module) -> None:
    """Lets an original that comes back follow what happened since: device and dtype, training mode, kind of backward hooks."""
    old, new = next(original.parameters(), None), next(block.parameters())
    if old is not None and (old.dtype != new.dtype or old.device != new.device):
        original.to(device=new.device, dtype=new.dtype)
    if original.training != current.training:
        original.train(current.training)
    if original._forward_hooks is current._forward_hooks:
        setattr(original, _FULL, getattr(current, _FULL))


def _keep_modes(site: Site, slot: nn.Module, block: KANFeedForward) -> None:
    block.train(site.owner.training if site.spec.structure == "inline" else slot.training)
    for path, new in ((site.spec.hidden_dropout, block.hidden_dropout), (site.spec.output_dropout, block.output_dropout)):
        old = site.part(path) if path else None
        if isinstance(old, nn.Module):
            new.train(old.training)


def _keep_gradients(trained: dict[str, tuple[bool, bool]], block: KANFeedForward) -> None:
    for name, flags in trained.items():
        new = getattr(block, name)
        if new is None:
            continue
        weight, bias = (new.kan_base_weight, new.kan_bias) if isinstance(new, KANLinear) else (new.weight, new.bias)
        weight.requires_grad_(flags[0])
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(flags[1])


def _trained(site: Site) -> dict[str, tuple[bool, bool]]:
    """Whether the weight and the bias behind each map of the KAN-FFN were trained."""
    found = {}
    for name, path in (("kan_up", site.spec.up), ("kan_down", site.spec.down), ("kan_gate", site.spec.up if site.spec.fused else site.spec.gate)):
        if path:
            part = site.part(path)
            weight, bias = (part, getattr(site.owner, f"{path}_bias", None)) if site.spec.experts else (part.weight, part.bias)
            found[name] = (weight.requires_grad, (weight if bias is None else bias).requires_grad)
    return found


def _share_hooks(slot: nn.Module, block: nn.Module) -> None:
    """The same dictionaries, so that a handle removes its hook from both."""
    for name in (*HOOKS, _FULL):
        setattr(block, name, getattr(slot, name))
    if "_hf_hook" in slot.__dict__:  # of accelerate, which is then loaded: it moves the inputs to the block's device
        sys.modules["accelerate.hooks"].add_hook_to_module(block, slot._hf_hook)
