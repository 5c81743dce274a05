"""Classes of texts or of pairs of texts; numbers with a fraction (float labels) are learned as they are, by mean squared error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import DataError
from kanformer.training.data import TEXT, Column, Rows, Table, pad, pad_token
from kanformer.training.data.labels import find_classes
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.language_model import logits_of, token_loss
from kanformer.training.settings import FinetuneArguments


class Classification(FinetuneTask):
    """Items are texts. What transformers calls sequence classification, and regression where the labels are floats."""

    auto_class = "AutoModelForSequenceClassification"
    heads = ("classifier", "score", "classification_head")
    mixed = True

    @classmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        pair = [Column(arguments.text_pair_column, TEXT)] if arguments.text_pair_column else []
        return [Column(arguments.text_column, TEXT), *pair, Column(arguments.label_column)]

    def __init__(self, arguments: FinetuneArguments, processor: Any, train: Table | Rows, held: Table) -> None:
        super().__init__(arguments, processor, train, held)
        column = arguments.label_column
        labels = held.values(column) if isinstance(train, Rows) else train.values(column)
        self.regression = arguments.label_names is None and all(isinstance(label, float) for label in labels)
        if not self.regression:
            self.classes = find_classes(train, column, arguments.label_names, labels)
            self.classes.check(held.values(column), held)
        self.metrics = ("loss", "mae") if self.regression else ("loss", "accuracy")

    def model_settings(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"} if self.regression else super().model_settings()

    def check(self, model: nn.Module) -> None:
        super().check(model)
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = pad_token(self.tokenizer)  # decoders classify by the last token before the padding

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """(token ids, token types or None, number) of each row."""
        texts, pairs = rows[self.arguments.text_column], rows.get(self.arguments.text_pair_column or "")
        found = self.tokenizer(texts, pairs, truncation=True, max_length=self.arguments.max_length)
        if not all(found["input_ids"]):
            text = texts[next(number for number, ids in enumerate(found["input_ids"]) if not ids)]
            raise DataError("tokenize", subject=part.name, got=f"a labelled text without a single token ({text!r})", hint="Remove it.")
        types = found.get("token_type_ids") if pairs is not None else None
        labels = [self._number(label, part) for label in rows[self.arguments.label_column]]
        return list(zip(found["input_ids"], types or [None] * len(texts), labels, strict=True))

    def _number(self, label: Any, part: Table | Rows) -> int | float:
        if self.classes is not None:
            return self.classes.number(label, part)
        if not isinstance(label, int | float) or not math.isfinite(label):
            raise DataError("read the labels", subject=part.name, got=repr(label), expected="a finite number, as the other labels are")
        return float(label)

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        ids, types, labels = zip(*examples, strict=True)
        batch = pad(ids, pad_token(self.tokenizer))
        if types[0] is not None:
            batch["token_type_ids"] = pad(types, 0)["input_ids"]
        return {**batch, "labels": torch.tensor(labels, dtype=torch.float32 if self.regression else torch.long)}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = logits_of(model, batch)
        if not self.regression:
            return token_loss(logits, batch["labels"])
        wrong = logits.float().squeeze(-1) - batch["labels"]
        return wrong.square().sum(), {"mae": wrong.detach().abs().sum()}
