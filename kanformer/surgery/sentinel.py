"""A tensor that makes a patched checkpoint unloadable without kanformer, instead of silently random.

Without the plug-in transformers would skip the unknown `kan_*` tensors and give the MLP random weights, with a warning.
One tensor under the name of an original weight, in a shape that it cannot have, turns that into a RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanformer.layers import KANExperts
from kanformer.surgery.finding.spec import FFNSpec


class Sentinel(nn.Module):
    """Holds `weight`, one zero; kept in float32 and never trained."""

    weight: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, dtype=torch.float32, device=device))


def add_sentinel(block: nn.Module, spec: FFNSpec) -> None:
    """Gives the block a tensor under the name of the MLP's first weight (of experts: first weights)."""
    first = next(block.parameters())
    device, dtype = first.device, first.dtype
    if spec.experts:
        # Some families store them by expert and by factor, turned or interleaved, and look for a parameter: this shape survives the way there and back.
        for path in filter(None, (spec.gate, spec.up)):
            holder, name = _holder(block, path)
            holder.register_parameter(name, nn.Parameter(torch.zeros(2, 2, 2, dtype=dtype, device=device), requires_grad=False))
        holder, name = _holder(block, spec.down)
        holder.__dict__[name] = torch.empty(0, 0)  # for initialisation that reaches in from outside
        return
    if not spec.sentinel:
        block.register_buffer("weight", torch.zeros(1, dtype=torch.float32, device=device))
        return
    holder, last = _holder(block, spec.sentinel)
    holder.add_module(last, Sentinel(device))


def sentinel_names(spec: FFNSpec) -> list[str]:
    """Names of the tensors that `add_sentinel` makes, seen from the block."""
    if spec.experts:
        return [path for path in (spec.gate, spec.up) if path]
    return [f"{spec.sentinel}.weight" if spec.sentinel else "weight"]


def clear_sentinels(block: nn.Module) -> None:
    """Sets the tensors to zero again, untrained: where transformers fuses native weights on saving they do not come back as they were, and loading
    makes every parameter a trained one."""
    ours = [child for name, child in block.named_children() if name.startswith("kan_") or name == "expert_norm"]
    inside = {id(tensor) for child in ours for tensor in (*child.parameters(), *child.buffers())}
    if isinstance(block, KANExperts):
        for parameter in block.parameters():
            if id(parameter) not in inside:
                parameter.requires_grad_(False).zero_()
        return
    for module in block.modules():
        if isinstance(module, Sentinel) or (module is block and "weight" in module._buffers):
            module.weight.zero_()  # type: ignore[union-attr,operator]


def _holder(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """(the module that holds what lies at `path`, made where it is missing, its name there)."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in block._modules:
            block.add_module(name, nn.Module())
        block = block.get_submodule(name)
    return block, last
