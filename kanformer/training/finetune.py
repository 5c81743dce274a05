"""Fine-tuning a patched model for one of the tasks in `kanformer.training.tasks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kanformer.configs import configs_from
from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.data import open_data
from kanformer.training.dry_run import dry_run
from kanformer.training.finetune_task import FinetuneTask
from kanformer.training.loop import Trainer
from kanformer.training.models import is_patched
from kanformer.training.settings import FinetuneArguments
from kanformer.training.start import start_run
from kanformer.training.tasks import find_task


def finetune(arguments: FinetuneArguments) -> dict[str, Any]:
    """Runs a fine-tuning as described by the settings and returns its results (also in all_results.json); with dry_run what would be done."""
    if not arguments.model_name_or_path:
        raise ConfigError("fine-tune", got="no model_name_or_path", hint="Name a patched checkpoint: --model_name_or_path FOLDER_OR_ID.")
    start, checkpoint, accelerator = start_run(arguments)
    task = _load(arguments, str(checkpoint or arguments.model_name_or_path), accelerator)
    if arguments.dry_run:
        return dry_run(task, arguments, accelerator)
    results = Trainer(task, arguments, accelerator, start, checkpoint).train()
    if accelerator.is_main_process:
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in results.items() if name.startswith("eval_"))
        print(f"fine-tuned: held-out {shown}; model in {Path(arguments.output_dir) / 'model'}")
    accelerator.end_training()
    return results


def _load(arguments: FinetuneArguments, source: str, accelerator: Any) -> FinetuneTask:
    """The task with its data and the patched model."""
    kind = find_task(arguments.task)
    columns = kind.columns(arguments)
    processor = kind.load_processor(arguments)
    train, held = open_data(arguments, columns, mix=kind.mixed, seed=arguments.order_seed)
    task = kind(arguments, processor, train, held)
    if task.classes is not None:
        task.classes = task.classes.as_in(_numbers_of(source))
    model = load_model(source, kind.auto_class, attn_implementation=arguments.attn_implementation, **task.model_settings())
    task.check(model)
    if accelerator.is_main_process:
        from tqdm.auto import tqdm

        task.tell = tqdm.write
    task.prepare()
    if not is_patched(model):
        model = _patch(model, arguments, task)
    _freeze(model, arguments, kind.heads)
    task.connect(model.to(accelerator.device))
    return task


def _numbers_of(source: str) -> dict[str, int] | None:
    """The numbers that a checkpoint gives to its classes; None where it cannot be read, which loading it will say."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(source)
        return {name: int(number) for name, number in config.label2id.items()}
    except Exception:
        return None


def _patch(model: nn.Module, arguments: FinetuneArguments, task: FinetuneTask) -> nn.Module:
    if arguments.kan is None:
        raise ConfigError(
            "fine-tune",
            subject=arguments.model_name_or_path,
            got="a model that is not patched",
            hint="Patch it first (kanformer patch), or set kan, for example --kan.init exact.",
        )
    return patch_model(model, configs_from(arguments.kan, keep_original=False), calibration=task.calibration_batches())


def _freeze(model: nn.Module, arguments: FinetuneArguments, heads: Sequence[str]) -> None:
    """With train_rest=False only the KAN blocks and the task's head, which is new, are trained."""
    if arguments.train_rest:
        return
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, KANFeedForward) or name in heads:
            module.requires_grad_(True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/finetune.py` and `kanformer finetune`."""
    from kanformer.training.entry import run

    run(FinetuneArguments, finetune, sys.argv[1:] if argv is None else argv, "finetune", "Fine-tunes a patched model.")


if __name__ == "__main__":
    main()
