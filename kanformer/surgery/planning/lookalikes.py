"""Modules that are called feed-forward blocks and hold such maps, and that no description fits: said in the plan, so that nobody believes them replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from kanformer.surgery.modules import is_conv1d, is_pointwise_convolution, linear_tensors
from kanformer.surgery.planning.blocks import Refusal

_CALLED = re.compile(r"mlp|ffn|feed_?forward|expert|moe|layer$|block$", re.IGNORECASE)
_OTHER = re.compile(r"head|gate$|router|pool|merg|project|adapter", re.IGNORECASE)
_REASON = "it looks like a feed-forward block, but its forward is none that kanformer can replace"


def lookalikes(model: nn.Module, known: Iterable[str]) -> tuple[Refusal, ...]:
    """Modules with maps d -> h and h -> d (h > d) of their own that lie neither in, on nor around one of the known paths."""
    known = tuple(known)
    found: dict[str, Refusal] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        called = _CALLED.search(name) or _CALLED.search(path.rpartition(".")[2])
        if not path or not called or _OTHER.search(name) or any(_around(path, other) for other in (*known, *found)):
            continue
        if _has_maps(module):
            found[path] = Refusal(path, "unknown", _REASON, name)
    return tuple(found.values())


def _around(path: str, other: str) -> bool:
    return path == other or other.startswith(f"{path}.") or path.startswith(f"{other}.")


def _has_maps(module: nn.Module) -> bool:
    shapes = [tuple(linear_tensors(child)[0].shape) for child in module.children() if _is_map(child)]
    stacks = [tuple(parameter.shape[1:]) for parameter in module._parameters.values() if isinstance(parameter, Tensor) and parameter.dim() == 3]
    for outs, ins in (*shapes, *stacks):
        wide = [other for other in (*shapes, *stacks) if other in ((ins, outs), (2 * ins, outs))]
        if outs < ins and wide:
            return True
    return False


def _is_map(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and (isinstance(module, nn.Linear) or is_conv1d(module) or is_pointwise_convolution(module))
