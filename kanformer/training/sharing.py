"""One set of tensors for all that teacher and student have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kanformer.layers import KANExperts, KANFeedForward


def copy_sharing(model: nn.Module) -> nn.Module:
    """A second model of the same parameters, not of copies of them: what is then replaced or trained must get its own by `share`."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def trained_parameters(student: nn.Module, rest: str) -> list[nn.Parameter]:
    """Those of the KAN-FFNs, and of the normalisations ("norms") or of everything but embeddings and heads ("all"), each once."""
    base: nn.Module = getattr(student, "base_model", student)
    left_out = _left_out(base)
    found: dict[int, nn.Parameter] = {}
    for module in base.modules() if rest != "none" else ():
        if module not in left_out and ("Norm" in type(module).__name__ or (rest == "all" and not isinstance(module, nn.Embedding))):
            found |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
    for module in student.modules():
        if isinstance(module, KANFeedForward):
            found |= {id(parameter): parameter for parameter in module.parameters()}
    embeddings = {id(parameter) for module in student.modules() if isinstance(module, nn.Embedding) for parameter in module.parameters(recurse=False)}
    return [parameter for key, parameter in found.items() if key not in embeddings]  # a linear map that is tied to them stays as they are


def _left_out(base: nn.Module) -> set[nn.Module]:
    """Modules on which no loss depends: a pooler, and what stands in mixtures in memory of the original weights."""
    pooler = getattr(base, "pooler", None)
    found = set(pooler.modules()) if isinstance(pooler, nn.Module) else set()
    for mixture in base.modules():
        if isinstance(mixture, KANExperts):
            memories = [child for name, child in mixture.named_children() if name not in ("kan_experts", "expert_norm")]
            found |= {mixture, *(module for child in memories for module in child.modules())}
    return found


def share(student: nn.Module, teacher: nn.Module, rest: str) -> None:
    """Leaves gradients to `trained_parameters`, each a tensor of the student's own; every other parameter becomes the teacher's, if it has the same bits.

    The parameters themselves are shared, so that both models move to another device as one. Embeddings, attention, and heads are then held once.
    """
    trained = {id(parameter) for parameter in trained_parameters(student, rest)}
    theirs = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
    by_name = dict(_named(teacher))
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in list(_named(student)):
        if id(parameter) in replaced:
            continue
        if id(parameter) in trained:
            if parameter.untyped_storage().data_ptr() in theirs:
                replaced[id(parameter)] = nn.Parameter(parameter.detach().clone())
        elif name in by_name and parameter is not by_name[name] and _same(parameter, by_name[name]):
            replaced[id(parameter)] = by_name[name]
    student_parameters = [(module, name, value) for module in student.modules() for name, value in module._parameters.items() if value is not None]
    for module, name, value in student_parameters:
        own = replaced.get(id(value), value)
        module._parameters[name] = own
        own.requires_grad_(id(value) in trained)


def part(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the student tensors of its own for all that it shares with the teacher: sharding a model takes its parameters away from others."""
    theirs, copies = {id(parameter) for parameter in teacher.parameters()}, {}
    for module in student.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in theirs:
                own = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
                module._parameters[name] = own


def shared_bytes(student: nn.Module, teacher: nn.Module) -> tuple[int, int]:
    """(bytes of the student's parameters that are the teacher's, bytes of all its parameters)."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    sizes = [(parameter.numel() * parameter.element_size(), id(parameter) in theirs) for parameter in student.parameters()]
    return sum(size for size, shared in sizes if shared), sum(size for size, _ in sizes)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names as seen from the base model, the same with and without a head; those of a head begin with a dot."""
    base: Any = getattr(model, "base_model", model)
    seen = set()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        seen.add(id(parameter))
        yield name, parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            yield f".{name}", parameter


def _same(left: nn.Parameter, right: nn.Parameter) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
