"""Levenberg and Marquardt on (a, t) of many formulas at once; c and d are solved for (variable projection, Golub and Pereyra 1973, Kaufman 1975)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kanformer.interpret.symbolic.library import Family, both_of, valid_ends

_ROWS = 2048
_LONGEST = 2.0  # step in a (relative to 1 + |a|) and in t, in standard deviations of the input
_DONE = 1e-9  # drop of the squared error, of a function of norm 1


class Descent(NamedTuple):
    """What a descent ended at: each (n,), in units of z, for functions of norm 1.

    Attributes:
        a, t, c: numbers of the formula. error: 1 - R2, infinite where the formula is not defined on the data.
        gram: (n, 3) entries (aa, tt, at) of the 2x2 Gram matrix of the Jacobian.
        largest: largest |c f| over the nodes.
    """

    a: Tensor
    t: Tensor
    c: Tensor
    error: Tensor
    gram: Tensor
    largest: Tensor


def descend(family: Family, nodes: Tensor, low: Tensor, high: Tensor, y: Tensor, a: Tensor, t: Tensor, steps: int = 12) -> Descent:
    """Improves (a, t) of `family` for functions y (n, G), centred, of norm 1.

    Args:
        nodes: (n, G) in z. low, high: (n,) ends of the data, where the formula must be defined. a, t: (n,) starts.
        steps: of Levenberg and Marquardt, at most.
    """
    parts = [_descend(family, nodes[rows], low[rows], high[rows], y[rows], a[rows], t[rows], steps) for rows in _slices(len(y))]
    return Descent(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _slices(count: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, count)) for start in range(0, max(count, 1), _ROWS)]


class _State(NamedTuple):
    error: Tensor
    c: Tensor
    sums: Tensor  # (n, 2, 5): (a-slope, t-slope) with (a-slope, t-slope, f, rest, 1), all of f's derivatives
    norm: Tensor
    largest: Tensor


def _look(family: Family, nodes: Tensor, low: Tensor, high: Tensor, y: Tensor, a: Tensor, t: Tensor) -> _State:
    shifted = nodes - t.unsqueeze(1)
    f, slope = both_of(family)(a.unsqueeze(1) * shifted)
    centred = f - f.mean(1, keepdim=True)
    norm = centred.square().sum(1).clamp(min=1e-20)
    c = (centred * y).sum(1) / norm
    rest = torch.addcmul(y, c.unsqueeze(1), centred, value=-1)
    error = rest.square().sum(1)
    good = valid_ends(family, a * (low - t), a * (high - t)) & error.isfinite()
    columns = torch.stack([slope * shifted, slope, centred, rest, torch.ones_like(f)], 1)
    sums = torch.bmm(columns[:, :2], columns.transpose(1, 2))
    largest = (c.unsqueeze(1) * f).abs().amax(1)
    return _State(torch.where(good, error, torch.inf), c, sums, norm, largest)


def _normal(state: _State, a: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gram matrix (aa, tt, at) and gradient (a, t) of the projected problem: slopes without their parts along 1 and f."""
    s, c = state.sums, state.c
    over = (s[:, :, 2].unsqueeze(2) * s[:, :, 2].unsqueeze(1)) / state.norm[:, None, None]
    inner = s[:, :, :2] - over - s[:, :, 4].unsqueeze(2) * s[:, :, 4].unsqueeze(1) / points
    square = c * c
    aa, tt, at = square * inner[:, 0, 0], square * a * a * inner[:, 1, 1], -square * a * inner[:, 0, 1]
    return aa.clamp(min=0), tt.clamp(min=0), at, c * s[:, 0, 3], -c * a * s[:, 1, 3]


def _descend(family: Family, nodes: Tensor, low: Tensor, high: Tensor, y: Tensor, a: Tensor, t: Tensor, steps: int) -> Descent:
    a, t = a.clone(), t.clone()
    free_a, free_t = "a" in family.free, "t" in family.free
    damping = torch.full_like(a, 1e-2)
    state = _look(family, nodes, low, high, y, a, t)
    for _ in range(steps):
        aa, tt, at, ga, gt = _normal(state, a, nodes.shape[1])
        if not free_a:
            aa, at, ga = torch.ones_like(aa), torch.zeros_like(at), torch.zeros_like(ga)
        if not free_t:
            tt, at, gt = torch.ones_like(tt), torch.zeros_like(at), torch.zeros_like(gt)
        left, right = aa * (1 + damping) + 1e-12, tt * (1 + damping) + 1e-12
        determinant = (left * right - at * at).clamp(min=1e-30)
        longest = _LONGEST * (1 + a.abs())
        step_a = ((right * ga - at * gt) / determinant).maximum(-longest).minimum(longest)
        step_t = ((left * gt - at * ga) / determinant).clamp(-_LONGEST, _LONGEST)
        new_a, new_t = a + step_a, t + step_t
        new = _look(family, nodes, low, high, y, new_a, new_t)
        better = new.error < state.error
        gained = torch.where(better, state.error - new.error, 0.0)
        a, t = torch.where(better, new_a, a), torch.where(better, new_t, t)
        state = _State(*(torch.where(better.view(-1, *[1] * (after.dim() - 1)), after, before) for after, before in zip(new, state, strict=True)))
        damping = torch.where(better, damping * 0.3, damping * 5).clamp(1e-7, 1e7)
        if not bool(((gained > _DONE) | (~better & (damping < 1e4))).any()):
            break
    aa, tt, at, _, _ = _normal(state, a, nodes.shape[1])
    return Descent(a, t, state.c, state.error, torch.stack([aa, tt, at], 1), state.largest)


def condition(family: Family, gram: Tensor) -> Tensor:
    """Condition number of the 2x2 Gram matrices (n, 3); 1 where only one of a and t is free; infinite where they cannot be told apart."""
    aa, tt, at = gram.double().unbind(1)
    if family.free != "at":
        return torch.ones_like(aa)
    middle, spread = (aa + tt) / 2, (((aa - tt) / 2).square() + at.square()).sqrt()
    return torch.where(middle - spread > 1e-15 * middle, (middle + spread) / (middle - spread).clamp(min=1e-300), torch.inf)
