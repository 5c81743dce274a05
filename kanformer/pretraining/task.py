"""The next token of every position, as a task of the training loop."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.pretraining.text import Corpus, blocks
from kanformer.training.task import Task


class NextToken(nn.Module):
    """A causal model whose cross-entropy is summed over all positions, in nats."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(input_ids=batch["input_ids"]).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"), {}


class PretrainTask(Task):
    """Blocks of a corpus. The held-out ones are the same for all arms: `eval_blocks` of them, evenly spaced.

    Measures `loss` (mean cross-entropy per token, nats) and `bits_per_byte` (the summed -log2 p over the UTF-8 bytes of the predicted tokens).
    """

    examples: int
    metrics = ("loss", "bits_per_byte")

    def __init__(self, model: nn.Module, corpus: Corpus, length: int, eval_blocks: int, eval_batch_size: int) -> None:
        self.model, self.tokenizer = model, corpus.tokenizer
        self.module = NextToken(model)
        self.train, held = blocks(corpus.train, length), blocks(corpus.held, length)
        chosen = torch.arange(min(eval_blocks, len(held))) * len(held) // min(eval_blocks, len(held))
        self.held = held[chosen]
        self.held_bytes = int(blocks(corpus.held_bytes, length)[chosen, 1:].sum())
        self.eval_batch_size, self.examples = eval_batch_size, len(self.train)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return _inputs(self.train[indices])

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(batch["labels"].numel())

    def evaluate(self) -> dict[str, float]:
        nats, device = 0.0, next(self.model.parameters()).device
        for part in self.held.split(self.eval_batch_size):
            nats += float(self.module({key: value.to(device) for key, value in _inputs(part).items()})[0])
        tokens = self.held[:, 1:].numel()
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(1, self.held_bytes)}


def _inputs(chosen: Tensor) -> dict[str, Any]:
    chosen = chosen.long()
    return {"input_ids": chosen[:, :-1].contiguous(), "labels": chosen[:, 1:].contiguous()}
