"""What surrounds an operator: when to leave it aside for plain tensor functions, and what it must not inherit from its caller."""

from __future__ import annotations

import torch


def plain_wanted() -> bool:
    """While a graph is exported (which must not need kanformer to run) or transformed by torch.func."""
    return torch.compiler.is_exporting() or _in_functorch()


def operators_wanted(x: torch.Tensor) -> bool:
    """Where something other than autograd looks at the call (a compiler, tensors without data, tensor subclasses), it must see one operator."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta


def _in_functorch() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record what is done to these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocast_matrix(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of numbers as the GEMM of this call reads it: under autocast in the lower precision, like nn.Linear's; the spline argument is not."""
    device = x.device.type
    return matrix.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else matrix


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """A context in which operators run in the dtypes that they choose themselves: autocast would round the functions' own numbers."""
    return torch.autocast(x.device.type, enabled=False)
