"""Tensors of which each process holds a part."""

from __future__ import annotations

import sys
from typing import Any


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, as `fully_shard` (FSDP2) makes parameters; asking imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Any:
    """The tensor, gathered from all processes where it is sharded: then each must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
