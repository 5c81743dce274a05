"""A tensor that makes a patched checkpoint unloadable without kanformer, instead of silently random.

Without the plug-in transformers would skip the unknown `kan_*` tensors and give the MLP random weights, with a warning.
One tensor under the name of an original weight, in a shape that it cannot have, turns that into a RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanformer.layers import KANFeedForward
from kanformer.surgery.spec import FFNSpec


class Sentinel(nn.Module):
    """Holds `weight`, one zero; kept in float32 and never trained."""

    weight: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, dtype=torch.float32, device=device))


def add_sentinel(block: KANFeedForward, spec: FFNSpec) -> None:
    """Gives the block a tensor under the name of the MLP's first weight."""
    device = next(block.parameters()).device
    *parents, last = spec.sentinel.split(".") if spec.sentinel else ["", ""]
    if not last:
        block.register_buffer("weight", torch.zeros(1, dtype=torch.float32, device=device))
        return
    holder: nn.Module = block
    for name in parents:
        if name not in holder._modules:
            holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    holder.add_module(last, Sentinel(device))


def clear_sentinel(block: KANFeedForward) -> None:
    """Sets the tensor to zero again: where transformers fuses native weights on saving, it does not come back as it was."""
    for module in block.modules():
        if isinstance(module, Sentinel) or (module is block and "weight" in module._buffers):
            module.weight.zero_()  # type: ignore[union-attr,operator]
