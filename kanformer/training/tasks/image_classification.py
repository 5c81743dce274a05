"""Classes of images. They are opened when they are needed and made what the model's image processor makes of them; nothing is cropped or turned at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import CheckpointError
from kanformer.training.data import IMAGE, Column, Rows, Table
from kanformer.training.data.images import open_image
from kanformer.training.data.labels import Classes, find_classes
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.language_model import logits_of, token_loss
from kanformer.training.settings import FinetuneArguments


class ImageClassification(FinetuneTask):
    """Items are images."""

    auto_class = "AutoModelForImageClassification"
    heads = ("classifier", "head")
    mixed = True
    lazy = True
    metrics = ("loss", "accuracy")

    @classmethod
    def columns(cls, arguments: FinetuneArguments) -> list[Column]:
        return [Column(arguments.image_column, IMAGE), Column(arguments.label_column)]

    @classmethod
    def load_processor(cls, arguments: FinetuneArguments) -> Any:
        from transformers import AutoImageProcessor

        name = arguments.tokenizer_name or arguments.model_name_or_path
        try:
            return AutoImageProcessor.from_pretrained(name)
        except Exception as error:
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            hint = "Save it beside the model: processor.save_pretrained(folder), or name one: --tokenizer_name FOLDER_OR_ID."
            raise CheckpointError("load the image processor", subject=name, got=got, hint=hint) from error

    def __init__(self, arguments: FinetuneArguments, processor: Any, train: Table | Rows, held: Table) -> None:
        super().__init__(arguments, processor, train, held)
        column = arguments.label_column
        self.classes: Classes = find_classes(train, column, arguments.label_names, () if isinstance(train, Rows) else train.values(column))
        self.classes.check(held.values(column), held)

    def check(self, model: nn.Module) -> None:
        """Images have the size that their processor gives them."""

    def encode(self, rows: dict[str, list], part: Table | Rows) -> list[Any]:
        """(pixels (channels, height, width), number) of each row."""
        images = [open_image(value, part.name) for value in rows[self.arguments.image_column]]
        pixels = self.tokenizer(images, return_tensors="pt")["pixel_values"]
        return list(zip(pixels, [self.classes.number(label, part) for label in rows[self.arguments.label_column]], strict=True))

    def collate(self, examples: Sequence[Any], dice: torch.Generator | None = None) -> dict[str, Tensor]:
        pixels, labels = zip(*examples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(logits_of(model, batch), batch["labels"])
