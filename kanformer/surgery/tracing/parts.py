"""The parts of a traced block besides its maps: activations, norms, dropouts, and who holds them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kanformer.layers.base_functions import NAMES
from kanformer.surgery.finding.source import calls_of
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.tracing.blocks import TracedBlock
from kanformer.surgery.tracing.operations import DROPOUTS, QUIET
from kanformer.surgery.tracing.trace import Recorder, Trace
from kanformer.surgery.tracing.values import Call, Value, base

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Dropout:
    """A dropout by the path of its module, or of the number that it reads ("" if that was not found); `times` counts the dropouts with this path in
    one run of the block."""

    path: str
    probability: float
    value: Value
    is_module: bool
    times: float


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def owner_of(model: nn.Module, paths: Iterable[str]) -> str:
    """Path of the nearest module that holds all of these and is more than a list of modules."""
    split = [parent(path).split(".") if parent(path) else [] for path in paths]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while common and type(get_path(model, ".".join(common))) in _CONTAINERS:
        common.pop()
    return ".".join(common)


def below(path: str, owner: str) -> str | None:
    """The path seen from the owner; None if it is not below it."""
    if not owner:
        return path
    return path[len(owner) + 1 :] if path.startswith(owner + ".") else None


def activations(model: nn.Module, trace: Trace, block: TracedBlock) -> list[str]:
    """What could be the activation: paths of modules that were called between the maps, of functions that lie beside the maps, and "=name"."""
    inside = {*block.ups, *block.between}
    modules, functions = [], []
    for call in _between(trace, block):
        module = get_path(model, call.path)
        if inside.intersection(call.inputs) and not isinstance(module, nn.Dropout | nn.Identity) and not _has_channels(module):
            modules.append(call.path)
    holder = owner_of(model, _map_paths(block))
    for path in dict.fromkeys((holder, *(parent(name) for name in _map_paths(block)))):
        for name, value in vars(get_path(model, path)).items():
            if callable(value) and not isinstance(value, nn.Module | type) and not inspect.ismethod(value) and not name.startswith("_"):
                functions.append(join(path, name))
    named = [name for name in NAMES if name != "zero" and (block.gated or name != "identity")]
    named.sort(key=lambda name: name not in block.operations)
    return [*dict.fromkeys((*modules, *functions)), *(f"={name}" for name in named)]


def hidden_norms(model: nn.Module, trace: Trace, block: TracedBlock) -> list[str]:
    """Paths of modules between the maps that have a number per channel."""
    return [call.path for call in _between(trace, block) if _has_channels(get_path(model, call.path))]


def _between(trace: Trace, block: TracedBlock) -> list[Call]:
    """The calls between the maps, of modules that hold no map."""
    between, maps = {*block.between}, _map_paths(block)
    calls = [call for call in trace.calls if between.intersection(call.outputs[:1])]
    return [call for call in calls if not any(path == call.path or below(path, call.path) for path in maps)]


def input_norm(model: nn.Module, trace: Trace, block: TracedBlock, owner: str) -> tuple[str | None, Value]:
    """(path of a module of the owner through which the maps' input goes first, what goes into it), or (None, the input of the maps)."""
    for call in trace.calls:
        if call.inputs and below(call.path, owner) and any(base(each) is block.x for each in call.outputs[:1]) and _has_channels(get_path(model, call.path)):
            return call.path, base(call.inputs[0])
    return None, block.x


def _has_channels(module: nn.Module) -> bool:
    return any(parameter.numel() > 1 for parameter in module.parameters())


def _map_paths(block: TracedBlock) -> list[str]:
    return [value.map.module for value in (*block.ups, block.down) if value.map]


def hidden_dropouts(model: nn.Module, trace: Trace, block: TracedBlock) -> list[Dropout]:
    """Dropouts between the maps, the last first."""
    return [_dropout(model, trace, value, block) for value in sorted(block.between, key=lambda value: -value.number) if value.op in DROPOUTS]


def dropouts_after(model: nn.Module, trace: Trace, block: TracedBlock, end: Value | None = None) -> list[Dropout]:
    """Dropouts that the block's output goes through, up to `end` if that is given, or right after it."""
    found, rest = [], [block.down]
    while rest:
        for user in rest.pop().users:
            if user.op in DROPOUTS:
                found.append(_dropout(model, trace, user, block))
            if base(user) is block.down and user is not end:
                rest.append(user)
    return found


def _dropout(model: nn.Module, trace: Trace, value: Value, block: TracedBlock) -> Dropout:
    assert block.down.map
    runs = sum(each.map is not None and each.map.module == block.down.map.module for each in trace.values)
    holder = get_path(model, value.where)
    alike = [each for each in trace.values if each.op in DROPOUTS and each.where == value.where]
    if isinstance(holder, nn.Dropout):
        return Dropout(value.where, float(holder.p), value, True, len(alike) / runs)
    name = _number(holder, value.probability)
    alike = [each for each in alike if each.probability == value.probability]
    return Dropout(join(value.where, name) if name else "", float(value.probability), value, False, len(alike) / runs)


def _number(holder: nn.Module, probability: Any) -> str:
    """The attribute with a dropout's probability; "" where none has it, or several have and the source does not say which is read."""
    numbers = {name: value for name, value in vars(holder).items() if isinstance(value, float | int) and not isinstance(value, bool)}
    found = [name for name, value in numbers.items() if value == probability]
    read = [name for name in found if any(f"p={name}" in calls for calls in calls_of(type(holder)))]
    exact = [name for name in found if numbers[name] is probability]
    return next((names[0] for names in (read, exact, found) if len(names) == 1), "")


def operations_of(activation: Any, block: TracedBlock) -> list[str]:
    """What a module or function does to the block's hidden channels, see `TracedBlock.operations`."""
    trace, up = Trace(nn.Identity()), block.ups[0].map
    assert up
    with torch.no_grad(), Recorder(trace):
        activation(up.y.clone())
    return [value.op for value in trace.values if value.op not in QUIET]


def key_of(model: nn.Module, block: TracedBlock) -> tuple[str, ...]:
    """What blocks of one kind share: the class that holds the maps, and where they lie in it."""
    paths = [value.map.module for value in (*block.ups, block.down) if value.map]
    owner = owner_of(model, paths)
    return (type(get_path(model, owner)).__name__, *(str(below(path, owner)) for path in paths))
