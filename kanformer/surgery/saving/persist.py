"""Loading patched checkpoints: transformers' quantizer plug-in point, used as a hook and detached afterwards."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kanformer.conversion.build import empty_block
from kanformer.errors import CheckpointError, SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.assemble import KANModule, assemble
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.holders import recorded_parts
from kanformer.surgery.modules import join
from kanformer.surgery.record import COMPOSED, QUANT_METHOD, PatchRecord, SiteRecord, get_record, set_record
from kanformer.surgery.replacing.apply import swap
from kanformer.surgery.saving.verify import ACTION, WATCHED, check_files, check_site, check_unique, short, watch_loading
from kanformer.surgery.sentinel import clear_sentinels
from kanformer.surgery.snapped import check_changes, put_empty_formulas, put_empty_masks

_ALIGNMENT = 64  # bytes, what torch's own allocations have


class KANQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a patched checkpoint: not a quantization, but the same slot."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.values = {**values, "quant_method": QUANT_METHOD}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class KANQuantizer(HfQuantizer):
    """Builds the KAN-FFNs on the empty model before its weights are loaded."""

    def __init__(self, quantization_config: KANQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.composed = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        parts = recorded_parts(model)
        if not parts and not self.pre_quantized:
            raise SurgeryError(
                "patch while loading", got="quantization_config with quant_method 'kan'", hint="Load the model first, then call kanformer.patch_model(model)."
            )
        check_files(kwargs.get("checkpoint_files"))
        if parts:  # transformers may have handed us one part's entry; the parts keep their own, and the whole calls us the next time
            self.composed = True
        else:
            parts = [(model, PatchRecord.from_dict(self.quantization_config.to_dict()))]
        watch_loading(model, [site for part, record in parts for site in rebuild(part, record)])
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary model: Trainer, .half() and save_pretrained(state_dict=...) work as with any other.
        for name in ("hf_quantizer", "quantization_method", WATCHED):
            model.__dict__.pop(name, None)
        model.is_quantized = False  # type: ignore[assignment]
        config = model.config
        config.quantization_config = dict(COMPOSED) if self.composed else get_record(model, "load the KAN checkpoint").to_dict()  # type: ignore[union-attr]
        if hasattr(config, "_is_quantized"):
            delattr(config, "_is_quantized")
        for block in model.modules():
            if isinstance(block, KANFeedForward | KANExperts):
                block.train(model.training)
                clear_sentinels(block)
            if isinstance(block, KANExperts):
                _align(block)
        check_changes(model)
        return model

    def update_weight_conversions(self, weight_conversions: list, *args: Any) -> list:
        """The renamings of old names to new ones that transformers applies while loading, kept away from the names of our tensors."""
        return [_sparing(each) for each in super().update_weight_conversions(weight_conversions, *args)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _align(module: nn.Module) -> None:
    """Copies what lies unaligned in a mapped file: there the product with a single row, which is what an expert often gets, rounds otherwise."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _sparing(conversion: Any) -> Any:
    """phimoe's ".gate.weight" would match "kan_gate.weight" too."""
    names = [f".kan_{name}" for name in ("gate.weight", "up.weight", "down.weight", "functions.kan_coef", "base_weight", "bias")]
    patterns = getattr(conversion, "source_patterns", [])
    if type(conversion).__name__ != "WeightRenaming" or not any(re.search(pattern, name) for pattern in patterns for name in names):
        return conversion
    return conversion.copy([rf"(?<!kan){pattern}" for pattern in patterns], list(conversion.target_patterns))


def rebuild(model: nn.Module, record: PatchRecord) -> list[Site]:
    """Swaps empty KAN-FFNs into a freshly built, unpatched model (on the meta device as a rule), and says where.

    Raises:
        CheckpointError: a recorded block is not in this model class, or has another shape.
    """
    pairs = empty_blocks(model, record)
    put_in(model, pairs, record)
    return [site for site, _ in pairs]


def empty_blocks(model: nn.Module, record: PatchRecord) -> list[tuple[Site, KANModule]]:
    """The places of the recorded blocks in an unpatched model, and the KAN-FFNs for them without numbers; the model is not touched.

    Raises:
        CheckpointError: as `rebuild`.
    """
    try:
        pairs = [(site, _empty(site, entry)) for entry, site in ((entry, _locate(model, entry)) for entry in record.sites)]
    except CheckpointError:
        raise
    except Exception as error:  # whatever numbers from a file do to torch
        raise CheckpointError(
            ACTION,
            subject=type(model).__name__,
            got=f"blocks in config.json that cannot be built ({short(error)})",
            hint="The file is damaged, or was written by hand.",
        ) from error
    check_unique([site for site, _ in pairs])
    return pairs


def put_in(model: nn.Module, pairs: list[tuple[Site, KANModule]], record: PatchRecord) -> None:
    """Swaps the blocks in and forgets what stood there."""
    swap(model, pairs, record)
    record.undo, record.attributes = [], []
    set_record(model, record)


def _locate(model: nn.Module, entry: SiteRecord) -> Site:
    prefix = getattr(model, "base_model_prefix", "")
    slot = entry.spec.slot
    owner = entry.path.removesuffix(slot).removesuffix(".") if slot else entry.path
    modules = dict(model.named_modules())
    for path in (join(prefix, owner), owner):
        if path in modules:
            site = Site(model, path, entry.spec)
            check_site(site)
            return site
    raise CheckpointError(
        ACTION,
        subject=type(model).__name__,
        got=f"no module at {short(entry.path)}",
        hint="config.json and this model class do not fit together; load it with the class it was saved from.",
    )


def _empty(site: Site, entry: SiteRecord) -> KANModule:
    denses = site.denses()
    dense = denses[0]
    mlp = (dense.hidden_features, dense.down_bias is not None)
    if mlp != (entry.mlp_hidden, entry.mlp_down_bias):
        wrong = f"an MLP of width {entry.mlp_hidden}, {'with' if entry.mlp_down_bias else 'without'} a bias behind it, in config.json"
        raise CheckpointError(ACTION, subject=site.path, got=wrong, expected=f"{mlp[0]}, {'with' if mlp[1] else 'without'}")
    with torch.device(dense.up_weight.device):
        module = assemble(site, [empty_block(each, entry.config, entry.hidden, down_bias=entry.down_bias) for each in denses])
    put_empty_formulas(module, entry.snapped, site.path)
    put_empty_masks(module, entry.pruned, site.path)
    return module


def register_with_transformers() -> None:
    """Enters the `kan` method into transformers' tables; calling it again does nothing."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(KANQuantizationConfig)
        auto.register_quantizer(QUANT_METHOD)(KANQuantizer)
