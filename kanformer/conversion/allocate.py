"""Hidden widths of several blocks under one budget of parameters, so that the weighted sum of their errors is least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kanformer.conversion.error_curve import ErrorCurve


@dataclass(frozen=True)
class Claim:
    """What one block may get.

    Attributes:
        curve: its error over width. weight: what an error of 1 counts.
        low, high: least and greatest width, multiples of `step` apart.
        cost: parameters of each `step` channels.
    """

    curve: ErrorCurve
    weight: float
    low: int
    high: int
    step: int
    cost: int


def share_out(claims: Sequence[Claim], budget: int) -> list[int]:
    """The widths, each between its claim's `low` and `high`, that cost at most `budget` parameters more than all `low`s.

    The errors fall convexly (their lower convex hulls are used), so that giving every parameter to where it takes off most, the steepest piece
    first, is the best division (water-filling). What the last piece leaves over goes to the next ones that can still use it.
    """
    widths = [claim.low for claim in claims]
    pieces = sorted((-slope, number, end) for number, claim in enumerate(claims) for slope, end in _pieces(claim))
    cut: set[int] = set()
    for _, number, end in pieces:
        claim = claims[number]
        if number in cut:
            continue
        steps = min((end - widths[number]) // claim.step, budget // claim.cost)
        widths[number] += steps * claim.step
        budget -= steps * claim.cost
        if widths[number] < end:
            cut.add(number)
    return widths


def _pieces(claim: Claim) -> list[tuple[float, int]]:
    """(error taken off per parameter, width where it ends) of the hull's pieces, from `low` on; the first take off most."""
    inner = {claim.low + (width - claim.low) // claim.step * claim.step for width in claim.curve.widths if claim.low < width < claim.high}
    hull: list[tuple[int, float]] = []
    for width in sorted({claim.low, *inner, claim.high}):
        point = (width, claim.weight * claim.curve.at(width))
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(-_slope(left, right) * claim.step / claim.cost, right[0]) for left, right in itertools.pairwise(hull)]


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
