"""What a patched model remembers of its surgery: enough to save it, to rebuild it on an empty model, and to undo it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kanformer.config import KANConfig
from kanformer.errors import CheckpointError, ConfigError, SurgeryError
from kanformer.surgery.finding.spec import FFNSpec

_ATTRIBUTE = "_kanformer_record"
QUANT_METHOD = "kan"
COMPOSED = {"quant_method": QUANT_METHOD}  # the entry of a model whose parts were patched by themselves: their own configs have the records
RECORD_VERSION = 2
SNAPPED_VERSION = 3  # written where functions were replaced by formulas, which version 2 does not know
PRUNED_VERSION = 4  # written where edges were taken out
_OPTIONAL = ("snapped", "pruned")  # keys of a site that are written where there is something to say


@dataclass(frozen=True)
class SiteRecord:
    """One replaced block.

    Attributes:
        path: of the KAN-FFN, relative to the base model (so that it holds for AutoModel and AutoModelForCausalLM alike).
        spec: how the family writes its block.
        config: what the KAN-FFN was made with.
        hidden: the KAN-FFN's width. mlp_hidden: the MLP's.
        down_bias: whether the KAN-FFN's down map has a bias. mlp_down_bias: whether the MLP's had.
        snapped: of each map with formulas, by its path below the slot, {"families": {name: how many}, "trainable": bool}; see `layers.formulas`.
        pruned: of each map without some of its edges, likewise, {"bias": whether it was given one}; see `layers.masks`.
    """

    path: str
    spec: FFNSpec
    config: KANConfig
    hidden: int
    mlp_hidden: int
    down_bias: bool
    mlp_down_bias: bool
    snapped: dict[str, dict[str, Any]] = field(default_factory=dict)
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any], specs: list[FFNSpec], configs: list[KANConfig]) -> SiteRecord:
        """Reads what `to_dict` wrote; `spec` and `config` are numbers in these lists."""
        action, known = "read the patched blocks from config.json", {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) | set(_OPTIONAL) != set(known):
            raise CheckpointError(action, got=f"an entry {values!r}", expected=f"an object with the keys {sorted(known)}")
        lists: tuple[tuple[str, list], ...] = (("spec", specs), ("config", configs))
        good = isinstance(values["path"], str) and all(type(values[name]) is int and 0 <= values[name] < len(known) for name, known in lists)
        good = good and all(type(values[name]) is int and values[name] >= 1 for name in ("hidden", "mlp_hidden"))
        if not good or not all(type(values[name]) is bool for name in ("down_bias", "mlp_down_bias")):
            numbers = f"numbers of a spec (below {len(specs)}) and a config (below {len(configs)})"
            raise CheckpointError(action, got=f"wrong values in {values}", expected=f"a path, widths >= 1, two booleans, {numbers}")
        if not _good_snapped(values.get("snapped", {})):
            raise CheckpointError(action, got=f"snapped={values['snapped']!r}", expected="families with counts >= 1 and trainable, by map")
        if not _good_pruned(values.get("pruned", {})):
            raise CheckpointError(action, got=f"pruned={values['pruned']!r}", expected="{'bias': true or false} by map")
        return cls(**{**values, "spec": specs[values["spec"]], "config": configs[values["config"]]})

    def to_dict(self, specs: list[FFNSpec], configs: list[KANConfig]) -> dict[str, Any]:
        """Plain JSON values; spec and config are stored once, in these lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _OPTIONAL or getattr(self, field.name)}
        return {**values, "spec": specs.index(self.spec), "config": configs.index(self.config)}


@dataclass
class PatchRecord:
    """All replaced blocks and (unless they were dropped) what stood there before.

    Attributes:
        undo: (parent path, name, original module) of every swapped child, empty when the originals were not kept.
        attributes: (owner path, name, value) of plain attributes that were changed.
    """

    sites: tuple[SiteRecord, ...]
    undo: list[tuple[str, str, nn.Module]] = field(default_factory=list)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that goes into config.json as `quantization_config`."""
        specs = list(dict.fromkeys(site.spec for site in self.sites))
        configs = list(dict.fromkeys(site.config for site in self.sites))
        return {
            "quant_method": QUANT_METHOD,
            "version": self._version(),
            "configs": [config.to_dict() for config in configs],
            "specs": [spec.to_dict() for spec in specs],
            "sites": [site.to_dict(specs, configs) for site in self.sites],
        }

    def _version(self) -> int:
        if any(site.pruned for site in self.sites):
            return PRUNED_VERSION
        return SNAPPED_VERSION if any(site.snapped for site in self.sites) else RECORD_VERSION

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PatchRecord:
        """Reads what `to_dict` wrote, also in older versions.

        Raises:
            CheckpointError: a newer version, missing or foreign keys, wrong types.
        """
        action = "read the KAN part of config.json"
        values = upgraded(values)
        if values.get("version") not in range(RECORD_VERSION, PRUNED_VERSION + 1):
            raise CheckpointError(
                action,
                got=f"version {values.get('version')!r}",
                expected=f"{RECORD_VERSION} to {PRUNED_VERSION}",
                hint="It was written by another kanformer; install that version or a newer one.",
            )
        unknown = set(values) - {"quant_method", "version", "configs", "specs", "sites"}
        lists = [values.get(name) for name in ("configs", "specs", "sites")]
        if unknown or not all(isinstance(items, list) and items and all(isinstance(item, dict) for item in items) for items in lists):
            raise CheckpointError(action, got=f"keys {sorted(values)}", expected="quant_method, version, configs, specs and sites (lists of objects)")
        try:
            specs = [FFNSpec.from_dict(spec) for spec in values["specs"]]
            configs = [KANConfig.from_dict(config) for config in values["configs"]]
            return cls(tuple(SiteRecord.from_dict(site, specs, configs) for site in values["sites"]))
        except ConfigError as error:
            raise CheckpointError(action, got=str(error)) from error


def _good_snapped(maps: Any) -> bool:
    def good(entry: Any) -> bool:
        if not isinstance(entry, dict) or set(entry) != {"families", "trainable"} or type(entry["trainable"]) is not bool:
            return False
        families = entry["families"]
        return isinstance(families, dict) and bool(families) and all(isinstance(name, str) and type(n) is int and n >= 1 for name, n in families.items())

    return isinstance(maps, dict) and all(isinstance(path, str) and good(entry) for path, entry in maps.items())


def _good_pruned(maps: Any) -> bool:
    entries = maps.values() if isinstance(maps, dict) else [None]
    return all(isinstance(entry, dict) and set(entry) == {"bias"} and type(entry["bias"]) is bool for entry in entries)


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A record of version 1, which had one config for all blocks, as one of version 2; any other as it is."""
    sites = values.get("sites")
    if values.get("version") != 1 or "config" not in values or "configs" in values or not isinstance(sites, list):
        return values
    rest = {name: value for name, value in values.items() if name != "config"}
    sites = [{**site, "config": 0} if isinstance(site, dict) else site for site in sites]
    return {**rest, "version": 2, "configs": [values["config"]], "sites": sites}


def set_record(model: nn.Module, record: PatchRecord | None) -> None:
    """Remembers the surgery on the model and in its config (nothing of it is in the state dict)."""
    if record is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = record
    config = getattr(model, "config", None)
    if config is None:
        return
    if record is not None:
        config.quantization_config = record.to_dict()
    elif getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def get_record(model: nn.Module, action: str) -> PatchRecord:
    """The record of the model, or of the part of it that was patched.

    Raises:
        SurgeryError: the model is not patched, or several parts of it were, each by itself.
    """
    (_, record), *more = get_records(model, action)
    if more:
        raise SurgeryError(action, subject=type(model).__name__, got=f"{1 + len(more)} parts that were patched by themselves", hint="Take them one by one.")
    return record


def get_records(model: nn.Module, action: str) -> list[tuple[nn.Module, PatchRecord]]:
    """What `find_records` finds.

    Raises:
        SurgeryError: the model is not patched.
    """
    records = find_records(model)
    if not records:
        raise SurgeryError(action, subject=type(model).__name__, got="a model that is not patched", hint="Call kanformer.patch_model(model) first.")
    return records


def find_records(model: nn.Module) -> list[tuple[nn.Module, PatchRecord]]:
    """(what was patched, its record): the model, or each of its parts that was patched by itself."""
    return [(module, module.__dict__[_ATTRIBUTE]) for module in model.modules() if module.__dict__.get(_ATTRIBUTE) is not None]
