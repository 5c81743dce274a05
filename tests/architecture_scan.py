"""What in a model looks like a feed-forward block, judged by the shapes of its weights alone: a second opinion on kanformer's own search.

It knows no names of classes but those of attention, so it also names things that are no feed-forward block (projectors, gates, heads).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

_NO_BLOCK = re.compile(r"Attention|Attn|Mixer|Mamba|SSM|Pooler|Head$|Merger|Projector|Indexer")
_SPLIT = (("intermediate", "output"), ("feed_forward", "output"))


def feed_forward_like(model: nn.Module) -> dict[str, str]:
    """Class by path of every module that holds maps d -> h and h -> d (h > d), one fused map d -> 2h, or stacks of such weights."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if path and not _NO_BLOCK.search(type(module).__name__) and (_has_pair(module) or _is_split(module) or _has_stack(module)):
            found[path] = type(module).__name__
    return found


def missed(model: nn.Module, known: Iterable[str]) -> dict[str, int]:
    """Of those, how many of each class lie neither in, on nor around a known path."""
    known = tuple(known)
    counts: dict[str, int] = {}
    for path, name in feed_forward_like(model).items():
        if not any(path == other or other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in known):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(in, out) of a linear map or a convolution over one position."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1:
        return module.in_channels, module.out_channels
    return None


def _has_pair(module: nn.Module) -> bool:
    shapes = [shape for child in module.children() if (shape := _shape(child)) is not None]
    return any(down_in > down_out and (down_out, width) in shapes for down_in, down_out in shapes for width in (down_in, 2 * down_in))


def _is_split(module: nn.Module) -> bool:
    children = dict(module.named_children())
    for first, second in _SPLIT:
        if first in children and second in children:
            up, down = (_shape(getattr(children[name], "dense", None)) for name in (first, second))
            if up is not None and down is not None and up == down[::-1]:
                return True
    return False


def _has_stack(module: nn.Module) -> bool:
    stacks = [parameter for parameter in module._parameters.values() if parameter is not None and parameter.ndim == 3]
    return len(stacks) >= 2 and len({parameter.shape[0] for parameter in stacks}) == 1 and "xpert" in type(module).__name__
