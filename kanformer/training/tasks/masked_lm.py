"""Masked language modelling: hidden tokens are predicted from all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.training.data import pad, pad_token
from kanformer.training.language_model import LanguageModelTask, counted, labels_of, logits_of, token_loss
from kanformer.training.masking import mask_tokens
from kanformer.training.models import check_mask_token
from kanformer.training.settings import FinetuneArguments


class MaskedLM(LanguageModelTask):
    """Items are the hidden tokens, which are chosen anew each time that a text is read."""

    auto_class = "AutoModelForMaskedLM"
    packed = False

    @classmethod
    def load_processor(cls, arguments: FinetuneArguments) -> Any:
        tokenizer = super().load_processor(arguments)
        check_mask_token(tokenizer, "fine-tune")
        return tokenizer

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        batch = pad(examples, pad_token(self.tokenizer))
        batch["input_ids"], labels = mask_tokens(self.tokenizer, batch["input_ids"], labels_of(batch), self.arguments.mlm_probability, dice)
        return {**batch, "labels": labels}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(logits_of(model, batch), batch["labels"])
