"""Statistics of several processes become one: thin wrappers around torch.distributed that do nothing in a single process.

Every process must make the same calls in the same order; none of them sits inside a pass over data, so the processes may have different numbers of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from kanformer.errors import DataError

Result = TypeVar("Result")


def several() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process' number, 0 in a single process."""
    return dist.get_rank() if several() else 0


def together(action: str, work: Callable[[], Result]) -> Result:
    """`work()`; where it fails in one process it fails in all of them, so that none waits for the others for ever.

    Raises:
        DataError: another process failed (its own message says why). Whatever `work` raises here.
    """
    if not several():
        return work()
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = reduced(torch.tensor(failure is not None, dtype=torch.int64))
    if failure is not None:
        raise failure
    if int(failed):
        raise DataError(action, got=f"an error in {int(failed)} other process(es)", hint="Their own messages say what went wrong; nothing was changed here.")
    return result  # type: ignore[return-value]


def reduced(tensor: Tensor, how: str = "sum") -> Tensor:
    """The sum ("sum"), least ("min") or greatest ("max") of a tensor over all processes, the same bits on each; `tensor` itself stays."""
    if not several():
        return tensor
    operation = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how]
    moved = tensor.to(_device(), copy=True).contiguous()
    dist.all_reduce(moved, operation)
    return moved.to(tensor.device)


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all processes, which have one shape, stacked in the order of ranks: (processes, *shape)."""
    if not several():
        return tensor.unsqueeze(0)
    moved = tensor.to(_device()).contiguous()
    parts = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, moved)
    return torch.stack(parts).to(tensor.device)


def take_over(tensor: Tensor) -> None:
    """Overwrites a tensor with the first process' values: processors differ in the last bit of a solve."""
    if several():
        moved = tensor.detach().to(_device()).contiguous()
        dist.broadcast(moved, 0)
        with torch.no_grad():
            tensor.copy_(moved)


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
