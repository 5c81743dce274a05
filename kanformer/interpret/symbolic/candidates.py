"""All families for a chunk of functions: R2 of each, with (a, t) where the family has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kanformer.interpret.symbolic.closed import closed_scores, power_numbers
from kanformer.interpret.symbolic.descend import descend
from kanformer.interpret.symbolic.dictionary import COARSE, FINE, search
from kanformer.interpret.symbolic.library import CLOSED, Family
from kanformer.interpret.symbolic.points import NODES, Points

_FEW = 16  # functions per input below which a fine grid would cost more than it finds
_AT_LEAST, _AT_MOST = 3, 8  # families that are refined
_MARGIN = {FINE: 0.03, COARSE: 0.06}  # of R2 from the best, within which families are refined
_LARGEST = 50.0  # |c f| over the function's standard deviation: beyond, a formula is the difference of large numbers


@dataclass(frozen=True)
class Fitted:
    """The families' fits to the functions of a chunk, in units of z.

    Attributes:
        families: the columns. rows: (n,) input of each function. points: of all inputs. base: (inputs, points) base function at all points.
        y: (n, G) functions at the nodes, centred and of norm 1; zeros where a function does not vary. norm, mean: (n,).
        table: (n, families) R2, NaN where a family was not tried or cannot be.
        a, t: (n, families). refined: (n, families) whether they were descended to.
    """

    families: Sequence[Family]
    rows: Tensor
    points: Points
    base: Tensor
    y: Tensor
    norm: Tensor
    mean: Tensor
    table: Tensor
    a: Tensor
    t: Tensor
    refined: Tensor


def fit_candidates(values: Tensor, base: Tensor, points: Points, rows: Tensor, families: Sequence[Family], tie: float, base_name: str) -> Fitted:
    """Fits the families to functions.

    Args:
        values: (n, points) functions at all points of their inputs, sorted by input. base: (inputs, points).
        rows: (n,) inputs. tie: where x alone is as good, nothing else is tried. base_name: family of the base function or "".
    """
    nodes = values[:, :NODES]
    mean = nodes.mean(1)
    y = nodes - mean.unsqueeze(1)
    norm = y.norm(dim=1)
    still = (norm <= 1e-12 * mean.abs()) | points.constant[rows] | (norm == 0)
    y = torch.where(still.unsqueeze(1), 0.0, y / norm.clamp(min=1e-300).unsqueeze(1))
    shape = (len(values), len(families))
    table = torch.full(shape, torch.nan, dtype=torch.float64, device=values.device)
    a, t = torch.ones_like(table), torch.zeros_like(table)
    used = torch.unique(rows)
    own = torch.searchsorted(used, rows)
    scores = closed_scores(points.nodes[used], base[used, :NODES], y, own)
    if base_name == "x":
        for name in ("base", "base_x"):
            scores[name] = torch.full_like(scores[name], torch.nan)
    for column, family in enumerate(families):
        if family in CLOSED:
            table[:, column] = scores[family.name]
    fitted = Fitted(families, rows, points, base, y, norm, mean, table, a, t, torch.zeros(shape, dtype=torch.bool, device=values.device))
    _place_powers(fitted, used, own)
    table[still] = torch.nan
    linear = table[:, [family.name for family in families].index("x")]
    wanted = (~still & ~(linear >= 1 - tie)).nonzero().squeeze(1)
    if len(wanted):
        _search(fitted, wanted)
    return fitted


def _place_powers(fitted: Fitted, used: Tensor, own: Tensor) -> None:
    """The shifts of parabolas and cubics, and no score for those that would be a difference of large numbers."""
    for column, family in enumerate(fitted.families):
        if family.name not in ("x^2", "cubic"):
            continue
        degree, z = (2 if family.name == "x^2" else 3), fitted.points.nodes[fitted.rows]
        t, e = power_numbers(degree, fitted.points.nodes[used], fitted.y, own)
        rest = fitted.y - e.unsqueeze(1) * z
        power = (z - t.unsqueeze(1)) ** degree
        centred = power - power.mean(1, keepdim=True)
        c = (centred * rest).sum(1) / centred.square().sum(1).clamp(min=1e-300)
        far = (c.unsqueeze(1) * power).abs().amax(1) > _LARGEST / NODES**0.5
        fitted.t[:, column] = t
        fitted.table[:, column] = torch.where(far, torch.nan, fitted.table[:, column])


def _search(fitted: Fitted, wanted: Tensor) -> None:
    searched = [column for column, family in enumerate(fitted.families) if family not in CLOSED]
    if not searched:
        return
    rows = fitted.rows[wanted]
    inputs, counts = torch.unique_consecutive(rows, return_counts=True)
    size = FINE if len(rows) >= _FEW * len(inputs) else COARSE
    if size is COARSE:
        inputs, counts = rows, torch.ones_like(rows)
    low, high = fitted.points.ends
    nodes, low, high = (value[inputs].float() for value in (fitted.points.nodes, low, high))
    stops = counts.cumsum(0).tolist()
    edges = [slice(stop - count, stop) for stop, count in zip(stops, counts.tolist(), strict=True)]
    curves = fitted.y[wanted].float()
    found = [search(fitted.families[column], nodes, low, high, curves, edges, size) for column in searched]
    r2, a, t = (torch.stack(values, 1) for values in zip(*found, strict=True))
    table = fitted.table[wanted]
    best = torch.maximum(table.nan_to_num(-1).amax(1), r2.double().amax(1))
    # Of families with one free number the grid is coarser along it than it looks, for a two-parameter family has more ways to come near.
    simple = torch.tensor([fitted.families[column].free != "at" for column in searched], device=r2.device)
    order = (r2 + simple * _MARGIN[size] / 2).argsort(1, descending=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(len(searched), device=order.device).expand_as(order))
    refine = (r2 > 0) & ((ranks < _AT_LEAST) | ((ranks < _AT_MOST) & (r2 >= best.unsqueeze(1) - _MARGIN[size])))
    for place, column in enumerate(searched):
        some = refine[:, place].nonzero().squeeze(1)
        where = wanted[some]
        scores, new_a, new_t = r2[:, place].double(), a[:, place].double(), t[:, place].double()
        if len(some):
            _refine(fitted.families[column], fitted, where, curves[some], a[some, place], t[some, place], some, scores, new_a, new_t)
            fitted.refined[where, column] = True
        fitted.table[wanted, column] = torch.where(scores > 0, scores, torch.nan)
        fitted.a[wanted, column], fitted.t[wanted, column] = new_a, new_t


def _refine(family: Family, fitted: Fitted, where: Tensor, y: Tensor, a: Tensor, t: Tensor, some: Tensor, scores: Tensor, new_a: Tensor, new_t: Tensor) -> None:
    rows, (low, high) = fitted.rows[where], fitted.points.ends
    found = descend(family, fitted.points.nodes[rows].float(), low[rows].float(), high[rows].float(), y, a, t)
    good = (1 - found.error > 0) & (found.largest <= _LARGEST / NODES**0.5)
    scores[some] = torch.where(good, 1 - found.error, torch.nan).double()
    new_a[some], new_t[some] = found.a.double(), found.t.double()
