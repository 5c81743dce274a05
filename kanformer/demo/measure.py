"""How close a changed model is to the original: cosine of embeddings, and perplexity where there is a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.training.data import pad, pad_token, tokenize


@dataclass(frozen=True)
class Bench:
    """A tokenizer and the length to which texts are cut."""

    tokenizer: Any
    max_length: int = 64
    batch_size: int = 32

    def batches(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Padded batches of model inputs, texts of like length together."""
        for _, batch in self._numbered(texts):
            yield batch

    def _numbered(self, texts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        examples = tokenize(self.tokenizer, texts, self.max_length)
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        for start in range(0, len(examples), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield chosen, pad([examples[index] for index in chosen], pad_token(self.tokenizer))

    @torch.no_grad()
    def embeddings(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """(texts, d) unit vectors: the mean of the last hidden states over the tokens, as sentence-transformers does for MiniLM."""
        vectors, order = [], []
        for chosen, batch in self._numbered(texts):
            hidden = last_hidden_state(model, batch)
            weight = batch["attention_mask"].unsqueeze(-1).to(hidden)
            vectors.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
            order += chosen
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    @torch.no_grad()
    def perplexity(self, model: nn.Module, texts: Sequence[str]) -> float:
        """exp of the mean next-token cross-entropy of a causal language model."""
        loss = tokens = 0.0
        for batch in self.batches(texts):
            logits = model(**batch).logits[:, :-1].float()
            labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
            loss += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
            tokens += float((labels != -100).sum())
        return math.exp(min(loss / tokens, 700.0))


def last_hidden_state(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(batch, length, d), from the model without its head."""
    base: nn.Module = getattr(model, "base_model", model)
    return base(**batch).last_hidden_state


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts next tokens."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def cosine(vectors: Tensor, originals: Tensor) -> float:
    """Mean cosine of unit vectors to the original's."""
    return float((vectors * originals).sum(-1).mean())
