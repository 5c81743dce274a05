"""Fine-tuning a patched model: causal language modelling, masked language modelling, classification."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.configs import configs_from
from kanformer.errors import ConfigError, DataError
from kanformer.layers import KANFeedForward
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model, load_tokenizer
from kanformer.training.data import load_texts, pack, pad, pad_token, tokenize
from kanformer.training.loop import Trainer
from kanformer.training.masking import IGNORED, mask_tokens
from kanformer.training.models import AUTO_CLASSES, calibration_batches, check_causal, check_length, check_mask_token, is_patched
from kanformer.training.settings import FinetuneArguments
from kanformer.training.start import start_run
from kanformer.training.task import Task


class SummedLoss(nn.Module):
    """A model whose cross-entropy is summed over the labels that count; labels travel in the batch."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        logits = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        if self.task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        loss = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
        right = ((flat.argmax(-1) == wanted) & (wanted != IGNORED)).sum()
        return loss, {"accuracy": right.to(loss.dtype)}


class TextTask(Task):
    """Examples (token ids, and a class for classification) for `SummedLoss`."""

    def __init__(
        self,
        module: SummedLoss,
        tokenizer: Any,
        train: list[list[int]],
        held: list[list[int]],
        arguments: FinetuneArguments,
        classes: tuple[list[int], list[int]] | None,
    ) -> None:
        self.module, self.model, self.tokenizer = module, module.model, tokenizer
        self.train, self.held, self.arguments, self.classes = train, held, arguments, classes
        self.base, self.metrics = (
            arguments.model_name_or_path,
            ("loss", "accuracy") if arguments.task == "classification" else ("loss", "accuracy", "perplexity"),
        )
        self.examples = len(train)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return self._inputs([self.train[index] for index in indices], None if self.classes is None else [self.classes[0][index] for index in indices], None)

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        if self.arguments.task == "causal_lm":
            labels = labels[:, 1:]
        return (labels != IGNORED).sum().clamp(min=1)

    def _inputs(self, examples: list[list[int]], classes: list[int] | None, generator: torch.Generator | None) -> dict[str, Tensor]:
        batch = pad(examples, pad_token(self.tokenizer))
        if classes is not None:
            return {**batch, "labels": torch.tensor(classes)}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if self.arguments.task == "masked_lm":
            batch["input_ids"], labels = mask_tokens(self.tokenizer, batch["input_ids"], labels, self.arguments.mlm_probability, generator)
        return {**batch, "labels": labels}

    def _held_batches(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.arguments.seed)  # the same masks in every evaluation
        size, device = self.arguments.per_device_eval_batch_size, next(self.module.parameters()).device
        for start in range(0, len(self.held), size):
            classes = None if self.classes is None else self.classes[1][start : start + size]
            yield {key: value.to(device) for key, value in self._inputs(self.held[start : start + size], classes, generator).items()}

    def evaluate(self) -> dict[str, float]:
        loss = right = items = 0.0
        for batch in self._held_batches():
            total, metrics = self.module(batch)
            loss, right = loss + float(total), right + float(metrics["accuracy"])
            items += float(self.items(batch))
        result = {"loss": loss / items, "accuracy": right / items}
        return result if self.arguments.task == "classification" else {**result, "perplexity": math.exp(min(result["loss"], 700.0))}


def finetune(arguments: FinetuneArguments) -> dict[str, Any]:
    """Runs a fine-tuning as described by the settings and returns its results (also in all_results.json)."""
    if not arguments.model_name_or_path:
        raise ConfigError("fine-tune", got="no model_name_or_path", hint="Name a patched checkpoint: --model_name_or_path FOLDER_OR_ID.")
    start, checkpoint, accelerator = start_run(arguments)
    columns = [arguments.text_column] + ([arguments.label_column] if arguments.task == "classification" else [])
    texts, held = load_texts(arguments, columns)
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)
    if arguments.task == "masked_lm":
        check_mask_token(tokenizer, "fine-tune")
    classes, names = _classes(texts, held, arguments)
    model = _load(str(checkpoint or arguments.model_name_or_path), arguments, names)
    check_length(model, arguments.max_length)
    if arguments.task == "causal_lm":
        check_causal(model, arguments.model_name_or_path, "fine-tune")
    config: Any = model.config
    if arguments.task == "classification" and config.pad_token_id is None:
        config.pad_token_id = pad_token(tokenizer)  # decoders classify by the last token before the padding
    if not is_patched(model):
        model = _patch(model, arguments, tokenizer, texts[arguments.text_column])
    _freeze(model, arguments)
    model.to(accelerator.device)
    cut = pack if arguments.task == "causal_lm" else tokenize
    train, held_out = (cut(tokenizer, part[arguments.text_column], arguments.max_length) for part in (texts, held))
    if classes is not None and (len(train), len(held_out)) != (len(classes[0]), len(classes[1])):
        raise DataError("tokenize", got="a labelled text without a single token", hint="Remove it.")
    task = TextTask(SummedLoss(model, arguments.task), tokenizer, train, held_out, arguments, classes)
    results = Trainer(task, arguments, accelerator, start, checkpoint).train()
    if accelerator.is_main_process:
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in results.items() if name.startswith("eval_"))
        print(f"fine-tuned: held-out {shown}; model in {Path(arguments.output_dir) / 'model'}")
    accelerator.end_training()
    return results


def _load(source: str, arguments: FinetuneArguments, names: list[str]) -> nn.Module:
    extra = {"num_labels": len(names), "label2id": {name: i for i, name in enumerate(names)}, "id2label": dict(enumerate(names))} if names else {}
    return load_model(source, AUTO_CLASSES[arguments.task], attn_implementation=arguments.attn_implementation, **extra)


def _patch(model: nn.Module, arguments: FinetuneArguments, tokenizer: Any, texts: Sequence[str]) -> nn.Module:
    if arguments.kan is None:
        raise ConfigError(
            "fine-tune",
            subject=arguments.model_name_or_path,
            got="a model that is not patched",
            hint="Patch it first (kanformer patch), or set kan, for example --kan.init exact.",
        )
    config = configs_from(arguments.kan, keep_original=False)
    batches = calibration_batches(tokenizer, texts, arguments.calibration_samples, arguments.max_length)
    return patch_model(model, config, calibration=batches)


def _freeze(model: nn.Module, arguments: FinetuneArguments) -> None:
    """With train_rest=False only the KAN blocks (and a classification head, which is new) are trained."""
    if arguments.train_rest:
        return
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, KANFeedForward) or (arguments.task == "classification" and name in ("classifier", "score", "classification_head")):
            module.requires_grad_(True)


def _classes(texts: dict[str, list], held: dict[str, list], arguments: FinetuneArguments) -> tuple[tuple[list[int], list[int]] | None, list[str]]:
    """Numbers of the classes of both parts, and their names."""
    if arguments.task != "classification":
        return None, []
    names = sorted({str(value) for value in texts[arguments.label_column]})
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(value) for value in held[arguments.label_column]} - set(names))
    if unknown or len(names) < 2:
        raise DataError(
            "read the classes",
            subject=arguments.label_column,
            got=f"unseen held-out classes {unknown[:3]}" if unknown else f"one class only ({names})",
            expected="at least two, all of them in the training text",
        )
    return tuple([numbers[str(value)] for value in part[arguments.label_column]] for part in (texts, held)), names  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/finetune.py` and `kanformer finetune`."""
    from kanformer.training.entry import run

    run(FinetuneArguments, finetune, sys.argv[1:] if argv is None else argv, "finetune", "Fine-tunes a patched model.")


if __name__ == "__main__":
    main()
