"""Patching: plan, build everything outside the model, then swap everything or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from kanformer.config import KANConfig
from kanformer.conversion import FFNStatistics, convert
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.layers import KANFeedForward
from kanformer.layers.kan_linear import KANLinear
from kanformer.surgery.calibrate import Calibration, collect_statistics
from kanformer.surgery.holders import by_holder, forget_parts
from kanformer.surgery.modules import get_path, mark_initialized, references
from kanformer.surgery.plan import PlannedBlock, SurgeryPlan, plan_surgery
from kanformer.surgery.record import PatchRecord, SiteRecord, set_record
from kanformer.surgery.sentinel import add_sentinel
from kanformer.surgery.sites import Site
from kanformer.surgery.spec import FFNSpec

Model = TypeVar("Model", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def patch_model(
    model: Model,
    config: KANConfig | None = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    specs: Sequence[FFNSpec] | None = None,
    **overrides: Any,
) -> Model:
    """Replaces the feed-forward blocks of `model` by KAN-FFNs, in place, all of them or none.

    With the default init="exact" the model computes what it computed before.

    Args:
        model: any transformers model of a known family, or any module with `specs`.
        config: see `KANConfig`; `overrides` replace single values (`edges="full"`, `layers_to_transform=[0, 1]`, ...).
        calibration: batches of model inputs (dicts as for `model(**batch)`), or what `calibrate` made of them: needed by
            init="prune"; otherwise optional, it sets each grid to the range of its data. Padding (attention_mask 0) is ignored.
        specs: descriptions of the blocks, for model classes that kanformer does not know.

    Returns:
        The same model.

    Raises:
        NoFeedForwardError: no block found, or the selection matches nothing or only in part.
        SurgeryError: the model is patched or quantized already.
        ConfigError: a wrong setting. DataError: calibration without tokens or with NaN.
        In every case the model is as it was.
    """
    plan = plan_surgery(model, config, specs=specs, **overrides)
    _check_complete(plan)
    if plan.config.init == "prune" and calibration is None:
        raise ConfigError(
            "patch the model with init='prune'",
            got="no calibration data",
            hint="Pass calibration=batches, dicts of model inputs such as {'input_ids': ..., 'attention_mask': ...}.",
        )
    statistics: dict[str, FFNStatistics] = {}
    if calibration is not None and plan.config.init != "random":
        gram = plan.config.init == "prune"
        known = isinstance(calibration, Calibration)
        statistics = calibration.of(plan.sites, gram=gram) if known else collect_statistics(model, plan.sites, calibration, gram=gram)
    blocks = {site.path: _build(site, plan.config, statistics.get(site.path)) for site in plan.sites}
    _put_in(model, plan, blocks)
    return model


def _put_in(model: nn.Module, plan: SurgeryPlan, blocks: dict[str, KANFeedForward]) -> None:
    """Swaps the blocks in and leaves a record with each transformers model that holds some; undoes everything if any step fails."""
    rows = {row.path: row for row in plan.blocks}
    done: list[tuple[nn.Module, PatchRecord]] = []
    try:
        for holder, sites in by_holder(model, plan.sites):
            record = PatchRecord(plan.config, tuple(_site_record(holder, site, rows[path]) for path, site in sites.items()))
            record.undo = swap(holder, [(site, blocks[path]) for path, site in sites.items()], record)
            done.append((holder, record))
    except BaseException:
        for holder, record in reversed(done):
            revert(holder, record.undo, record.attributes)
        raise
    for holder, record in done:
        if not plan.config.keep_original:
            record.undo, record.attributes = [], []
        forget_parts(holder)
        set_record(holder, record)


def _site_record(model: nn.Module, site: Site, row: PlannedBlock) -> SiteRecord:
    return SiteRecord(relative_path(model, site.path), site.spec, row.kan_hidden, row.mlp_hidden, row.down_bias, site.dense().down_bias is not None)


def relative_path(model: nn.Module, path: str) -> str:
    """`path` seen from the base model: without the prefix that a head adds."""
    prefix = getattr(model, "base_model_prefix", "")
    return path.removeprefix(prefix + ".") if prefix and hasattr(model, prefix) else path


def swap(model: nn.Module, pairs: list[tuple[Site, KANFeedForward]], record: PatchRecord) -> list[tuple[str, str, nn.Module]]:
    """Puts the blocks into their slots and identities into the rest; undoes everything if any step fails.

    Returns:
        (parent path, name, original module) of every change; changed attributes are added to `record`.
    """
    names = {module: path for path, module in model.named_modules()}
    undo: list[tuple[str, str, nn.Module]] = []

    def replace(old: nn.Module, new: nn.Module) -> None:
        for parent, name in references(model, old):
            undo.append((names[parent], name, old))
            parent._modules[name] = new

    try:
        for site, block in pairs:
            owner = site.owner
            slot = get_path(owner, site.spec.slot)
            if isinstance(site.part(site.spec.hidden_dropout) if site.spec.hidden_dropout else None, int | float):
                _set_attribute(record, site.owner_path, owner, str(site.spec.hidden_dropout), 0.0)
            rest = [(path, get_path(owner, path)) for path in site.spec.identities]
            block.takes_residual = site.spec.residual is not None
            replace(slot, block)
            for path, part in rest:
                if isinstance(part, nn.Module):
                    replace(part, nn.Identity())
                else:
                    _set_attribute(record, site.owner_path, owner, path, nn.Identity())
            mark_initialized(model, site.path, block)
    except BaseException:
        revert(model, undo, record.attributes)
        raise
    return undo


def revert(model: nn.Module, undo: list[tuple[str, str, nn.Module]], attributes: list[tuple[str, str, Any]]) -> None:
    """Takes back what `swap` did, last change first."""
    for parent, name, original in reversed(undo):
        get_path(model, parent)._modules[name] = original
    for owner, name, value in reversed(attributes):
        _assign(get_path(model, owner), name, value)


def _set_attribute(record: PatchRecord, owner_path: str, owner: nn.Module, path: str, value: Any) -> None:
    record.attributes.append((owner_path, path, get_path(owner, path)))
    _assign(owner, path, value)


def _assign(owner: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    holder = get_path(owner, parent)
    if not isinstance(value, nn.Module):
        holder._modules.pop(name, None)
    setattr(holder, name, value)


def _check_complete(plan: SurgeryPlan) -> None:
    if not plan.refusals:
        return
    reasons = "; ".join(f"{refusal.path} ({refusal.family}): {refusal.reason}" for refusal in plan.refusals[:4])
    more = f"; and {len(plan.refusals) - 4} more" if len(plan.refusals) > 4 else ""
    raise NoFeedForwardError(
        f"patch {'any' if not plan.blocks else 'all'} of the {len(plan.blocks) + len(plan.refusals)} feed-forward blocks",
        subject=plan.model_class,
        got=reasons + more,
        hint="Leave them out with exclude_modules=[...], or describe them with specs=[kanformer.FFNSpec(...)].",
    )


def _build(site: Site, config: KANConfig, statistics: FFNStatistics | None) -> KANFeedForward:
    slot = site.part(site.spec.slot) if site.spec.slot else site.owner
    block = convert(site.dense(), config, statistics)
    add_sentinel(block, site.spec)
    _keep_state(site, slot, block)
    return block


def _keep_state(site: Site, slot: nn.Module, block: KANFeedForward) -> None:
    """Training mode, requires_grad and (where the slot was the whole block) hooks of what was there."""
    block.train(slot.training)
    maps = [(site.up, block.kan_up), (site.down, block.kan_down), (site.up if site.spec.fused else site.gate, block.kan_gate)]
    for old, new in maps:
        if old is None or new is None:
            continue
        new_weight, new_bias = (new.kan_base_weight, new.kan_bias) if isinstance(new, KANLinear) else (new.weight, new.bias)
        new_weight.requires_grad_(old.weight.requires_grad)  # type: ignore[union-attr,operator,arg-type]
        if isinstance(new_bias, nn.Parameter):
            like = old.bias if old.bias is not None else old.weight
            new_bias.requires_grad_(like.requires_grad)  # type: ignore[union-attr,operator,arg-type]
    if site.spec.structure == "module":
        for name in _HOOKS:
            setattr(block, name, getattr(slot, name))
