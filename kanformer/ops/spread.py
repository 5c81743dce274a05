"""Whether a tensor is a process' part of a larger one."""

from __future__ import annotations

import sys
from typing import Any


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, as `fully_shard` (FSDP2) makes parameters; asking imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
