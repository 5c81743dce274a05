"""The values of a forward: where each came from, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kanformer.surgery.tracing.operations import DROPOUTS, VIEWS

_ROWS = 8


@dataclass(frozen=True)
class MapUse:
    """One product of a value with a parameter.

    Attributes:
        module, name: path of the module that holds the parameter, and the parameter's name in it.
        in_features, out_features: the widths of the map.
        x, y: rows of what went in and what came out, (rows, width).
    """

    module: str
    name: str
    in_features: int
    out_features: int
    x: Tensor
    y: Tensor


@dataclass(eq=False)
class Value:
    """A tensor of the forward, without its numbers.

    Attributes:
        op: the operation that made it; "input" where none was seen, "constant" for parameters, buffers, single numbers and what is made of them.
        where: path of the innermost module at work. number: a count of operations.
        parameter: (module path, name, whether it is transposed) of a parameter or a view of one.
        map: for the product of a value with a parameter; `inputs` is then that value.
        probability: of a dropout, the very object that was passed.
    """

    op: str
    inputs: tuple[Value, ...]
    shape: torch.Size
    where: str = ""
    number: int = 0
    parameter: tuple[str, str, bool] | None = None
    map: MapUse | None = None
    probability: Any = None
    users: list[Value] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensors that it was given, in order, and those that it returned."""

    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def base(value: Value) -> Value:
    """The value before views, casts and dropouts."""
    while (value.op in VIEWS or value.op in DROPOUTS) and value.inputs:
        value = value.inputs[0]
    return value


def rows(tensor: Tensor, channel: int) -> Tensor:
    """Some rows (rows, width) of a tensor whose channels are this dimension."""
    flat = tensor.detach().movedim(channel, -1).flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]
    return flat[torch.linspace(0, max(flat.shape[0] - 1, 0), min(_ROWS, flat.shape[0])).long().to(flat.device)].clone()
