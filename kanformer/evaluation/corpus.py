"""One corpus: two passes over its texts, in which every variant of the model sees the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kanformer.conversion.batches import untouched
from kanformer.conversion.functions_off import without_functions
from kanformer.errors import DataError, SurgeryError
from kanformer.evaluation.ablation import OutputMeans, replaced_outputs
from kanformer.evaluation.subjects import Subjects
from kanformer.evaluation.texts import Batch, Reader
from kanformer.training.block_pairs import Unexplained, watched_blocks
from kanformer.training.distiller import hidden_states
from kanformer.training.masking import IGNORED
from kanformer.training.tallies import EncoderTally, LanguageTally, recovered

VARIANTS = ("teacher", "patched", "without_functions", "zero_ablation", "mean_ablation")
_LEARNED = ("patched", "without_functions")  # those whose blocks compute something
After = Callable[[Batch], None]


@dataclass
class CorpusResult:
    """What was found on one corpus.

    Attributes:
        rows: by variant, see `LanguageTally` and `EncoderTally`; with a teacher `explained_variance` (mean over the layers) and `recovered_zero`,
            `recovered_mean` (see `recovered`) of the variants whose blocks compute something.
        layers: by block, the explained variance of the original block's output at the original's own input: by the KAN-FFN, and without its functions.
    """

    name: str
    source: str
    texts: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    scored_bytes: int | None = 0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)


def measure_corpus(subjects: Subjects, reader: Reader, texts: Sequence[str], result: CorpusResult, after: After = lambda batch: None) -> CorpusResult:
    """Fills `result`. The models' activations are streamed: of the texts' tokens and sums no more is kept than a window of batches.

    Args:
        after: called with each batch, in both passes.

    Raises:
        DataError: no token to predict. SurgeryError: the two models differ in their vocabularies.
    """
    measurement = _Measurement(subjects, result)
    with untouched(subjects.patched):
        for batch in reader.batches(texts):
            measurement.first(batch.to(subjects.device))
            after(batch)
        if not result.scored_tokens:
            raise DataError("score the texts", subject=result.source, got="no token to predict", hint="Give more or longer texts, or a larger max_length.")
        means = measurement.means.means()
        for batch in reader.batches(texts):
            measurement.second(batch.to(subjects.device), means)
            after(batch)
    measurement.finish()
    return result


class _Measurement:
    """The sums of one corpus."""

    def __init__(self, subjects: Subjects, result: CorpusResult) -> None:
        self.subjects, self.result = subjects, result
        variants = VARIANTS if subjects.teacher is not None else VARIANTS[1:]
        self.tallies: dict[str, Any] = {name: EncoderTally() if subjects.task == "encoder" else LanguageTally() for name in variants}
        self.means = OutputMeans(subjects.patched)
        self.unexplained = {name: [Unexplained() for _ in subjects.sites] for name in _LEARNED}

    def first(self, batch: Batch) -> None:
        """All variants but the one that needs the means, which are gathered here."""
        patched, result = self.subjects.patched, self.result
        result.texts, result.tokens = result.texts + batch.texts, result.tokens + batch.tokens
        result.scored_tokens += batch.tokens if self.subjects.task == "encoder" else int((batch.targets != IGNORED).sum())
        result.scored_bytes = None if result.scored_bytes is None or batch.scored_bytes is None else result.scored_bytes + batch.scored_bytes
        with watched_blocks(self.subjects.sites, batch.inputs) as pairs:
            reference = self._run(self.subjects.teacher, batch)
        if reference is not None:
            self._add("teacher", batch, reference, reference)
        with self.means.watch(batch.inputs):
            self._add("patched", batch, self._run(patched, batch), reference)
        self._explain("patched", pairs)
        with without_functions(patched):
            self._add("without_functions", batch, self._run(patched, batch), reference)
            self._explain("without_functions", pairs)
        with replaced_outputs(patched):
            self._add("zero_ablation", batch, self._run(patched, batch), reference)

    def second(self, batch: Batch, means: dict[str, torch.Tensor]) -> None:
        """The mean ablation."""
        reference = self._run(self.subjects.teacher, batch)
        with replaced_outputs(self.subjects.patched, means):
            self._add("mean_ablation", batch, self._run(self.subjects.patched, batch), reference)

    def finish(self) -> None:
        """Turns the sums into the result's rows and layers."""
        rows = self.result.rows = {name: tally.result(self.result.scored_bytes) for name, tally in self.tallies.items()}
        if self.subjects.teacher is None:
            return
        losses = {name: self.tallies[name].loss(row) for name, row in rows.items()}
        for kind in ("zero", "mean"):
            if losses[f"{kind}_ablation"] <= losses["teacher"]:
                self.subjects.notes.append(f"{self.result.name}: nothing to recover from the {kind} ablation, which is no worse than the teacher")
        for name in _LEARNED:
            for kind in ("zero", "mean"):
                rows[name][f"recovered_{kind}"] = recovered(losses[name], losses[f"{kind}_ablation"], losses["teacher"])
            explained = [1 - block.fvu for block in self.unexplained[name]]
            rows[name]["explained_variance"] = sum(explained) / len(explained) if explained else None
            for site, value in zip(self.subjects.sites, explained, strict=True):
                self.result.layers.setdefault(site.path, {})[name] = value

    def _run(self, model: nn.Module | None, batch: Batch) -> Any:
        """An encoder's hidden states, or a language model's logits where there is something to predict."""
        if model is None:
            return None
        if self.subjects.task == "encoder":
            return hidden_states(model, batch.inputs)
        return model(**batch.inputs).logits[batch.targets != IGNORED]

    def _add(self, name: str, batch: Batch, output: Any, reference: Any) -> None:
        tally = self.tallies[name]
        if isinstance(tally, EncoderTally):
            tally.add(output, batch.inputs["attention_mask"], reference)
            return
        if reference is not None and output.shape != reference.shape:
            raise SurgeryError(
                "match teacher and student",
                got=f"{output.shape[-1]:,} and {reference.shape[-1]:,} tokens in their vocabularies",
                hint="Use the model that was patched as the teacher.",
            )
        tally.add(output, batch.targets[batch.targets != IGNORED], reference)

    def _explain(self, name: str, pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for number, (x, target) in pairs.items():
            block = self.subjects.blocks[number]
            self.unexplained[name][number].add(block(x.to(next(block.parameters()).dtype)), target)
