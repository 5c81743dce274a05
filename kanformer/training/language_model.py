"""What causal and masked language modelling share: texts as examples, the loss over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.training.data import TEXT, Column, Packer, Rows, Stream, Table, end_tokens, tokenize, tokenize_streamed
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.masking import IGNORED
from kanformer.training.settings import FinetuneArguments


class LanguageModelTask(FinetuneTask):
    """Examples are lists of token ids: blocks cut from all texts in a row, or a text each.

    Attributes:
        packed: whether blocks are cut where the settings do not say.
    """

    packed: bool
    metrics = ("loss", "accuracy", "perplexity")

    @classmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        return [Column(arguments.text_column, TEXT)]

    @property
    def packing(self) -> bool:
        return self.packed if self.arguments.packing is None else self.arguments.packing

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """A text's tokens, see `tokenize` (tables) and `tokenize_streamed`."""
        texts = rows[self.arguments.text_column]
        if not part.streamed:
            return tokenize(self.tokenizer, texts, self.arguments.max_length)
        return [tokenize_streamed(self.tokenizer, text, self.arguments.max_length) for text in texts]

    def read(self, part: Table) -> Any:
        if not self.packing:
            return super().read(part)
        packer = Packer(self.tokenizer, self.arguments.max_length)
        blocks, rest = packer.cut(part.values(self.arguments.text_column), [])
        packer.check(len(blocks), len(rest), part.name if part is self.train_rows else f"held-out part, {part.name}")
        if self.tell is not None and part is self.train_rows:
            self.tell(packer.summary(len(blocks), len(rest)))
        return blocks

    def make_stream(self, rows: Rows) -> Stream:
        if not self.packing:
            return super().make_stream(rows)
        packer = Packer(self.tokenizer, self.arguments.max_length)
        return Stream(rows, lambda block: block, packer, self.arguments.text_column, self.tell)

    def summary(self, sums: dict[str, float], items: float) -> dict[str, float]:
        result = super().summary(sums, items)
        return {**result, "perplexity": math.exp(min(result["loss"], 700.0))}


def with_end(tokenizer: Any, examples: list[list[int]], max_length: int) -> list[list[int]]:
    """Examples with the end-of-text token behind them, where there is room for it and it is not there."""
    end = end_tokens(tokenizer)
    return [example if example[-len(end) :] == end or len(example) >= max_length else [*example, *end] for example in examples]


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(summed cross-entropy, {accuracy: number that is right}) of the labels that are not IGNORED.

    Args:
        logits: (..., classes), any dtype. labels: (...).
    """
    flat, wanted = logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    right = ((flat.argmax(-1) == wanted) & (wanted != IGNORED)).sum()
    return loss, {"accuracy": right.to(loss.dtype)}


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits for a batch without its labels."""
    return model(**FinetuneTask.inputs(batch)).logits


def counted(labels: Tensor) -> Tensor:
    """How many labels are not IGNORED, at least one."""
    return (labels != IGNORED).sum().clamp(min=1)


def labels_of(batch: dict[str, torch.Tensor]) -> Tensor:
    """The tokens themselves, IGNORED where there is padding."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
