"""What every fine-tuning task shares. A new task is a new file in `tasks` with a subclass."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kanformer.surgery.saving.loading import load_tokenizer
from kanformer.training.data import Column, Rows, Stream, Table
from kanformer.training.data.labels import Classes
from kanformer.training.models import check_length
from kanformer.training.settings import FinetuneArguments
from kanformer.training.task import Task

_CALIBRATION_BATCH = 32


class SummedLoss(nn.Module):
    """A model and a task's loss, summed over the items that count; labels travel in the batch."""

    def __init__(self, model: nn.Module, task: FinetuneTask) -> None:
        super().__init__()
        self.model, self.loss = model, task.loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.model, batch)


class FinetuneTask(Task):
    """Reads rows, makes examples and batches of them, and says what the loss is.

    It is made from rows (`__init__` reads the classes, say), asked for what the model needs (`model_settings`, `check`), makes the examples
    (`prepare`), and takes the patched model in (`connect`).

    Attributes:
        auto_class: transformers' class of the model.
        heads: modules of it that are new, and trained with `train_rest=False` too.
        mixed: the rows are mixed before some are held out, since they may be sorted by class.
        lazy: examples are made when they are needed, as images are too large to keep.
        tokenizer: the tokenizer or image processor.
        classes: of the labels, where they are classes.
    """

    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    mixed: ClassVar[bool] = False
    lazy: ClassVar[bool] = False

    def __init__(self, arguments: FinetuneArguments, processor: Any, train: Table | Rows, held: Table) -> None:
        self.arguments, self.tokenizer, self.train_rows, self.held_rows = arguments, processor, train, held
        self.base = arguments.model_name_or_path
        self.classes: Classes | None = None
        self.tell: Callable[[str], None] | None = None
        self.train: Any = []
        self.held: Any = []
        self.examples = 0

    @classmethod
    @abstractmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        """What is read of the data; a row whose first column is empty is left out."""

    @classmethod
    def load_processor(cls, arguments: FinetuneArguments) -> Any:
        """The tokenizer, or what a task without text has in its place."""
        return load_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)

    def model_settings(self) -> dict[str, Any]:
        """What `from_pretrained` is told: the classes, if there are any."""
        return self.classes.settings if self.classes is not None else {}

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the task."""
        check_length(model, self.arguments.max_length)

    @abstractmethod
    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """An example for each row."""

    @abstractmethod
    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        """Examples as a batch. `dice`: of random choices; None is the global random state."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics), both summed over items. A model in eval mode may get more metrics, for `summary`."""

    def summary(self, sums: dict[str, float], items: float) -> dict[str, float]:
        """The held-out metrics, of what `loss` gave over all held-out batches."""
        return {name: value / items for name, value in sums.items()}

    def prepare(self) -> None:
        """Makes the examples, or a stream of them."""
        self.held = self.read(self.held_rows)
        if isinstance(self.train_rows, Rows):
            self.stream, self.examples = self.make_stream(self.train_rows), None
            self.train = self.stream
        else:
            self.train = self.read(self.train_rows)
            self.examples = len(self.train)

    def read(self, part: Table) -> Any:
        """The examples of a part."""
        return LazyExamples(part, self) if self.lazy else self.encode(part.all(), part)

    def make_stream(self, rows: Rows) -> Stream:
        """The training examples of a stream."""
        return Stream(rows, lambda row: self.encode({name: [value] for name, value in row.items()}, rows)[0])

    def connect(self, model: nn.Module) -> None:
        """Takes the model that is to be trained."""
        self.model, self.module = model, SummedLoss(model, self)

    def calibration_batches(self) -> Iterator[dict[str, Tensor]]:
        """Model inputs of the first training examples, for pruning and grids."""
        count = self.arguments.calibration_samples
        found = self.stream.first(count) if self.stream is not None else (self.train[index] for index in range(min(count, len(self.train))))
        while examples := list(itertools.islice(found, _CALIBRATION_BATCH)):
            yield self.inputs(self.collate(examples))

    @staticmethod
    def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model gets of a batch."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return self.collate([self.train[index] for index in indices])

    def held_batches(self) -> Iterator[dict[str, Tensor]]:
        """The held-out examples on the model's device, with the same random choices every time."""
        dice = torch.Generator().manual_seed(self.arguments.seed)
        size, device = self.arguments.per_device_eval_batch_size, next(self.module.parameters()).device
        numbers = iter(range(len(self.held)))
        while chosen := list(itertools.islice(numbers, size)):
            batch = self.collate([self.held[index] for index in chosen], dice)
            yield {name: value.to(device) for name, value in batch.items()}

    def evaluate(self) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        items = 0.0
        for batch in self.held_batches():
            loss, metrics = self.module(batch)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] += float(value)
            items += float(self.items(batch))
        return self.summary(sums, items)


class LazyExamples:
    """Examples that are made when they are asked for."""

    def __init__(self, part: Table, task: FinetuneTask) -> None:
        self.part, self.task = part, task

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Any:
        return self.task.encode({name: [value] for name, value in self.part[index].items()}, self.part)[0]
