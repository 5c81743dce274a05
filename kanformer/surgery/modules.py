"""Small operations on module trees."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


class PassThrough(nn.Identity):
    """Stands where a part was whose work the KAN-FFN does now; code from outside that looks for its weight (initialisation) finds an empty one."""

    @property
    def weight(self) -> Tensor:
        return torch.empty(0, 0)

    @property
    def bias(self) -> Tensor:
        return torch.empty(0)


def get_path(root: Any, path: str) -> Any:
    """The attribute at a dotted path; the root itself for "". Raises AttributeError."""
    for name in path.split(".") if path else ():
        root = getattr(root, name)
    return root


def find_path(root: Any, path: str) -> Any:
    """What `get_path` finds, or None where there is nothing."""
    try:
        return get_path(root, path)
    except AttributeError:
        return None


def join(*parts: str) -> str:
    """A dotted path from its non-empty parts."""
    return ".".join(part for part in parts if part)


def is_conv1d(module: Any) -> bool:
    """Whether this is transformers' Conv1D, a linear map with a transposed weight."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_pointwise_convolution(module: Any) -> bool:
    """Whether this is a convolution that mixes channels only: kernel 1, stride 1, one group."""
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return False
    return {*module.kernel_size, *module.stride, module.groups} == {1} and set(module.padding) == {0}


def is_linear(module: Any, owner: nn.Module) -> TypeGuard[nn.Module]:
    """Whether this is a linear map of channels: nn.Linear, Conv1D, a 1x1 convolution, or a subclass of nn.Linear that the owner's own file defines
    (FalconLinear)."""
    own = isinstance(module, nn.Linear) and type(module).__module__ == type(owner).__module__
    return type(module) is nn.Linear or is_conv1d(module) or is_pointwise_convolution(module) or own


def linear_tensors(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (out, in), bias) of an nn.Linear, Conv1D or 1x1 convolution."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator]
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr,operator]
    return (weight.t() if is_conv1d(module) else weight.flatten(1)), bias  # type: ignore[return-value]


def all_references(root: nn.Module) -> dict[nn.Module, list[tuple[str, nn.Module, str]]]:
    """For every module below `root` each (parent's path, parent, name) under which it hangs."""
    found: dict[nn.Module, list[tuple[str, nn.Module, str]]] = {}
    for path, parent in root.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((path, parent, name))
    return found


def bare(module: nn.Module, seen: dict[int, nn.Module] | None = None) -> nn.Module:
    """A twin of the module in eval mode, with the same tensors and without hooks: what is run to try a block out."""
    seen = {} if seen is None else seen
    if id(module) not in seen:
        twin = seen[id(module)] = copy.copy(module)
        twin.__dict__ = dict(vars(module))
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                twin.__dict__[name] = type(value)()
        twin._modules = {name: None if child is None else bare(child, seen) for name, child in module._modules.items()}
        twin.training = False
    return seen[id(module)]


def layer_number(path: str) -> int | None:
    """The first number in a dotted path, the layer's."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)


def mark_initialized(root: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Tells transformers' weight initialisation to leave new blocks, given by path, alone, and not to reach into them from their ancestors.

    An ancestor with buffers that are not saved, its own or further down, is not told: after loading only its initialisation fills them.
    """
    filled: set[str] = set()
    for path, module in root.named_modules():
        if module._non_persistent_buffers_set:
            filled.update(_ancestors(f"{path}."))
    for path, block in blocks.items():
        for module in block.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        for ancestor in _ancestors(path) - filled:
            get_path(root, ancestor)._is_hf_initialized = True


def _ancestors(path: str) -> set[str]:
    """The paths of the modules around `path`, the root's included."""
    names = path.split(".")
    return {".".join(names[:depth]) for depth in range(len(names))}
