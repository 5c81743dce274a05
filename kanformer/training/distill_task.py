"""The texts of a distillation, and what is measured on held-out ones."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import select_tokens
from kanformer.conversion.moments import Moments
from kanformer.training.block_pairs import Unexplained
from kanformer.training.data import Stream, pad, pad_token
from kanformer.training.distiller import Distiller, Seen, check_vocabularies, next_tokens
from kanformer.training.masking import IGNORED, mask_tokens
from kanformer.training.settings import DistillArguments
from kanformer.training.tallies import EncoderTally, LanguageTally
from kanformer.training.task import Task
from kanformer.training.teacher_states import TeacherStates

_SCALE_BATCHES = 8  # held-out batches from which the layers' variances, the units of the losses, are measured, once
_LOGITS, _STATES, _BLOCKS = ("kl", "ce", "perplexity", "top1_agreement"), ("embedding_cosine", "hidden"), ("fvu", "fvu_worst")


class DistillTask(Task):
    """Texts for a `Distiller`. Evaluations measure on held-out text

    - fvu, fvu_worst: the fraction of variance unexplained of the blocks on the teacher's inputs, mean and largest (where there are pairs of blocks);
    - kl, ce, perplexity, top1_agreement: see `LanguageTally` (where logits are compared); embedding_cosine: see `EncoderTally`, and hidden: the error of
      the student's own hidden states, see `Distiller.hidden_error`, per token (where hidden states are).
    """

    def __init__(
        self,
        distiller: Distiller,
        student: nn.Module,
        tokenizer: Any,
        train: list[list[int]] | Stream,
        held: list[list[int]],
        arguments: DistillArguments,
        stored: TeacherStates | None = None,
    ) -> None:
        objective = distiller.objective
        self.module, self.model, self.tokenizer, self.stored, self.arguments = distiller, student, tokenizer, stored, arguments
        free = (*(_LOGITS if objective.logits else ()), *(_STATES if objective.states else ()))
        blocks = _BLOCKS if distiller.sites else ()
        self.metrics = (*blocks, *free) if objective.local or not free else (*free, *blocks)
        self.train, self.held, self.batch_size = train, held, arguments.per_device_eval_batch_size
        if isinstance(train, Stream):
            self.stream, self.examples = train, None
        else:
            self.examples, self.lengths = len(train), [len(example) for example in train]
        self.layers: list[float] = []

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        batch = self._masked(pad([self.train[index] for index in indices], pad_token(self.tokenizer), 8, max(self.lengths or [1])))
        return batch if self.stored is None else {**batch, "teacher_states": self.stored.of(indices)}

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"].sum()

    def _masked(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if not self.distiller.objective.masked:
            return batch
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        ids, labels = mask_tokens(self.tokenizer, batch["input_ids"], labels, self.arguments.mlm_probability, generator)
        return {**batch, "input_ids": ids, "labels": labels}

    def held_batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(model inputs, labels) of the held-out texts, the same masks every time."""
        device, generator = self.distiller.scale.device, torch.Generator().manual_seed(self.arguments.seed)
        for start in range(0, len(self.held), self.batch_size):
            batch = self._masked(pad(self.held[start : start + self.batch_size], pad_token(self.tokenizer)), generator)
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels", None)
            yield batch, next_tokens(batch) if labels is None else labels

    @property
    def distiller(self) -> Distiller:
        return cast(Distiller, self.module)

    @torch.no_grad()
    def measure_scale(self) -> None:
        """Sets the variances of the blocks' outputs and of the hidden states, the units of their losses."""
        distiller = self.distiller
        outputs: list[Moments] = []
        states: list[Moments] = []
        for batch, _ in itertools.islice(self.held_batches(), _SCALE_BATCHES):
            seen = distiller.teacher_pass(batch, bool(distiller.sites), False)
            _add_moments(outputs, [target for _, target in seen.pairs])
            _add_moments(states, [select_tokens(state, batch) for state in seen.states[1:]])
        distiller.scale.copy_(_variances(outputs))
        distiller.hidden_scale = _variances(states).to(distiller.scale)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        objective = self.distiller.objective
        blocks = [Unexplained() for _ in self.distiller.sites]
        language, encoder = LanguageTally(), EncoderTally()
        hidden = tokens = 0.0
        for batch, labels in self.held_batches():
            seen = self.distiller.teacher_pass(batch, bool(blocks), objective.logits)
            for block, kan, (x, target) in zip(blocks, self.distiller.blocks, seen.pairs, strict=True):
                block.add(kan(x), target)
            own = self.distiller(batch, student_only=True) if objective.free else Seen([], (), None)
            if own.logits is not None:
                check_vocabularies(own.logits, seen.logits)
                _add_predictions(language, own.logits, labels, cast(Tensor, seen.logits))
            if objective.states:
                encoder.add(own.states, batch["attention_mask"], seen.states)
                hidden += float(self.distiller.hidden_error(own.states, [select_tokens(state, batch) for state in seen.states[1:]], batch))
                tokens += float(self.items(batch))
        self.layers = [block.fvu for block in blocks]
        found: dict[str, float] = {}
        if blocks:
            found |= {"fvu": sum(self.layers) / len(self.layers), "fvu_worst": max(self.layers)}
        if objective.logits:
            found |= {name: value for name, value in language.result(None).items() if name in _LOGITS}
        if objective.states:
            found |= {"embedding_cosine": encoder.result(None)["embedding_cosine"], "hidden": hidden / tokens}
        return found

    def layer_table(self) -> str:
        """The last evaluation as CSV: layer, fvu."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["layer", "fvu"])
        writer.writerows((site.path, f"{fvu:.6f}") for site, fvu in zip(self.distiller.sites, self.layers, strict=True))
        return text.getvalue()


def _add_predictions(tally: LanguageTally, own: Tensor, labels: Tensor, reference: Tensor) -> None:
    """Text by text, so that no second copy of all logits is made."""
    for mine, wanted, targets in zip(own, reference, labels, strict=True):
        scored = targets != IGNORED
        if scored.any():
            tally.add(mine[scored], targets[scored], wanted[scored])


def _add_moments(moments: list[Moments], rows: list[Tensor]) -> None:
    if not moments:
        moments += [Moments(each.shape[-1]) for each in rows]
    for each, row in zip(moments, rows, strict=True):
        each.add(row)


def _variances(moments: list[Moments]) -> Tensor:
    """(layers,), means over the channels."""
    return torch.tensor([max(float(each.variance.mean()), 1e-12) for each in moments])
