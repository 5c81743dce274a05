"""Pruning by cumulative effect, by number, or within a budget of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kanformer.errors import ConfigError, DataError, SurgeryError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.losses import UserLoss
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.pruning.choose import Masks, masks_by_share, masks_by_sparsity, negative_scores
from kanformer.interpret.pruning.curve import WHAT, masks_for, measured
from kanformer.interpret.pruning.edges import take_out
from kanformer.interpret.pruning.neurons import Channels, as_masks, channels_by_share, channels_by_sparsity, check_narrowing, narrow
from kanformer.layers import KANExperts
from kanformer.layers.grids import GridModule
from kanformer.surgery.tables import table

_HALVINGS = 7
_ACTION = "prune"


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        model: the pruned model. what, by: what was taken out, and the score that chose.
        alive: a row per map, {"layer", "map", "edges", "total", "outputs"}: edges that stay (of those that the statistics know), all, and outputs.
        hidden: by block (hidden channels now, before), with what="neurons".
        negative: edges whose score was below 0, which counts as 0.
        loss_before, change, error: measured on the batches, None without them: the loss per prediction, its change, and the change's standard error.
        loss_name: what was measured. trials: with a budget, rows of {"sparsity", "change"}.
    """

    model: nn.Module
    what: str
    by: str
    alive: list[dict[str, Any]]
    hidden: dict[str, tuple[int, int]] = field(default_factory=dict)
    negative: int = 0
    loss_before: float | None = None
    change: float | None = None
    error: float | None = None
    loss_name: str = ""
    trials: list[dict[str, float]] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Fraction of the edges that went."""
        return 1 - sum(row["edges"] for row in self.alive) / max(1, sum(row["total"] for row in self.alive))

    def __str__(self) -> str:
        rows = [
            (row["layer"], row["map"].removeprefix("kan_"), f"{row['edges']:,}", f"{row['total']:,}", f"{1 - row['edges'] / row['total']:.4f}")
            for row in self.alive
        ]
        text = table(("layer", "map", "edges", "of", "taken out"), rows, right=(2, 3, 4))
        text += "".join(f"\n{path}: {now:,} of {before:,} hidden channels" for path, (now, before) in self.hidden.items())
        if self.negative:
            text += f"\n{self.negative:,} edges had a {self.by} below 0 (taking them out is predicted to help), counted as 0"
        if self.change is None:
            return f"{text}\nno loss was measured (give batches=)"
        return f"{text}\n{self.loss_name}: {self.loss_before:.6g} before, change {self.change:+.6g} (standard error {self.error:.2g})"


def prune(
    model: nn.Module,
    stats: ModelStats,
    *,
    keep: float | None = None,
    sparsity: float | None = None,
    loss_budget: float | None = None,
    what: str = "edges",
    by: str | None = None,
    batches: Iterable[Mapping] | None = None,
    loss: UserLoss | None = None,
    inplace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Pruned:
    """Takes out edges, or whole hidden channels, that the scores say are worth little.

    What an edge gave on average over the data of `stats` goes into the bias of its output, so a pruned model is the model with these edges held at their
    means. An edge stays out in any further training (`layers.masks`), and after saving and loading. Every output keeps an edge. Hidden channels leave
    the matrices: parameters, saved file and time shrink; channels that share a function go together.

    Args:
        model: a patched model; it is not touched unless `inplace`.
        stats: `collect(model, batches)` with scores of all edges (default effect, else sens, else std).
        keep: of each output (with what="neurons" of each block) the fewest edges that have this share of the sum of its scores, in (0, 1]; 1 changes nothing.
        sparsity: instead, the fraction of all of the model's edges (units) that goes, in [0, 1).
        loss_budget: instead, the largest sparsity (found by halving, each step measured) with which the loss rises by no more than this; needs batches.
            With none of the three, keep=0.95.
        what: "edges" or "neurons". by: name of the score.
        batches: to measure the loss on, see `ablate`. loss: see `Objective`.

    Raises:
        ConfigError: wrong options, scores that were not collected, a mixture of experts. DataError: statistics of another model, or without means.
            SurgeryError: functions that were replaced by formulas. All of them come before anything is changed.
    """
    given = {name: value for name, value in (("keep", keep), ("sparsity", sparsity), ("loss_budget", loss_budget)) if value is not None}
    _check(given, what, batches)
    _check_model(model, stats)
    batches = None if batches is None else [batches] if isinstance(batches, Mapping) else list(batches)
    name, value = next(iter(given.items()), ("keep", 0.95))
    trials: list[dict[str, float]] = []
    if name == "loss_budget":
        assert batches is not None
        value, name = _within(model, stats, batches, what, by, loss, value, trials, progress), "sparsity"
    channels = _channels(model, stats, name, value, by) if what == "neurons" else None
    masks = as_masks(model, channels) if channels is not None else _masks(stats, name, value, by)
    if channels is not None:
        check_narrowing(model, channels)
    numbers = {} if batches is None else _measure(model, stats, batches, masks, loss, progress)
    before = {path: block.hidden_features for path, block in find_blocks(model).items()}
    target = model if inplace else copy.deepcopy(model)
    narrow(target, stats, channels) if channels is not None else take_out(target, stats, masks)
    hidden = {} if channels is None else {path: (block.hidden_features, before[path]) for path, block in find_blocks(target).items() if path in channels}
    alive = [{"layer": path, "map": each, "edges": int(mask.sum()), "total": mask.numel(), "outputs": mask.shape[0]} for (path, each), mask in masks.items()]
    return Pruned(target, what, _rank(stats, by), alive, hidden, negative_scores(stats, by), trials=trials, **numbers)


def _check(given: Mapping[str, float], what: str, batches: Any) -> None:
    if what not in WHAT:
        raise ConfigError(_ACTION, got=f"what={what!r}", expected=" or ".join(WHAT))
    if len(given) > 1:
        raise ConfigError(_ACTION, got=" and ".join(f"{name}={value}" for name, value in given.items()), expected="one of keep, sparsity, loss_budget")
    for name, value in given.items():
        good = isinstance(value, int | float) and math.isfinite(value)
        good = good and (0 < value <= 1 if name == "keep" else 0 <= value < 1 if name == "sparsity" else value >= 0)
        if not good:
            expected = {"keep": "a share in (0, 1]", "sparsity": "a fraction in [0, 1)", "loss_budget": "a finite number >= 0"}[name]
            raise ConfigError(_ACTION, got=f"{name}={value!r}", expected=expected)
    if "loss_budget" in given and batches is None:
        raise ConfigError(_ACTION, got="a loss_budget and no batches", hint="Give batches= to measure the loss on.")


def _check_model(model: nn.Module, stats: ModelStats) -> None:
    blocks = find_blocks(model)
    for path, module in model.named_modules():
        if isinstance(module, KANExperts):
            raise ConfigError(_ACTION, subject=path, got="a mixture of experts", expected="blocks without routing")
    for path, layer in stats.items():
        for name, one in layer.scores.items():
            module: Any = getattr(blocks.get(path), name, None)
            shape = None if module is None else (module.out_features, module.in_features)
            if shape is None or (one.index is None and any(tuple(value.shape) != shape for value in one.values.values())):
                raise DataError(_ACTION, subject=f"{path}, {name}", got="statistics of another model", hint="Collect on the model that you prune.")
    for path, block in blocks.items():
        if any(isinstance(module, GridModule) and module.kan_formulas is not None for module in block.modules()):
            raise SurgeryError(_ACTION, subject=path, got="functions that were replaced by formulas", hint="Prune before you snap, or call unsnap(model).")


def _masks(stats: ModelStats, name: str, value: float, by: str | None) -> Masks:
    return masks_by_share(stats, value, by) if name == "keep" else masks_by_sparsity(stats, value, by)


def _channels(model: nn.Module, stats: ModelStats, name: str, value: float, by: str | None) -> Channels:
    return channels_by_share(model, stats, value, by) if name == "keep" else channels_by_sparsity(model, stats, value, by)


def _rank(stats: ModelStats, by: str | None) -> str:
    return next(one for layer in stats.values() for one in layer.scores.values() if len(one)).rank_by(by)


def _measure(model: nn.Module, stats: ModelStats, batches: list, masks: Masks, loss: UserLoss | None, progress) -> dict[str, Any]:
    change, error, meter = measured(model, stats, batches, [masks], loss, progress)
    return {"loss_before": meter.loss, "change": change[0], "error": error[0], "loss_name": meter.objective.name}


def _within(model, stats, batches, what, by, loss, budget, trials, progress) -> float:
    """The largest sparsity that was measured to be within the budget; 0 always is."""
    good, bad = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (good + bad) / 2
        change = measured(model, stats, batches, [masks_for(model, stats, what, by, middle)], loss, progress)[0][0]
        trials.append({"sparsity": middle, "change": change})
        good, bad = (middle, bad) if change <= budget else (good, middle)
    return good
