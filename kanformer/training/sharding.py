"""Weights and optimizer states that lie spread over processes (FSDP2's DTensors): whole where they are written, and spread again where they are read.

Everything here does the same for a plain model, one under DistributedDataParallel and one under `fully_shard`. Where tensors are spread, every process
must make the same calls in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.processes import reduced
from kanformer.errors import CheckpointError
from kanformer.layers import KANFeedForward
from kanformer.ops.spread import is_sharded


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether one of them is."""
    return any(map(is_sharded, tensors))


def no_split_modules(module: nn.Module) -> list[str]:
    """Names of the classes that FSDP2 makes its units of: what accelerate's TRANSFORMER_BASED_WRAP reads as `_no_split_modules`.

    These are the layers of the transformers models inside (where a model names none, the entries of the lists that its blocks stand in), but none
    that shares a weight with something outside of it (an embedding tied to the head stays with the root); and `KANFeedForward` where a block is
    reached by a path that leads through no such layer: it is then called by itself, so that it has to gather its weights itself (distillation runs
    all blocks on the teacher's inputs).
    """
    listed = {name for each in module.modules() for name in (getattr(each, "_no_split_modules", None) or ())}
    listed |= set(_entries(module, listed)) - {KANFeedForward.__name__}
    holders = _holders(module)
    present = [each for each in module.modules() if type(each).__name__ in listed]
    tied = {type(each).__name__ for each in present if any(holders[tensor] > count for tensor, count in _holders(each).items())}
    layers = {type(each).__name__ for each in present} - tied
    return sorted(layers) + [KANFeedForward.__name__] * any(True for _ in _entries(module, layers))


def _entries(module: nn.Module, layers: set[str], entry: str = KANFeedForward.__name__) -> Iterator[str]:
    """For every block on a path through no module of these classes: the class of the entry in the outermost list on that path, or the block's own."""
    if type(module).__name__ in layers:
        return
    if isinstance(module, KANFeedForward):
        yield entry
    for child in module.children():
        inside = entry != KANFeedForward.__name__ or not isinstance(module, nn.ModuleList)
        yield from _entries(child, layers, entry if inside else type(child).__name__)


def _holders(module: nn.Module) -> Counter[nn.Parameter]:
    """How many modules hold each parameter."""
    return Counter(parameter for each in module.modules() for parameter in each.parameters(recurse=False))


def _outside(module: nn.Module, layers: set[str]) -> Iterable[nn.Module]:
    """The modules that can be reached without going through a module of one of these classes."""
    if type(module).__name__ in layers:
        return
    yield module
    for child in module.children():
        yield from _outside(child, layers)


@torch.no_grad()
def make_contiguous(module: nn.Module) -> None:
    """Lays out anew what `fully_shard` refuses: the maps that stand for a Conv1D (GPT-2) read its weight turned, as it lay, until they are saved."""
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def settle_root(module: nn.Module) -> None:
    """Tells `fully_shard` which module is the root, which else is the first that runs: a block evaluated by itself must not become it."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()  # torch has no public way; the first forward pass of the root does the same


def reshard(module: nn.Module) -> None:
    """Frees what `fully_shard` leaves whole after a forward pass without a backward pass (the root, the head), in the precision of the computation."""
    from torch.distributed.fsdp import FSDPModule

    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """The whole of a tensor that is spread over processes, on the CPU; of any other the tensor itself. None where it is not kept."""
    found = tensor.detach().full_tensor().cpu() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return found if keep else None


@torch.no_grad()
def full_state_dict(model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """`model.state_dict()` with whole tensors, tied ones tied. One tensor at a time is gathered; without `keep` it is dropped at once."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = whole(tensor, keep) if isinstance(tensor, Tensor) else tensor
        found[name] = seen[id(tensor)]
    return found if keep else {}


@torch.no_grad()
def load_full_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts whole tensors into a model, each process its own part of them.

    Raises:
        CheckpointError: other names or shapes than the model has. Nothing is changed then.
    """
    own = model.state_dict(keep_vars=True)
    wrong = sorted(own.keys() ^ state.keys()) or [name for name, tensor in own.items() if isinstance(tensor, Tensor) and tensor.shape != state[name].shape]
    if wrong:
        raise CheckpointError("load the weights", subject=type(model).__name__, got=f"{len(wrong)} tensors that do not fit, {wrong[0]} first")
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            tensor.detach().copy_(_like(state[name], tensor))


@torch.no_grad()
def full_optimizer_state(optimizer: Any, keep: bool = True) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors; parameters are numbered as they stand in the groups, so it fits any number of processes."""
    state = optimizer.state_dict()
    found = {number: {name: whole(value, keep) if is_sharded(value) else value for name, value in values.items()} for number, values in state["state"].items()}
    return {**state, "state": found} if keep else {}


@torch.no_grad()
def load_full_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Gives an optimizer what `full_optimizer_state` returned in a run over any number of processes.

    Raises:
        ValueError: other groups or numbers of parameters, as torch's `load_state_dict` says.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))  # torch's own check comes next, with a message
    spread = {
        number: {name: _like(value, of[number]) if number in of and _elementwise(value, of[number]) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, in every process' part of them: the same answer everywhere."""
    tensors = list(tensors)
    local = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]
    finite = all(bool(tensor.isfinite().all()) for tensor in local)
    if any_sharded(tensors):
        return bool(reduced(torch.tensor(finite, dtype=torch.int64), "min"))
    return finite


def _elementwise(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process' part of a whole tensor, where `other` is spread over processes; else the tensor."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(device=mesh.device_type, dtype=tensor.dtype), mesh, placements)
