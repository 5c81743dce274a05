"""What the functions of a map add up to: the standard deviation that their errors are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kanformer.errors import ShapeError
from kanformer.interpret.collect import LayerStats
from kanformer.interpret.curves import plain
from kanformer.interpret.symbolic.functions import Chosen, values_at
from kanformer.interpret.symbolic.points import NODES, Points
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear

_CHUNK_NUMBERS = 2**21


@dataclass(frozen=True)
class NodeScale:
    """Standard deviations of nodes.

    Attributes:
        outputs: (out,) of the outputs of a map with full edges; None with shared edges, where each function is its own node.
        weights: (groups,) with shared edges: a function's standard deviation times this is its part of the outputs' standard deviation.
        source: "measured", "given" or "independent".
    """

    outputs: Tensor | None
    weights: Tensor | None
    source: str

    def of(self, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """(node, weighting): nrmse is rms error / node, weight is standard deviation * weighting; node is NaN where it is the function's own."""
        if self.outputs is not None:
            node = self.outputs[chosen.output]
            return node, 1 / node.clamp(min=1e-300)
        weights = torch.zeros(len(chosen)) if self.weights is None else self.weights[chosen.input]
        return torch.full((len(chosen),), torch.nan, dtype=torch.float64), weights.double()


def node_scale(
    block: KANFeedForward | None, seen: LayerStats | None, name: str, module: EdgeFunctions | KANLinear, points: Points, given: Tensor | None
) -> NodeScale:
    """The scale of a map's nodes, the best known one."""
    if isinstance(module, EdgeFunctions):
        return _shared_scale(block, seen, module, points)
    if given is not None:
        if given.shape != (module.out_features,) or not bool((given > 0).all()):
            raise ShapeError("fit formulas", got=f"node_std of shape {tuple(given.shape)}", expected=f"({module.out_features},), all above 0")
        return NodeScale(given.double().cpu(), None, "given")
    measured = None if seen is None else seen.outputs.get(name)
    if measured is not None and measured.count:
        return NodeScale(measured.variance.double().sqrt(), None, "measured")
    if block is not None and seen is not None and name == "kan_up" and block.activation_in_down and not block.gated:
        return NodeScale(seen.maps["kan_down"].variance.sqrt(), None, "measured")  # what the down map reads is what the up map wrote
    return NodeScale(_independent(module, points), None, "independent")


def _shared_scale(block: KANFeedForward | None, seen: LayerStats | None, module: EdgeFunctions, points: Points) -> NodeScale:
    rows = torch.arange(module.groups)
    deviation = _deviations(module, points, Chosen(rows, torch.full_like(rows, -1)))
    if block is None or seen is None or seen.hidden_variance is None:
        total = deviation.square().sum().sqrt()
        return NodeScale(None, torch.full_like(deviation, 1 / max(float(total), 1e-300)), "independent")
    weight = cast(Tensor, block.kan_down.weight).detach()
    channels = seen.hidden_variance * plain(torch.linalg.vector_norm(weight.float(), dim=0)).double().square()
    groups = channels.view(module.groups, -1).sum(1)
    measured = seen.outputs.get("kan_down")
    known = measured is not None and measured.count > 0
    total = measured.variance.double().sum() if measured is not None and known else groups.sum()
    return NodeScale(None, (groups / total.clamp(min=1e-300)).sqrt() / deviation.clamp(min=1e-300), "measured" if known else "independent")


def _independent(module: KANLinear, points: Points) -> Tensor:
    """sqrt(sum_i Var(phi[o, i])), (out,)."""
    total = torch.zeros(module.out_features, dtype=torch.float64)
    step = max(1, _CHUNK_NUMBERS // (module.out_features * points.all_x().shape[1]))
    for rows in torch.arange(module.in_features).split(step):
        outputs = torch.arange(module.out_features)
        chosen = Chosen(rows.repeat_interleave(len(outputs)), outputs.repeat(len(rows)))
        total += _deviations(module, points, chosen).square().view(len(rows), -1).sum(0)
    return total.sqrt()


def _deviations(module: EdgeFunctions | KANLinear, points: Points, chosen: Chosen) -> Tensor:
    return values_at(module, points, chosen)[:, :NODES].std(1, correction=0).cpu()
