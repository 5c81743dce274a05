"""Weights that lie together in one tensor: both factors of a gated block, and all experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import get_path

Map = tuple[Tensor, Tensor | None]


def halves(weight: Tensor, bias: Tensor | None, order: str) -> tuple[Map, Map]:
    """((weight, bias) of the up map, of the gate) from a weight (2h, d); see `FFNSpec.fused`."""
    if order == "interleaved":
        gate, up = ((weight[i::2], None if bias is None else bias[i::2]) for i in (0, 1))
        return up, gate
    biases = (None, None) if bias is None else bias.chunk(2)
    first, second = zip(weight.chunk(2), biases, strict=True)
    return (second, first) if order == "gate_first" else (first, second)


def expert_maps(owner: nn.Module, spec: FFNSpec) -> Iterator[dict[str, Tensor | None]]:
    """The weights and biases of every expert by their names in `DenseFFN`, as views."""
    count = expert_count(owner, spec)
    up, down = _stack(owner, spec.up, count, spec), _stack(owner, spec.down, count, spec)
    gate = _stack(owner, spec.gate, count, spec) if spec.gate else None
    up_biases, down_biases = _bias(owner, spec.up), _bias(owner, spec.down)
    gate_biases = _bias(owner, spec.gate) if spec.gate else None
    for i in range(down.shape[0]):
        up_map: Map = (up[i], _row(up_biases, i))
        gate_map = (None, None) if gate is None else (gate[i], _row(gate_biases, i))
        if spec.fused:
            up_map, gate_map = halves(*up_map, spec.fused)
        yield {
            "up_weight": up_map[0],
            "up_bias": up_map[1],
            "down_weight": down[i],
            "down_bias": _row(down_biases, i),
            "gate_weight": gate_map[0],
            "gate_bias": gate_map[1],
        }


def expert_count(owner: nn.Module, spec: FFNSpec) -> int:
    """How many experts the tensors hold."""
    down = get_path(owner, spec.down)
    return down.shape[0] if down.dim() == 3 else int(getattr(owner, "num_experts", 1))


def problem_of_experts(owner: nn.Module, spec: FFNSpec) -> str | None:
    """Why these tensors are not maps d -> h -> d of several experts, or None."""
    tensors: dict[str, Any] = {path: get_path(owner, path) for path in (spec.gate, spec.up, spec.down) if path}
    shapes = ", ".join(f"{path} {tuple(tensor.shape)}" for path, tensor in tensors.items())
    count = expert_count(owner, spec)
    if any(tensor.dim() not in (2, 3) or (tensor.dim() == 2 and tensor.shape[0] % count) for tensor in tensors.values()):
        return f"{shapes} are not the stacked weights of several experts"
    up, down = (_stack(owner, path, count, spec) for path in (spec.up, spec.down))
    if up.shape[0] < down.shape[0] or up.shape[1] != (2 if spec.fused else 1) * down.shape[2] or up.shape[2] != down.shape[1]:
        return f"{shapes} are not the weights of experts d -> h -> d"
    if spec.gate and _stack(owner, spec.gate, count, spec).shape != up.shape:
        return f"{shapes}: gate and up maps differ in shape"
    return None


def _stack(owner: nn.Module, path: str, count: int, spec: FFNSpec) -> Tensor:
    """The weights (experts, out, in) at a path."""
    tensor = get_path(owner, path).detach()
    if tensor.dim() == 2:
        tensor = tensor.view(count, -1, tensor.shape[1])
    turned = spec.transposed == "yes" or (spec.transposed == "down" and path == spec.down)
    return tensor.transpose(1, 2) if turned else tensor


def _row(biases: Tensor | None, number: int) -> Tensor | None:
    return None if biases is None else biases[number]


def _bias(owner: nn.Module, path: str) -> Tensor | None:
    try:
        bias = get_path(owner, f"{path}_bias")
    except AttributeError:
        return None
    return bias.detach() if isinstance(bias, Tensor) else None
