"""What a model is fine-tuned for: a file per task, whose name is the task's."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kanformer.training.finetune_task import FinetuneTask


def available() -> tuple[str, ...]:
    """Names of the tasks, sorted: the names of this folder's files."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def find_task(name: str) -> type[FinetuneTask]:
    """The class of the task called `name`, one of `available()`: the last one that its file defines."""
    from kanformer.training.finetune_task import FinetuneTask

    module = importlib.import_module(f"{__name__}.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, FinetuneTask)]
    return own[-1]
