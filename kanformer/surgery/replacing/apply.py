"""Patching: plan, build everything outside the model, then swap everything or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from kanformer.config import KANConfig
from kanformer.configs import Configs
from kanformer.conversion import FFNStatistics, convert
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.surgery.assemble import KANModule, assemble, dense_blocks
from kanformer.surgery.calibrating.calibrate import collect_statistics
from kanformer.surgery.calibrating.calibration import Calibration
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.holders import by_holder, forget_parts
from kanformer.surgery.modules import PassThrough, all_references, get_path, mark_initialized
from kanformer.surgery.planning.plan import PlannedBlock, SurgeryPlan, plan_surgery
from kanformer.surgery.planning.plan_table import refusal_lines
from kanformer.surgery.planning.select import Where
from kanformer.surgery.record import PatchRecord, SiteRecord, set_record
from kanformer.surgery.replacing.cautions import warn_of_losses
from kanformer.surgery.replacing.state import keep_state

Model = TypeVar("Model", bound=nn.Module)


def patch_model(
    model: Model,
    config: Configs = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    specs: Sequence[FFNSpec] | None = None,
    where: Where | None = None,
    **overrides: Any,
) -> Model:
    """Replaces the feed-forward blocks of `model` by KAN-FFNs, in place, all of them or none.

    With the default init="exact" the model computes what it computed before. Device, dtype, training modes, requires_grad and the hooks of whole blocks
    are kept. Make the optimizer, compile and wrap (DDP, FSDP, DeepSpeed, peft) after it: a UserWarning says where that was done before.

    Args:
        model: any transformers model of a known family, or any module with `specs`.
        config: see `KANConfig`, or a list of them: a block gets the first that selects it, and one that none selects stays an MLP.
            `overrides` replace single values, in each config (`edges="full"`, `layers_to_transform=[0, 1]`, ...).
        calibration: batches of model inputs (dicts as for `model(**batch)`), or what `calibrate` made of them: needed by
            init="prune"; otherwise optional, it sets each grid to the range of its data. Padding (attention_mask 0) is ignored.
        specs: descriptions of blocks that kanformer does not know. They come first, and what it knows applies to the rest; to have these blocks
            alone, add `where=lambda block: block.family == "mine"` with your spec's name. `discover` proposes them.
        where: a function that says of each block whether it may be taken, see `plan_surgery`.

    Returns:
        The same model.

    Raises:
        NoFeedForwardError: no block found, or the selection matches nothing or only in part.
        SurgeryError: the model is patched, quantized, compiled, wrapped or partitioned already.
        ConfigError: a wrong setting. DataError: calibration without tokens or with NaN.
        In every case the model is as it was.
    """
    plan = plan_surgery(model, config, specs=specs, where=where, **overrides)
    _check_complete(plan)
    warn_of_losses(model, plan.sites)
    statistics = _statistics(model, plan, calibration)
    planned = list(zip(plan.sites, plan.blocks, strict=True))
    blocks = {site.path: _build(site, row.config, statistics) for site, row in planned}
    _put_in(model, plan, blocks)
    return model


def _statistics(model: nn.Module, plan: SurgeryPlan, calibration: Iterable[Mapping[str, Any]] | Calibration | None) -> dict[str, FFNStatistics]:
    """What the blocks need to know of the data, by path: Gram matrices where they are pruned, nothing where they start at random."""
    gram = [block.path for block in plan.blocks if block.config.init == "prune"]
    if gram and calibration is None:
        raise ConfigError(
            "patch the model with init='prune'",
            got="no calibration data",
            hint="Pass calibration=batches, dicts of model inputs such as {'input_ids': ..., 'attention_mask': ...}.",
        )
    sites = [site for site, block in zip(plan.sites, plan.blocks, strict=True) if block.config.init != "random"]
    if calibration is None or not sites:
        return {}
    return calibration.of(sites, gram=gram) if isinstance(calibration, Calibration) else collect_statistics(model, sites, calibration, gram=gram)


def _put_in(model: nn.Module, plan: SurgeryPlan, blocks: dict[str, KANModule]) -> None:
    """Swaps the blocks in and leaves a record with each transformers model that holds some; undoes everything if any step fails."""
    rows = {row.path: row for row in plan.blocks}
    done: list[tuple[nn.Module, PatchRecord]] = []
    try:
        for holder, sites in by_holder(model, plan.sites):
            record = PatchRecord(tuple(_site_record(holder, site, rows[path]) for path, site in sites.items()))
            record.undo = swap(holder, [(site, blocks[path]) for path, site in sites.items()], record)
            done.append((holder, record))
    except BaseException:
        for holder, record in reversed(done):
            revert(holder, record.undo, record.attributes)
        raise
    for holder, record in done:
        if not plan.configs[0].keep_original:
            record.undo, record.attributes = [], []
        forget_parts(holder)
        set_record(holder, record)


def _site_record(model: nn.Module, site: Site, row: PlannedBlock) -> SiteRecord:
    return SiteRecord(relative_path(model, site.path), site.spec, row.config, row.kan_hidden, row.mlp_hidden, row.kan_down_bias, row.down_bias)


def relative_path(model: nn.Module, path: str) -> str:
    """`path` seen from the base model: without the prefix that a head adds."""
    prefix = getattr(model, "base_model_prefix", "")
    return path.removeprefix(prefix + ".") if prefix and hasattr(model, prefix) else path


def swap(model: nn.Module, pairs: list[tuple[Site, KANModule]], record: PatchRecord) -> list[tuple[str, str, nn.Module]]:
    """Puts the blocks into their slots and identities into the rest; undoes everything if any step fails.

    Returns:
        (parent path, name, original module) of every change; changed attributes are added to `record`.
    """
    places = all_references(model)
    undo: list[tuple[str, str, nn.Module]] = []

    def replace(old: nn.Module, new: nn.Module) -> None:
        for path, parent, name in places[old]:
            undo.append((path, name, old))
            parent._modules[name] = new

    try:
        for site, block in pairs:
            owner = site.owner
            slot = get_path(owner, site.spec.slot)
            if isinstance(site.part(site.spec.hidden_dropout) if site.spec.hidden_dropout else None, int | float):
                _set_attribute(record, site.owner_path, owner, str(site.spec.hidden_dropout), 0.0)
            rest = [(path, get_path(owner, path)) for path in site.spec.identities]
            replace(slot, block)
            for path, part in rest:
                if isinstance(part, nn.Module):
                    replace(part, PassThrough().train(part.training))
                else:
                    _set_attribute(record, site.owner_path, owner, path, PassThrough())
        mark_initialized(model, {site.path: block for site, block in pairs})
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
    raise NoFeedForwardError(
        f"patch {'any' if not plan.blocks else 'all'} of the {len(plan.blocks) + len(plan.refusals)} feed-forward blocks",
        subject=plan.model_class,
        got="; ".join(refusal_lines(plan.refusals, 4)),
        hint="Leave them out with exclude_modules=[...], or describe them with specs=[kanformer.FFNSpec(...)].",
    )


def _build(site: Site, config: KANConfig, statistics: dict[str, FFNStatistics]) -> KANModule:
    blocks = [convert(dense, config, statistics.get(path)) for path, dense in dense_blocks(site).items()]
    module = assemble(site, blocks)
    keep_state(site, module)
    return module
