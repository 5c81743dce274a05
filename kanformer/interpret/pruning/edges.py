"""Taking edges out: zeros in their place, their means in the bias of their output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.stats import LayerStats, ModelStats
from kanformer.interpret.pruning.choose import Masks
from kanformer.interpret.truth.hold import plane_means
from kanformer.layers.kan_linear import KANLinear
from kanformer.surgery.snapped import give_bias, mask_map, record_changes


@torch.no_grad()
def take_out(model: nn.Module, stats: ModelStats, masks: Masks) -> None:
    """Takes out the edges whose mask is False, for good; maps that lose none are left as they are."""
    blocks = find_blocks(model)
    for (path, name), mask in masks.items():
        module = getattr(blocks[path], name)
        constant = removed_means(module, stats[path], name, mask)
        old = getattr(module, "kan_mask", None)
        stay = mask if old is None else mask & old.cpu()
        if bool(stay.all()):
            continue
        module = mask_map(blocks[path], name, stay)
        if bool((constant != 0).any()):
            give_bias(module)
        _write(module, mask, constant)
    record_changes(model)


@contextlib.contextmanager
def taken_out(model: nn.Module, stats: ModelStats, masks: Masks) -> Iterator[None]:
    """Within the block the edges are out; afterwards the model is as it was, bit for bit."""
    blocks, undo = find_blocks(model), []
    try:
        with torch.no_grad():
            for (path, name), mask in masks.items():
                module = getattr(blocks[path], name)
                if bool(mask.all()):
                    continue
                constant = removed_means(module, stats[path], name, mask)
                names = ("kan_base_weight", "kan_coef", "kan_bias") if isinstance(module, KANLinear) else ("weight", "bias")
                undo.append((module, {each: getattr(module, each) for each in names}))
                for each in names:
                    parameter = getattr(module, each)
                    if parameter is not None:
                        setattr(module, each, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
                give_bias(module)
                _write(module, mask, constant)
        yield
    finally:
        for module, parameters in undo:
            for each, parameter in parameters.items():
                setattr(module, each, parameter)
                if parameter is None:
                    module.kan_bias_added = False


def removed_means(module: nn.Module, layer: LayerStats, name: str, mask: Tensor) -> Tensor:
    """(outputs,) in float64: what the removed edges add to each output on average."""
    means, out = plane_means(layer, name, isinstance(module, KANLinear)), ~mask
    total = torch.zeros(mask.shape[0], dtype=torch.float64)
    for plane, mean in enumerate(means.double()):
        weight = _plane(module, plane).double().cpu()
        total += torch.where(out, weight, 0) @ mean
    return total


def _plane(module: nn.Module, plane: int) -> Tensor:
    if not isinstance(module, KANLinear):
        return module.weight.detach()  # type: ignore[union-attr]
    return module.kan_base_weight.detach() if plane == 0 else module.kan_coef.detach()[:, plane - 1]


def _write(module: nn.Module, mask: Tensor, constant: Tensor) -> None:
    """Zeros where the mask is False, and the constant added to the bias; a removed weight that is not finite becomes zero too."""
    full = isinstance(module, KANLinear)
    weights = [(module.kan_base_weight, mask), (module.kan_coef, mask.unsqueeze(1))] if full else [(module.weight, mask)]
    for weight, stay in weights:
        weight.masked_fill_(~stay.to(weight.device), 0)  # type: ignore[operator]
    bias = module.kan_bias if full else module.bias
    if bias is not None:
        bias.copy_((bias.double().cpu() + constant).to(bias))  # type: ignore[operator,union-attr]
