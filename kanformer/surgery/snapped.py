"""What was done to the functions of a patched model: formulas in their place, edges taken out; and what the record says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import CheckpointError, ConfigError, ShapeError
from kanformer.layers import KANFeedForward
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.formulas import Formulas
from kanformer.layers.grids import GridModule
from kanformer.layers.kan_linear import KANLinear
from kanformer.layers.masks import MaskedLinear
from kanformer.surgery.modules import find_path, join
from kanformer.surgery.record import PatchRecord, SiteRecord, find_records, set_record

_ACTION = "load the KAN checkpoint"


def rows_of(module: GridModule) -> tuple[int, ...]:
    """What the indices of a map's formulas are below: its groups, or its inputs and outputs."""
    return (module.in_features, module.out_features) if isinstance(module, KANLinear) else (module.kan_grid.shape[0],)


def put_empty_formulas(slot: nn.Module, snapped: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """Formulas without numbers, as the record describes them, in the module of a slot.

    Raises:
        CheckpointError: a map that is not there, more formulas than functions, or an unknown function.
    """
    for name, entry in snapped.items():
        module = find_path(slot, name)
        if not isinstance(module, EdgeFunctions | KANLinear):
            raise CheckpointError(_ACTION, subject=path, got=f"formulas for {name!r} in config.json", expected="a map with learned functions")
        rows, families = rows_of(module), entry["families"]
        functions = rows[0] * rows[-1] if len(rows) == 2 else rows[0]
        if sum(families.values()) > functions:
            raise CheckpointError(_ACTION, subject=path, got=f"{sum(families.values())} formulas for {name} in config.json", expected=f"at most {functions}")
        try:
            module.kan_formulas = Formulas(families, len(rows), trainable=entry["trainable"], device=module.kan_grid.device)
        except ConfigError as error:
            raise CheckpointError(_ACTION, subject=path, got=str(error)) from error


def check_changes(model: nn.Module) -> None:
    """Looks at what was read from a file.

    Raises:
        CheckpointError: formulas of functions that are not there, or with numbers that are not finite; masks that are none, or edges that are out and not zero.
    """
    for path, module in model.named_modules():
        if isinstance(module, GridModule) and module.kan_formulas is not None:
            try:
                module.kan_formulas.check(rows_of(module))
            except ShapeError as error:
                raise CheckpointError(_ACTION, subject=path, got=str(error), hint="The file is damaged.") from error
        mask = getattr(module, "kan_mask", None)
        if isinstance(mask, Tensor) and not _zero_where_out(module, mask):
            got = f"a mask of {mask.dtype}" if mask.dtype != torch.bool else "edges that were taken out and are not zero"
            raise CheckpointError(_ACTION, subject=path, got=got, hint="The file is damaged.")


def _zero_where_out(module: nn.Module, mask: Tensor) -> bool:
    if mask.dtype != torch.bool or mask.shape != _weight(module).shape:
        return False
    zero = bool((_weight(module)[~mask] == 0).all())
    return zero and (not isinstance(module, KANLinear) or bool((module.kan_coef.masked_fill(mask.unsqueeze(1), 0) == 0).all()))


def describe(module: GridModule) -> dict[str, Any]:
    """What the record says of the formulas of one map."""
    assert module.kan_formulas is not None
    return {"families": dict(module.kan_formulas.families), "trainable": module.kan_formulas.trainable}


def record_changes(model: nn.Module) -> None:
    """Brings the records of a patched model in line with formulas and masks that its blocks hold; a model without a record is left as it is."""
    for holder, record in find_records(model):
        sites = tuple(_described(holder, site) for site in record.sites)
        if sites != record.sites:
            set_record(holder, PatchRecord(sites, record.undo, record.attributes))


def _described(holder: nn.Module, site: SiteRecord) -> SiteRecord:
    prefix = getattr(holder, "base_model_prefix", "")
    slot = next((found for path in (join(prefix, site.path), site.path) if (found := find_path(holder, path)) is not None), None)
    snapped, pruned = {}, {}
    for path, block in slot.named_modules() if isinstance(slot, nn.Module) else ():
        if isinstance(block, KANFeedForward):
            for name, module in block.spline_modules():
                if module.kan_formulas is not None:
                    snapped[join(path, name)] = describe(module)
            for name, module in block.named_children():
                if getattr(module, "kan_mask", None) is not None:
                    before = site.pruned.get(join(path, name), {"bias": False})
                    pruned[join(path, name)] = {"bias": before["bias"] or bool(getattr(module, "kan_bias_added", False))}
    return dataclasses.replace(site, snapped=snapped, pruned=pruned)


def put_empty_masks(slot: nn.Module, pruned: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """Masks without values, as the record describes them, in the module of a slot.

    Raises:
        CheckpointError: a map that is not there, or cannot have a mask.
    """
    for name, entry in pruned.items():
        owner, module = find_path(slot, name.rpartition(".")[0]), find_path(slot, name)
        if not isinstance(module, KANLinear | nn.Linear) or not isinstance(owner, nn.Module):
            raise CheckpointError(_ACTION, subject=path, got=f"removed edges of {name!r} in config.json", expected="a map with edges")
        mask_map(owner, name.rpartition(".")[2], torch.ones(module.out_features, module.in_features, dtype=torch.bool, device=_weight(module).device))
        if entry["bias"]:
            give_bias(getattr(owner, name.rpartition(".")[2]))


def mask_map(owner: nn.Module, name: str, mask: Tensor) -> KANLinear | MaskedLinear:
    """Gives the map `name` of a block a mask, and says which module it is now: a linear map becomes one that has room for it. Its weights are not touched."""
    module = getattr(owner, name)
    if isinstance(module, nn.Linear) and not isinstance(module, MaskedLinear):
        made = MaskedLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        made.weight, made.bias = module.weight, module.bias
        made.train(module.training)
        made._is_hf_initialized = True  # type: ignore[assignment]
        setattr(owner, name, made)
        module = made
    module.kan_mask = mask.to(_weight(module).device)
    return module


def give_bias(module: nn.Module) -> None:
    """A bias of zeros to a map without one."""
    name = "kan_bias" if isinstance(module, KANLinear) else "bias"
    if getattr(module, name) is None:
        weight = _weight(module)
        setattr(module, name, nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad))
        module.kan_bias_added = True  # type: ignore[assignment]


def _weight(module: nn.Module) -> Tensor:
    return module.kan_base_weight if isinstance(module, KANLinear) else module.weight  # type: ignore[return-value]
