"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.training.data import Rows, Table, pad, pad_token
from kanformer.training.language_model import LanguageModelTask, counted, labels_of, logits_of, token_loss, with_end
from kanformer.training.models import check_causal


class CausalLM(LanguageModelTask):
    """Items are predicted tokens."""

    auto_class = "AutoModelForCausalLM"
    packed = True

    def check(self, model: nn.Module) -> None:
        super().check(model)
        check_causal(model, self.arguments.model_name_or_path, "fine-tune")

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        return with_end(self.tokenizer, super().encode(rows, part), self.arguments.max_length)

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        batch = pad(examples, pad_token(self.tokenizer))
        return {**batch, "labels": labels_of(batch)}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return counted(batch["labels"][:, 1:])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(logits_of(model, batch)[:, :-1], batch["labels"][:, 1:])
