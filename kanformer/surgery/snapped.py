"""Formulas in the blocks of a patched model: putting them in and out, and what the record says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from kanformer.errors import CheckpointError, ConfigError, ShapeError
from kanformer.layers import KANFeedForward
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.formulas import Formulas
from kanformer.layers.grids import GridModule
from kanformer.layers.kan_linear import KANLinear
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


def check_formulas(model: nn.Module) -> None:
    """Raises CheckpointError if formulas that were read from a file name functions that are not there, or have numbers that are not finite."""
    for path, module in model.named_modules():
        if isinstance(module, GridModule) and module.kan_formulas is not None:
            try:
                module.kan_formulas.check(rows_of(module))
            except ShapeError as error:
                raise CheckpointError(_ACTION, subject=path, got=str(error), hint="The file is damaged.") from error


def describe(module: GridModule) -> dict[str, Any]:
    """What the record says of the formulas of one map."""
    assert module.kan_formulas is not None
    return {"families": dict(module.kan_formulas.families), "trainable": module.kan_formulas.trainable}


def record_formulas(model: nn.Module) -> None:
    """Brings the records of a patched model in line with the formulas that its blocks hold; a model without a record is left as it is."""
    for holder, record in find_records(model):
        sites = tuple(_described(holder, site) for site in record.sites)
        if sites != record.sites:
            set_record(holder, PatchRecord(sites, record.undo, record.attributes))


def _described(holder: nn.Module, site: SiteRecord) -> SiteRecord:
    prefix = getattr(holder, "base_model_prefix", "")
    slot = next((found for path in (join(prefix, site.path), site.path) if (found := find_path(holder, path)) is not None), None)
    snapped = {}
    for path, block in slot.named_modules() if isinstance(slot, nn.Module) else ():
        if isinstance(block, KANFeedForward):
            for name, module in block.spline_modules():
                if module.kan_formulas is not None:
                    snapped[join(path, name)] = describe(module)
    return dataclasses.replace(site, snapped=snapped)
