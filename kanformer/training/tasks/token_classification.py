"""Tags of words: columns with lists of words and of their tags. A word's first token is tagged, the others are not counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError
from kanformer.training.data import VALUE, WORDS, Column, Rows, Table, pad, pad_token
from kanformer.training.data.labels import Classes, find_classes
from kanformer.training.entities import entities, f1_scores, is_iob
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.language_model import counted, logits_of, token_loss
from kanformer.training.masking import IGNORED
from kanformer.training.settings import FinetuneArguments


class TokenClassification(FinetuneTask):
    """Items are words. With tags in IOB form the entities are counted too: precision, recall and F1."""

    auto_class = "AutoModelForTokenClassification"
    heads = ("classifier", "score")

    @classmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        return [Column(arguments.tokens_column, WORDS), Column(arguments.tags_column, VALUE)]

    @classmethod
    def load_processor(cls, arguments: FinetuneArguments) -> Any:
        tokenizer = super().load_processor(arguments)
        name = arguments.tokenizer_name or arguments.model_name_or_path
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = type(tokenizer).from_pretrained(name, add_prefix_space=True)  # GPT-2 and RoBERTa mark a word's start by the space before it
        if not tokenizer.is_fast:
            raise ConfigError("fine-tune", subject=f"task=token_classification, {name}", got="a tokenizer that does not say which word a token is of")
        return tokenizer

    def __init__(self, arguments: FinetuneArguments, processor: Any, train: Table | Rows, held: Table) -> None:
        super().__init__(arguments, processor, train, held)
        column = arguments.tags_column
        for part in (train, held):
            if isinstance(part, Table):
                _check_lengths(part.all(), part, arguments)
        self.classes: Classes = find_classes(train, column, arguments.label_names, () if isinstance(train, Rows) else _flat(train, column))
        self.classes.check(_flat(held, column), held)
        self.iob = is_iob(self.classes.names)
        self.metrics = ("loss", "accuracy", "precision", "recall", "f1") if self.iob else ("loss", "accuracy")

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """(token ids, labels), both of the same length, of each row."""
        _check_lengths(rows, part, self.arguments)
        found = self.tokenizer(rows[self.arguments.tokens_column], is_split_into_words=True, truncation=True, max_length=self.arguments.max_length)
        examples = []
        for number, (ids, tags) in enumerate(zip(found["input_ids"], rows[self.arguments.tags_column], strict=True)):
            if not ids:
                raise DataError("tokenize", subject=part.name, got="words without a single token", hint="Remove them.")
            numbers, before, labels = [self.classes.number(tag, part) for tag in tags], None, []
            for word in found.word_ids(number):
                labels.append(IGNORED if word is None or word == before else numbers[word])
                before = word
            examples.append((ids, labels))
        return examples

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        ids, labels = zip(*examples, strict=True)
        return {**pad(ids, pad_token(self.tokenizer)), "labels": pad(labels, IGNORED)["input_ids"]}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = logits_of(model, batch)
        loss, metrics = token_loss(logits, batch["labels"])
        return loss, metrics if model.training or not self.iob else {**metrics, **self._counts(logits.argmax(-1), batch["labels"])}

    def _counts(self, guesses: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How many entities are right, found and true in a batch."""
        right = found = true = 0
        for guess, label in zip(guesses.tolist(), labels.tolist(), strict=True):
            words = [(mine, theirs) for mine, theirs in zip(guess, label, strict=True) if theirs != IGNORED]
            mine, theirs = (entities([self.classes.names[number] for number in tags]) for tags in (zip(*words, strict=True) if words else ((), ())))
            right, found, true = right + len(mine & theirs), found + len(mine), true + len(theirs)
        return {name: torch.tensor(float(value)) for name, value in (("right", right), ("found", found), ("true", true))}

    def summary(self, sums: dict[str, float], items: float) -> dict[str, float]:
        result = {name: sums[name] / items for name in ("loss", "accuracy")}
        return {**result, **f1_scores(sums["right"], sums["found"], sums["true"])} if self.iob else result


def _flat(part: Table, column: str) -> list[Any]:
    return [tag for tags in part.values(column) for tag in tags]


def _check_lengths(rows: dict[str, list], part: Table | Rows, arguments: FinetuneArguments) -> None:
    for words, tags in zip(rows[arguments.tokens_column], rows[arguments.tags_column], strict=True):
        if not isinstance(tags, list):
            raise DataError("read the tags", subject=f"{part.name}, column {arguments.tags_column!r}", got=repr(tags), expected="a list of tags")
        if len(words) != len(tags):
            got = f"{len(words)} words and {len(tags)} tags ({' '.join(words[:8])})"
            raise DataError("read the tags", subject=part.name, got=got, expected="a tag for each word")
