"""Distillation of a patched model from the original.

Stage 1 (`stage: local`): every KAN-FFN learns its original's output from its original's input, all layers in one pass. Stage 2 (`stage: global`): the
student runs on its own, end to end, and learns the teacher's predictions, or the hidden states and embeddings of an encoder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folders import replace_file
from kanformer.surgery.record import PatchRecord, get_record
from kanformer.surgery.replacing.apply import relative_path
from kanformer.training.data import Stream, first_texts, open_texts, pad_token, text_examples, tokenize
from kanformer.training.distill_task import DistillTask
from kanformer.training.distiller import Distiller, hidden_states
from kanformer.training.distribution import shards
from kanformer.training.dry_run import dry_run
from kanformer.training.loop import Trainer
from kanformer.training.models import check_causal, check_mask_token, is_expert, load_patched, teacher_sites
from kanformer.training.objective import Objective, resolve
from kanformer.training.settings import DistillArguments
from kanformer.training.sharing import part, share
from kanformer.training.start import start_run
from kanformer.training.teacher_states import TeacherStates, write_teacher_states


def distill(arguments: DistillArguments) -> dict[str, Any]:
    """Runs a distillation as described by the settings and returns its results (also in all_results.json)."""
    if not arguments.teacher_name_or_path:
        raise ConfigError("distil", got="no teacher_name_or_path", hint="Name the original model: --teacher_name_or_path FOLDER_OR_ID.")
    if arguments.teacher_states and arguments.streaming:
        raise ConfigError("distil", got="teacher_states with streaming", hint="A stream has no end to be stored: leave one of them out.")
    start, checkpoint, accelerator = start_run(arguments)
    texts, held = open_texts(arguments, arguments.order_seed)
    source = str(checkpoint) if checkpoint else arguments.model_name_or_path
    student, teacher, tokenizer = load_patched(source, arguments.teacher_name_or_path, arguments, first_texts(texts, arguments.calibration_samples))
    arguments, objective = resolve(arguments, teacher, student)
    _check_text(objective, teacher, tokenizer, arguments.teacher_name_or_path)
    sites, blocks = _pairs(teacher, student, objective)
    share(student, teacher, str(arguments.train_rest))
    if shards(accelerator) and objective.free:  # else only blocks are sharded, which are the student's own
        part(student, teacher)
    student.to(accelerator.device)
    teacher.to(accelerator.device)
    distiller = Distiller(teacher, student, sites, blocks, objective).to(accelerator.device)
    train_examples = text_examples(texts, tokenizer, arguments.max_length)
    held_examples = tokenize(tokenizer, held.values(arguments.text_column), arguments.max_length)
    stored = None
    if arguments.teacher_states and not arguments.dry_run and not isinstance(train_examples, Stream):
        path = Path(arguments.teacher_states)
        if accelerator.is_main_process and not path.exists():
            with accelerator.autocast():
                store_states(path, teacher, train_examples, pad_token(tokenizer))
        accelerator.wait_for_everyone()
        stored = TeacherStates(path, train_examples)
    task = DistillTask(distiller, student, tokenizer, train_examples, held_examples, arguments, stored)
    task.base = arguments.teacher_name_or_path
    if arguments.dry_run:
        return dry_run(task, arguments, accelerator, teacher)
    task.measure_scale()
    before = task.evaluate()
    results = Trainer(task, arguments, accelerator, start, checkpoint).train()
    if accelerator.is_main_process:
        results = {**{f"start_{name}": value for name, value in before.items()}, **results, "layers": task.layers}
        replace_file(Path(arguments.output_dir) / "layers.csv", task.layer_table())
        replace_file(Path(arguments.output_dir) / "all_results.json", json.dumps(results, indent=2))
        print(_summary(task, before, results, Path(arguments.output_dir) / "model"))
    accelerator.end_training()
    return results


def _check_text(objective: Objective, teacher: nn.Module, tokenizer: Any, name: str) -> None:
    """Refuses predictions that the models or the tokenizer cannot make."""
    if objective.masked:
        check_mask_token(tokenizer, "distil")
    if objective.ce and objective.head == "causal_lm":
        check_causal(teacher, name, "distil")


def _pairs(teacher: nn.Module, student: nn.Module, objective: Objective) -> tuple[list[Site], list[KANFeedForward]]:
    """The teacher's blocks and the KAN-FFNs in their places; without a local loss those of mixtures, which see different tokens, are left out."""
    record = get_record(student, "distil")
    if not objective.local:
        record = PatchRecord(tuple(entry for entry in record.sites if not is_expert(entry)))
    sites = teacher_sites(teacher, student, record)
    blocks = {relative_path(student, path): module for path, module in student.named_modules() if isinstance(module, KANFeedForward)}
    return sites, [blocks[entry.path] for entry in record.sites]


def _summary(task: DistillTask, before: dict[str, float], results: dict[str, Any], folder: Path) -> str:
    shown = [name for name in ("kl", "perplexity", "top1_agreement", "embedding_cosine", "hidden") if name in task.metrics]
    parts = [f"{name} {before[name]:.4f} -> {results[f'eval_{name}']:.4f}" for name in shown]
    if "fvu" in task.metrics:
        blocks = f"FVU {before['fvu']:.4f} -> {results['eval_fvu']:.4f} (mean over {len(task.layers)} layers)"
        parts = [*parts, blocks] if task.metrics[0] != "fvu" else [blocks, *parts]
    return f"distilled: {', '.join(parts)}, held-out text; model in {folder}"


def store_states(path: Path, teacher: nn.Module, examples: list[list[int]], pad_id: int) -> None:
    """Writes the file that `DistillArguments.teacher_states` names: every layer's hidden states of the training texts."""
    from tqdm.auto import tqdm

    @torch.no_grad()
    def states(batch: dict[str, Tensor]) -> Sequence[Tensor]:
        return hidden_states(teacher, batch)[1:]

    write_teacher_states(path, states, teacher, examples, pad_id, lambda batches: tqdm(batches, desc="teacher", dynamic_ncols=True, mininterval=0.5))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/distill.py` and `kanformer distill`."""
    from kanformer.training.entry import run

    run(DistillArguments, distill, sys.argv[1:] if argv is None else argv, "distill", "Trains the KAN-FFNs of a patched model against the original's blocks.")


if __name__ == "__main__":
    main()
