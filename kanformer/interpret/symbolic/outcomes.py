"""From R2 of all families to a formula and an outcome per function, with exact numbers and errors in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kanformer.interpret.symbolic.candidates import Fitted
from kanformer.interpret.symbolic.closed import power_numbers, solve
from kanformer.interpret.symbolic.descend import condition, descend
from kanformer.interpret.symbolic.fits import AMBIGUOUS, LINEAR, NEGLIGIBLE, UNIQUE, UNSNAPPABLE
from kanformer.interpret.symbolic.library import Family
from kanformer.interpret.symbolic.points import NODES
from kanformer.layers.formula_functions import formula_function

if TYPE_CHECKING:
    from kanformer.interpret.symbolic.fit import Tolerances

_CONTAINED = (
    ("x", "base_x"),
    ("x", "x^2"),
    ("x", "cubic"),
    ("base", "base_x"),
    ("x^2", "cubic"),
    ("x^3", "cubic"),
)  # (family, one that has it as a special case)
_POLISH = 6


def decide(fitted: Fitted, values: Tensor, node: Tensor, weighting: Tensor, tolerances: Tolerances, keep: bool, base: str) -> dict[str, Tensor]:
    """The per-function tensors of `MapFits`, on the device of the chunk.

    Args:
        values: (n, points) as in `fit_candidates`. node: (n,) deviation of the node, NaN: of the function itself. weighting: see `NodeScale.of`.
        keep: whether the numbers of all families are wanted. base: family that the base function belongs to, or "".
    """
    std = fitted.norm / NODES**0.5
    own = torch.where(node.isnan(), std, node).clamp(min=1e-300)
    weight = std * weighting
    names = [family.name for family in fitted.families]
    complexity = torch.tensor([family.complexity for family in fitted.families], dtype=torch.float64, device=values.device)
    table = fitted.table
    still = table.isnan().all(1)
    negligible = still | (weight < tolerances.negligible)
    best = table.nan_to_num(-1).max(1)
    error = (1 - table).clamp(min=0).sqrt() * (std / own).unsqueeze(1)
    accepted = (table >= tolerances.r2_min) & (error <= tolerances.tol_node)
    equivalent = accepted & (table >= best.values.unsqueeze(1) - tolerances.tie)
    family = torch.where(equivalent, complexity - 1e-3 * table.nan_to_num(0), torch.inf).argmin(1)
    family = torch.where(equivalent.any(1), family, best.indices)
    family = torch.where(negligible, names.index("const"), family)
    equivalent[negligible] = False
    equivalent[negligible, names.index("const")] = True
    equivalent = _without_containing(equivalent, names, base)
    outcome = torch.where(equivalent.sum(1) > 1, AMBIGUOUS, UNIQUE)
    outcome = torch.where(equivalent.any(1), outcome, UNSNAPPABLE)
    outcome = torch.where(family == names.index("x"), torch.where(outcome == UNSNAPPABLE, outcome, LINEAR), outcome)
    outcome = torch.where(negligible, NEGLIGIBLE, outcome)
    numbers, gram_condition = _numbers_of(fitted, family)
    found = _errors(fitted, values, family, numbers)
    explained = (1 - found.pop("squared") / fitted.norm.square().clamp(min=1e-300)).clamp(max=1)
    r2 = torch.where(still, 1.0, explained)
    result = {"outcome": outcome, "family": family, "numbers": numbers, "r2": r2, "std": std, "weight": weight, "condition": gram_condition}
    result |= {"nrmse": (1 - r2).clamp(min=0).sqrt() * std / own, "table": table.float(), "equivalent": equivalent, **found}
    if keep:
        columns = [_numbers_of(fitted, torch.full_like(family, column), 0)[0] for column in range(len(names))]
        result["candidates"] = torch.where(table.isnan().unsqueeze(2), torch.nan, torch.stack(columns, 1))
    return result


def _without_containing(equivalent: Tensor, names: list[str], base: str) -> Tensor:
    """Families that have the simpler one as a special case are no second explanation; nor is the base function's own family beside the base."""
    equivalent = equivalent.clone()
    for small, large in (*_CONTAINED, ("base", base)):
        if small in names and large in names:
            equivalent[:, names.index(large)] &= ~equivalent[:, names.index(small)]
    return equivalent


def _numbers_of(fitted: Fitted, family: Tensor, polish: int = _POLISH) -> tuple[Tensor, Tensor]:
    """(a, t, c, e, d) in x, (n, 5), and the condition number, (n,), for each function's family."""
    numbers = torch.zeros(len(family), 5, dtype=torch.float64, device=family.device)
    numbers[:, 0] = 1
    conditions = torch.ones(len(family), dtype=torch.float64, device=family.device)
    for column in family.unique().tolist():
        some = (family == column).nonzero().squeeze(1)
        numbers[some], conditions[some] = _family_numbers(fitted, fitted.families[column], column, some, polish)
    return numbers, conditions


def _family_numbers(fitted: Fitted, family: Family, column: int, some: Tensor, polish: int) -> tuple[Tensor, Tensor]:
    rows = fitted.rows[some]
    z, y = fitted.points.nodes[rows], fitted.y[some]
    centre, scale = fitted.points.centre[rows], fitted.points.scale[rows]
    a, t, c, e = torch.ones_like(centre), torch.zeros_like(centre), torch.zeros_like(centre), torch.zeros_like(centre)
    found_condition, curve = torch.ones_like(centre), None
    if family.name == "x":
        e = solve([z], y)[:, 0]
    elif family.name in ("base", "base_x"):
        curve = fitted.base[rows, :NODES]
        factors = solve([curve] if family.name == "base" else [curve, z], y)
        c, e = factors[:, 0], factors[:, 1] if family.name == "base_x" else e
    elif family.name in ("x^2", "cubic"):
        used, own = torch.unique(rows, return_inverse=True)
        t, e = power_numbers(2 if family.name == "x^2" else 3, fitted.points.nodes[used], y, own)
    elif family.name != "const":
        a, t, found_condition = _polished(fitted, family, column, some, polish)
    if family.name not in ("const", "x", "base", "base_x"):
        curve = formula_function(str(family.function)).value(a.unsqueeze(1) * (z - t.unsqueeze(1)))
        c = solve([curve], y - e.unsqueeze(1) * z)[:, 0]
        a, t = a / scale, centre + scale * t
    d = -(e.unsqueeze(1) * z).mean(1) - (0 if curve is None else c * curve.mean(1))
    norm = fitted.norm[some]
    c, e, d = c * norm, e * norm, d * norm + fitted.mean[some]
    if family.name == "const":
        d = fitted.mean[some]
    return torch.stack([a, t, c, e / scale, d - e * centre / scale], 1), found_condition


def _polished(fitted: Fitted, family: Family, column: int, some: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a, t) and the condition number, after a few more steps in float64."""
    if not steps:
        return fitted.a[some, column], fitted.t[some, column], torch.ones_like(fitted.norm[some])
    rows, (low, high) = fitted.rows[some], fitted.points.ends
    start = (fitted.points.nodes[rows], low[rows], high[rows], fitted.y[some], fitted.a[some, column], fitted.t[some, column])
    found = descend(family, *start, steps=steps)
    better = found.error.isfinite()
    return torch.where(better, found.a, start[4]), torch.where(better, found.t, start[5]), condition(family, found.gram)


def _errors(fitted: Fitted, values: Tensor, family: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """squared: sum over the nodes; r2_uniform; max_error. All (n,)."""
    predicted = torch.empty_like(values)
    all_x = fitted.points.all_x()
    for column in family.unique().tolist():
        some = (family == column).nonzero().squeeze(1)
        rows = fitted.rows[some]
        x, (a, t, c, e, d) = all_x[rows], (number.unsqueeze(1) for number in numbers[some].unbind(1))
        name = fitted.families[column]
        predicted[some] = e * x + d
        if name.function is None:
            predicted[some] += c * fitted.base[rows]
        elif name.function:
            predicted[some] += c * formula_function(name.function).value(a * (x - t))
    error = values - predicted
    bulk, even = error[:, : -fitted.points.even.shape[1]], values[:, -fitted.points.even.shape[1] :]
    spread = (even - even.mean(1, keepdim=True)).square().sum(1)
    missed = error[:, -even.shape[1] :].square().sum(1)
    floor = 1e-24 * even.square().sum(1) + 1e-300
    uniform = torch.where(spread > floor, 1 - missed / spread.clamp(min=1e-300), torch.where(missed <= floor, 1.0, -torch.inf))
    return {"squared": error[:, :NODES].square().sum(1), "r2_uniform": uniform, "max_error": bulk.abs().amax(1)}
