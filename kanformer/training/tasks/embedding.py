"""Embeddings of texts: pairs that belong together come close, or get the cosine that a column says.

Without scores the loss is that of in-batch negatives (van den Oord et al. 2018, arXiv 1807.03748; sentence-transformers' MultipleNegativesRankingLoss):
each first text must find its own second text among all second texts of its micro-batch, on one process. So here accumulation and more processes change
the loss: a smaller micro-batch has fewer negatives. With scores it is the squared error of each pair's cosine, and k x 1 = 1 x k as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError
from kanformer.training.data import TEXT, Column, Rows, Table, pad, pad_token
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.settings import FinetuneArguments


class Embedding(FinetuneTask):
    """Items are pairs. A batch holds the first texts and then the second ones, in one run of the model."""

    auto_class = "AutoModel"

    @classmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        if not arguments.text_pair_column:
            raise ConfigError(
                "fine-tune", subject="task=embedding", got="no text_pair_column", hint="Name the column of the texts that belong to text_column's."
            )
        score = [Column(arguments.score_column)] if arguments.score_column else []
        return [Column(arguments.text_column, TEXT), Column(arguments.text_pair_column, TEXT), *score]

    def __init__(self, arguments: FinetuneArguments, processor: Any, train: Table | Rows, held: Table) -> None:
        super().__init__(arguments, processor, train, held)
        self.scored = arguments.score_column is not None
        self.metrics = ("loss", "spearman") if self.scored else ("loss", "accuracy")
        if not self.scored and arguments.per_device_train_batch_size < 2:
            hint = "Set --per_device_train_batch_size 2 or more, or give a score_column."
            raise ConfigError("fine-tune", subject="task=embedding", got="per_device_train_batch_size=1: no other pair in the batch to tell from", hint=hint)
        if self.scored and len(set(held.values(str(arguments.score_column)))) < 2:
            raise DataError("read the scores", subject=held.name, got="held-out scores that are all the same", expected="different ones, to be ranked")

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """(token ids of the first text, of the second, score or None) of each row."""
        first, second = (
            self.tokenizer(rows[str(column)], truncation=True, max_length=self.arguments.max_length)["input_ids"]
            for column in (self.arguments.text_column, self.arguments.text_pair_column)
        )
        if not all(first) or not all(second):
            raise DataError("tokenize", subject=part.name, got="a text of a pair without a single token", hint="Remove the pair.")
        scores = [_score(value, part) for value in rows[str(self.arguments.score_column)]] if self.scored else [None] * len(first)
        return list(zip(first, second, scores, strict=True))

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        first, second, scores = zip(*examples, strict=True)
        batch = pad([*first, *second], pad_token(self.tokenizer))
        return {**batch, "labels": torch.tensor(scores)} if self.scored else batch

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["input_ids"]) // 2)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = embed(model, self.inputs(batch)).chunk(2)
        if self.scored:
            cosines = (first * second).sum(-1)
            return (cosines - batch["labels"]).square().sum(), {} if model.training else {"cosines": cosines}
        logits = first @ second.T * self.arguments.similarity_scale
        wanted = torch.arange(len(first), device=logits.device)
        return F.cross_entropy(logits, wanted, reduction="sum"), {"accuracy": (logits.argmax(-1) == wanted).sum().float()}

    def evaluate(self) -> dict[str, float]:
        if not self.scored:
            return super().evaluate()
        loss, cosines, scores = 0.0, [], []
        for batch in self.held_batches():
            part, metrics = self.module(batch)
            loss += float(part)
            cosines += metrics["cosines"].tolist()
            scores += batch["labels"].tolist()
        return {"loss": loss / len(scores), "spearman": spearman(cosines, scores)}


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Means of the last hidden states over the tokens that are not padding, of length one: (texts, d), float32."""
    states = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant, of which there is none."""
    from scipy.stats import spearmanr

    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0
    found: Any = spearmanr(left, right)
    return float(found.statistic)


def _score(value: Any, part: Table | Rows) -> float:
    if not isinstance(value, int | float) or not -1 <= value <= 1:
        hint = "Divide the scores by their largest value."
        raise DataError("read the scores", subject=part.name, got=repr(value), expected="a cosine, a number from -1 to 1", hint=hint)
    return float(value)
