"""Putting formulas in the place of learned functions, within a budget of the loss, and taking them out again."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError, ShapeError, SurgeryError
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.losses import UserLoss
from kanformer.interpret.collecting.mean_loss import MeanLoss
from kanformer.interpret.symbolic.fits import MapFits, SymbolicFits
from kanformer.layers.formulas import formulas_out, make_formulas
from kanformer.layers.grids import GridModule
from kanformer.surgery.snapped import record_changes, rows_of
from kanformer.surgery.tables import table

_FINEST = 64  # the number of formulas that can stay is found to this part of all of them


@dataclass(frozen=True)
class Snapped:
    """What `snap` did.

    Attributes:
        model: the model with formulas.
        formulas, reverted: how many functions have formulas now, and how many accepted ones kept their splines to stay within the budget.
        loss_name: what was measured. losses: a row per measurement, {"step", "formulas", "reverted", "loss"}; empty without batches.
        counts: formulas by layer and map.
    """

    model: nn.Module
    formulas: int
    reverted: int
    loss_name: str
    losses: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The measured loss of the result."""
        return self.losses[-1]["loss"] if self.losses else None

    def __str__(self) -> str:
        text = f"{self.formulas:,} formulas, {self.reverted:,} reverted to stay within the budget"
        if not self.losses:
            return f"{text}; no loss was measured (give batches=)"
        rows = [(row["step"], f"{row['formulas']:,}", f"{row['reverted']:,}", f"{row['loss']:.6g}") for row in self.losses]
        return f"{text}; loss: {self.loss_name}\n{table(('', 'formulas', 'reverted', 'loss'), rows, right=(1, 2, 3))}"


def snap(
    model: nn.Module,
    fits: SymbolicFits,
    *,
    loss_budget: float | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    loss: UserLoss | None = None,
    sensitivity: Mapping[str, Mapping[str, Tensor]] | None = None,
    trainable: bool = False,
    inplace: bool = False,
) -> Snapped:
    """Replaces every function that has an accepted formula by it (negligible ones by a constant), and measures what that does.

    A snapped model saves and loads like any patched one. The splines stay stored beside their formulas, unused, so that `unsnap` gives them back.
    Where the loss rises by more than `loss_budget`, the formulas with the largest predicted effect are reverted, as many as needed (to 1/64 of all):
    by `MapFits.loss_effect` if the statistics of all fits had `effect` or `sens`, else by their errors relative to their nodes.

    Args:
        model: the model that was fitted. It is not touched unless `inplace`.
        fits: what `fit_symbolic` returned.
        loss_budget: how much the loss may rise, >= 0; needs batches. None: no limit.
        batches: data to measure the loss on, see `Objective`: the model's own loss with labels, a language model's cross-entropy, else how far the
            outputs move from those with the splines.
        loss: (outputs, batch) -> scalar tensor, the mean over the batch's tokens, instead.
        sensitivity: factors of the predicted effect by path and map: of each output, (out,), or each group, (groups,), such as rms gradients.
            None: they count alike.
        trainable: whether the numbers a, t, c, e, d become parameters.
        inplace: change the model itself.

    Raises:
        ConfigError: a wrong budget, or a budget without batches. DataError: fits of another model, or batches that cannot be used.
        SurgeryError: formulas are there already. The model is then as it was.
    """
    if loss_budget is not None and not (isinstance(loss_budget, int | float) and 0 <= loss_budget < math.inf):
        raise ConfigError("snap functions", got=f"loss_budget={loss_budget!r}", expected="None or a finite number >= 0")
    if loss_budget is not None and batches is None:
        raise ConfigError("snap functions", got="a loss_budget and no batches", hint="Give batches= to measure the loss on.")
    pairs = _pairs(model, fits)
    measure = None if batches is None else MeanLoss(model, batches, loss)
    if not inplace:
        model = copy.deepcopy(model)
        pairs = _pairs(model, fits)
    plan = _Plan(pairs, sensitivity or {}, trainable)
    try:
        return _snapped(model, plan, measure, loss_budget)
    except BaseException:
        plan.put_in(0)
        record_changes(model)
        raise


def unsnap(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with all formulas taken out: its splines are those from before `snap`.

    Raises:
        SurgeryError: it has no formulas.
    """
    model = model if inplace else copy.deepcopy(model)
    held = [module for module in model.modules() if isinstance(module, GridModule) and module.kan_formulas is not None]
    if not held:
        raise SurgeryError("take formulas out", subject=type(model).__name__, got="a model without formulas")
    for module in held:
        module.kan_formulas = None
    record_changes(model)
    return model


def _pairs(model: nn.Module, fits: SymbolicFits) -> list[tuple[GridModule, MapFits]]:
    blocks = find_blocks(model)
    found: list[tuple[GridModule, MapFits]] = []
    for one in fits.all_maps():
        block = blocks.get(one.path)
        module = None if block is None else dict(block.spline_modules()).get(one.map)
        if module is None or math.prod(rows_of(module)) != one.n_functions:
            raise DataError("snap functions", subject=f"{one.path}, {one.map}", got="fits of another model", hint="Fit the model that you snap.")
        if module.kan_formulas is not None:
            raise SurgeryError("snap functions", subject=f"{one.path}, {one.map}", got="formulas that are there already", hint="Call unsnap(model) first.")
        found.append((module, one))
    return found


class _Plan:
    """All accepted formulas, the least effect first, and putting the first k of them in."""

    def __init__(self, pairs: list[tuple[GridModule, MapFits]], sensitivity: Mapping[str, Mapping[str, Tensor]], trainable: bool) -> None:
        self.pairs, self.trainable = pairs, trainable
        self.places, effects, owners = [], [], []
        predicted = _predicted([one for _, one in pairs])
        for number, (_, one) in enumerate(pairs):
            good = one.accepted & one.numbers.float().isfinite().all(1)
            places = good.nonzero().squeeze(1)
            self.places.append(places)
            effects.append((predicted[number] * _factors(one, sensitivity))[places])
            owners.append(torch.full((len(places),), number))
        self.order = torch.cat(effects).argsort(stable=True)
        self.owner = torch.cat(owners)
        starts = torch.tensor([0, *(len(places) for places in self.places)]).cumsum(0)
        self.within = torch.arange(len(self.owner)) - starts[self.owner]

    def __len__(self) -> int:
        return len(self.order)

    @torch.no_grad()
    def put_in(self, count: int) -> None:
        """The first `count` formulas, and splines everywhere else."""
        kept = self.order[:count]
        for number, (module, one) in enumerate(self.pairs):
            places = self.places[number][self.within[kept[self.owner[kept] == number]].sort().values]
            if not len(places):
                module.kan_formulas = None
                continue
            index = one.input[places].unsqueeze(1) if one.shared else torch.stack([one.input[places], one.output[places]], 1)
            settings: dict[str, Any] = {"trainable": self.trainable, "device": module.kan_grid.device}
            formulas = make_formulas(index, one.numbers[places], one.family[places], one.families, **settings)
            formulas.train(module.training)
            formulas._is_hf_initialized = True  # type: ignore[assignment]
            module.kan_formulas = formulas

    @contextlib.contextmanager
    def out(self) -> Iterator[None]:
        """Splines everywhere, for a while."""
        with formulas_out(module for module, _ in self.pairs):
            yield


def _predicted(fits: list[MapFits]) -> list[Tensor]:
    """Predicted effects of formulas, (n,) each; of one kind, or they could not be put into one order."""
    by_loss = [one.loss_effect for one in fits]
    found = [effect for effect in by_loss if effect is not None]
    return found if len(found) == len(fits) and len({one.score_name for one in fits}) == 1 else [one.effect for one in fits]


def _factors(one: MapFits, sensitivity: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    given = sensitivity.get(one.path, {}).get(one.map)
    if given is None:
        return torch.ones(len(one), dtype=torch.float64)
    where = one.input if one.shared else one.output
    if given.dim() != 1 or len(given) <= int(where.max()):
        raise ShapeError("snap functions", subject=f"{one.path}, {one.map}", got=f"sensitivity {tuple(given.shape)}", expected="a number per output or group")
    return given.double().cpu()[where]


def _snapped(model: nn.Module, plan: _Plan, measure: MeanLoss | None, budget: float | None) -> Snapped:
    losses: list[dict[str, Any]] = []

    def look(step: str, count: int) -> float:
        plan.put_in(count)
        if measure is None:
            return 0.0
        losses.append({"step": step, "formulas": count, "reverted": len(plan) - count, "loss": measure(model, plan.out)})
        return losses[-1]["loss"]

    count = len(plan)
    if measure is not None:
        before = look("before", 0)
        losses[-1]["reverted"] = 0
    after = look("all accepted", count)
    if measure is not None and budget is not None and not after <= before + budget:
        count = _within(look, count, before + budget)
        look("within the budget", count)
    record_changes(model)
    counts: dict[str, dict[str, int]] = {}
    for module, one in plan.pairs:
        counts.setdefault(one.path, {})[one.map] = 0 if module.kan_formulas is None else len(module.kan_formulas)
    return Snapped(model, count, len(plan) - count, "" if measure is None else measure.name, losses, counts)


def _within(look, total: int, limit: float) -> int:
    """A number of formulas with which the loss was measured to be within the limit, by halving; 0 always is."""
    good, bad = 0, total
    while bad - good > max(1, total // _FINEST):
        middle = (good + bad) // 2
        if look("trial", middle) <= limit:
            good = middle
        else:
            bad = middle
    return good
