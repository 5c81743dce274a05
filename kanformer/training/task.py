"""What the loop trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from kanformer.training.data.order import Order, Positions, Straight
from kanformer.training.data.streams import Stream
from kanformer.training.settings import LoopArguments


class Task(ABC):
    """What is trained: a module whose forward gives a summed loss, its data and its evaluation."""

    module: nn.Module  # forward(batch) -> (loss summed over items, {name: summed metric})
    model: nn.Module  # what is saved
    tokenizer: Any
    base: str | None = None  # what was patched, or came from it: for the model card
    examples: int | None  # number of training examples; None: a stream
    lengths: list[int] | None = None  # their tokens, where grouping by length saves padding
    stream: Stream | None = None  # where they come from, if so
    metrics: tuple[str, ...]  # what `evaluate` measures; the first is the one that tells the best weights where no other is named

    @abstractmethod
    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """The inputs of these training examples. Random choices depend on the global random state, which checkpoints carry."""

    @abstractmethod
    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items (tokens or examples) the loss of this batch is summed over, a scalar."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the current weights; called on every process, same result on all."""

    def order(self, arguments: LoopArguments, group: int) -> Positions:
        """Which example stands at which position; `group` examples make a step. A stream is in order by itself."""
        if self.examples is None or arguments.train_sampling_strategy == "sequential":
            return Straight(self.examples)
        return Order(self.examples, arguments.seed, self.lengths, group)
