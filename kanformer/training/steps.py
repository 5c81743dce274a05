"""How many steps a run has."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

from kanformer.errors import ConfigError
from kanformer.training.settings import LoopArguments

A = TypeVar("A", bound=LoopArguments)


def examples_per_step(arguments: LoopArguments, processes: int) -> int:
    """Over all processes and micro-batches."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes


def with_steps(arguments: A, examples: int | None, group: int) -> A:
    """The settings with `max_steps` worked out from `num_train_epochs`, if that is given.

    Args:
        examples: of the training data; None: a stream. group: examples per step.

    Raises:
        ConfigError: epochs of a stream, whose length nobody knows.
    """
    if arguments.num_train_epochs is None:
        return arguments
    if examples is None:
        raise ConfigError("start training", subject=f"num_train_epochs={arguments.num_train_epochs:g}", got="a stream", hint="Set --max_steps instead.")
    return dataclasses.replace(arguments, max_steps=max(1, math.ceil(arguments.num_train_epochs * examples / group)))
