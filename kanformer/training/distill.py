"""Distillation of the patched blocks: every KAN-FFN learns its original's output from its original's input, all layers in one pass.

With `hidden_weight` the student also runs on its own, and every layer's hidden state is compared with the teacher's.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import select_tokens
from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folders import replace_file
from kanformer.surgery.record import get_record
from kanformer.training.block_pairs import Unexplained, watched_blocks
from kanformer.training.data import Stream, first_texts, open_texts, pad, pad_token, text_examples, tokenize
from kanformer.training.dry_run import dry_run
from kanformer.training.loop import Trainer
from kanformer.training.models import load_patched, teacher_sites
from kanformer.training.settings import DistillArguments
from kanformer.training.start import start_run
from kanformer.training.task import Task
from kanformer.training.teacher_states import TeacherStates, write_teacher_states

_SCALE_BATCHES = 8  # held-out batches from which each layer's output variance is measured, once


class Distiller(nn.Module):
    """A student's KAN-FFNs beside a frozen teacher, which is not part of this module's parameters.

    Args:
        teacher: the original model, in eval mode.
        student: the patched model; only its KAN-FFNs should require gradients.
        sites: the teacher's blocks. blocks: the KAN-FFNs in their places.
        local_weight: of the blocks' errors on the teacher's inputs.
        hidden_weight: of the errors of the student's own hidden states, layer by layer.
    """

    scale: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        sites: Sequence[Site],
        blocks: Sequence[KANFeedForward],
        local_weight: float = 1.0,
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self._teacher = (teacher,)  # a tuple, so that it is no child: never trained, wrapped or saved
        self.sites, self.local_weight, self.hidden_weight = tuple(sites), local_weight, hidden_weight
        self.student = student if hidden_weight else None
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("scale", torch.ones(len(sites)))

    def train(self, mode: bool = True):
        # Dropout would ask the student to match the teacher through noise.
        return super().train(False)

    @torch.no_grad()
    def teacher_pass(self, batch: dict[str, Tensor], pairs: bool = True) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        """(input, output) of every original block on the unmasked tokens, each (tokens, d), and the hidden states of all layers if needed.

        Without `pairs` the first list is empty.
        """
        with watched_blocks(self.sites if pairs else (), batch) as seen:
            states = hidden_states(self._teacher[0], batch, bool(self.hidden_weight))
        return [seen[number] for number in sorted(seen)], states

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over tokens: weighted means over layers of squared errors over the teacher's variance.

        Args:
            batch: model inputs, and `teacher_states` (unmasked tokens, layers, d) where they need not be computed.
        """
        batch = dict(batch)
        stored = batch.pop("teacher_states", None)
        pairs: list[tuple[Tensor, Tensor]] = []
        if stored is None:
            pairs, states = self.teacher_pass(batch, pairs=bool(self.local_weight))
            wanted = [select_tokens(state, batch) for state in states[1:]]
        else:
            wanted = list(stored.unbind(1))
        total = torch.zeros((), device=self.scale.device)
        parts: dict[str, Tensor] = {}
        if self.local_weight:
            parts["local"] = self._local(pairs)
            total = total + self.local_weight * parts["local"]
        if self.student is not None:
            parts["hidden"] = self._hidden(batch, wanted)
            total = total + self.hidden_weight * parts["hidden"]
        return total, {name: part.detach() for name, part in parts.items()}

    def _local(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        errors = [(block(x) - target).float().square().mean(-1).sum() for block, (x, target) in zip(self.blocks, pairs, strict=True)]
        return (torch.stack(errors) / self.scale).mean()

    def _hidden(self, batch: dict[str, Tensor], wanted: Sequence[Tensor]) -> Tensor:
        assert self.student is not None
        own = hidden_states(self.student, batch, True)
        errors = []
        for mine, theirs in zip(own[1:], wanted, strict=True):
            theirs, got = theirs.float(), select_tokens(mine, batch).float()
            errors.append((got - theirs).square().mean(-1).sum() / theirs.var(0, unbiased=False).mean().clamp(min=1e-12))
        return torch.stack(errors).mean()


def hidden_states(model: nn.Module, batch: dict[str, Tensor], wanted: bool) -> tuple[Tensor, ...]:
    """Runs the model without its head where only hidden states are wanted: embeddings first, then every layer."""
    if not wanted:
        model(**batch)
        return ()
    states = getattr(model, "base_model", model)(**batch, output_hidden_states=True).hidden_states
    if states is None:
        raise ConfigError("distil", subject=type(model).__name__, got="a model without hidden_states", hint="Set hidden_weight to 0.")
    return states


class DistillTask(Task):
    """Texts for a `Distiller`; evaluation is the fraction of variance unexplained (FVU) per layer on held-out text."""

    def __init__(
        self,
        distiller: Distiller,
        student: nn.Module,
        tokenizer: Any,
        train: list[list[int]] | Stream,
        held: list[list[int]],
        batch_size: int,
        stored: TeacherStates | None = None,
    ) -> None:
        self.stored, self.metrics = stored, ("fvu", "fvu_worst")
        self.module, self.model, self.tokenizer = distiller, student, tokenizer
        self.train, self.held, self.batch_size = train, held, batch_size
        if isinstance(train, Stream):
            self.stream, self.examples = train, None
        else:
            self.examples, self.lengths = len(train), [len(example) for example in train]
        self.layers: list[float] = []

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        batch = pad([self.train[index] for index in indices], pad_token(self.tokenizer), 8, max(self.lengths or [1]))
        return batch if self.stored is None else {**batch, "teacher_states": self.stored.of(indices)}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"].sum()

    def held_batches(self) -> Iterator[dict[str, Tensor]]:
        device = self.distiller.scale.device
        for start in range(0, len(self.held), self.batch_size):
            batch = pad(self.held[start : start + self.batch_size], pad_token(self.tokenizer))
            yield {key: value.to(device) for key, value in batch.items()}

    @property
    def distiller(self) -> Distiller:
        return cast(Distiller, self.module)

    @torch.no_grad()
    def measure_scale(self) -> None:
        """Sets each layer's output variance, the unit of its loss."""
        for number, block in enumerate(self._measure(_SCALE_BATCHES)):
            self.distiller.scale[number] = block.variance

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.layers = [block.fvu for block in self._measure()]
        return {"fvu": sum(self.layers) / len(self.layers), "fvu_worst": max(self.layers)}

    def _measure(self, limit: int | None = None) -> list[Unexplained]:
        found = [Unexplained() for _ in self.distiller.sites]
        for batch in itertools.islice(self.held_batches(), limit):
            for number, (x, target) in enumerate(self.distiller.teacher_pass(batch)[0]):
                found[number].add(self.distiller.blocks[number](x), target)
        return found

    def layer_table(self) -> str:
        """The last evaluation as CSV: layer, fvu."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["layer", "fvu"])
        writer.writerows((site.path, f"{fvu:.6f}") for site, fvu in zip(self.distiller.sites, self.layers, strict=True))
        return text.getvalue()


def distill(arguments: DistillArguments) -> dict[str, Any]:
    """Runs a distillation as described by the settings and returns its results (also in all_results.json)."""
    if not arguments.local_weight and not arguments.hidden_weight:
        raise ConfigError("distil", got="local_weight=0 and hidden_weight=0", expected="at least one of them above 0")
    if arguments.train_rest != "none" and not arguments.hidden_weight:
        raise ConfigError(
            "distil", got=f"train_rest={arguments.train_rest} with hidden_weight=0", hint="Only the hidden states teach the rest: set hidden_weight above 0."
        )
    if not arguments.teacher_name_or_path:
        raise ConfigError("distil", got="no teacher_name_or_path", hint="Name the original model: --teacher_name_or_path FOLDER_OR_ID.")
    if arguments.teacher_states and arguments.local_weight:
        raise ConfigError("distil", got="teacher_states with local_weight above 0", hint="They hold hidden states only: set local_weight to 0.")
    if arguments.teacher_states and arguments.streaming:
        raise ConfigError("distil", got="teacher_states with streaming", hint="A stream has no end to be stored: leave one of them out.")
    start, checkpoint, accelerator = start_run(arguments)
    texts, held = open_texts(arguments, arguments.order_seed)
    source = str(checkpoint) if checkpoint else arguments.model_name_or_path
    student, teacher, tokenizer = load_patched(source, arguments.teacher_name_or_path, arguments, first_texts(texts, arguments.calibration_samples))
    student.to(accelerator.device)
    teacher.to(accelerator.device)
    blocks = {path: module for path, module in student.named_modules() if isinstance(module, KANFeedForward)}
    sites = teacher_sites(teacher, student, get_record(student, "distil"))
    _freeze(student, blocks.values(), arguments.train_rest)
    chosen = [blocks[site.path] for site in sites]
    distiller = Distiller(teacher, student, sites, chosen, arguments.local_weight, arguments.hidden_weight).to(accelerator.device)
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
    task = DistillTask(distiller, student, tokenizer, train_examples, held_examples, arguments.per_device_eval_batch_size, stored)
    task.base = arguments.teacher_name_or_path
    if arguments.dry_run:
        return dry_run(task, arguments, accelerator, teacher)
    if arguments.local_weight:
        task.measure_scale()
    before = task.evaluate()
    results = Trainer(task, arguments, accelerator, start, checkpoint).train()
    if accelerator.is_main_process:
        results = {**{f"start_{name}": value for name, value in before.items()}, **results, "layers": task.layers}
        replace_file(Path(arguments.output_dir) / "layers.csv", task.layer_table())
        replace_file(Path(arguments.output_dir) / "all_results.json", json.dumps(results, indent=2))
        folder = Path(arguments.output_dir) / "model"
        print(f"distilled: FVU {before['fvu']:.4f} -> {results['eval_fvu']:.4f} (mean over {len(sites)} layers, held-out text); model in {folder}")
    accelerator.end_training()
    return results


def store_states(path: Path, teacher: nn.Module, examples: list[list[int]], pad_id: int) -> None:
    """Writes the file that `DistillArguments.teacher_states` names: every layer's hidden states of the training texts."""
    from tqdm.auto import tqdm

    @torch.no_grad()
    def states(batch: dict[str, Tensor]) -> Sequence[Tensor]:
        return hidden_states(teacher, batch, True)[1:]

    write_teacher_states(path, states, teacher, examples, pad_id, lambda batches: tqdm(batches, desc="teacher", dynamic_ncols=True, mininterval=0.5))


def _freeze(student: nn.Module, blocks: Iterable[KANFeedForward], rest: str) -> None:
    """Leaves gradients to the KAN-FFNs, and to the normalisations or everything but embeddings and heads if asked."""
    base: nn.Module = getattr(student, "base_model", student)
    student.requires_grad_(False)
    for module in base.modules() if rest != "none" else ():
        norm = "Norm" in type(module).__name__
        if norm or (rest == "all" and not isinstance(module, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    for block in blocks:
        block.requires_grad_(True)
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)  # no hidden state depends on it


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/distill.py` and `kanformer distill`."""
    from kanformer.training.entry import run

    run(DistillArguments, distill, sys.argv[1:] if argv is None else argv, "distill", "Trains the KAN-FFNs of a patched model against the original's blocks.")


if __name__ == "__main__":
    main()
