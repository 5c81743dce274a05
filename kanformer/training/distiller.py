"""A student beside its teacher: one pass of each over a batch, and the losses between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.conversion.batches import select_tokens
from kanformer.errors import ConfigError, SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.finding.sites import Site
from kanformer.training.block_pairs import watched_blocks
from kanformer.training.logit_losses import logit_losses
from kanformer.training.masking import IGNORED
from kanformer.training.objective import Objective


class Seen(NamedTuple):
    """What one pass of a model showed.

    pairs: (input, output) of every watched block on the unmasked tokens, each (tokens, d). states: the hidden states of all layers, embeddings first,
    each (texts, length, d). logits: (texts, length, vocabulary). Empty or None where they were not asked for.
    """

    pairs: list[tuple[Tensor, Tensor]]
    states: tuple[Tensor, ...]
    logits: Tensor | None


class Distiller(nn.Module):
    """A student's KAN-FFNs beside a frozen teacher, which is not part of this module's parameters.

    Args:
        teacher: the original model, in eval mode.
        student: the patched model; only what is trained should require gradients.
        sites: the teacher's blocks. blocks: the KAN-FFNs in their places; both may be fewer than all where `objective.local` is 0.
        objective: the weights of the losses.
    """

    scale: Tensor
    hidden_scale: Tensor

    def __init__(
        self, teacher: nn.Module, student: nn.Module, sites: Sequence[Site], blocks: Sequence[KANFeedForward], objective: Objective | None = None
    ) -> None:
        super().__init__()
        self._models = (teacher, student)  # a tuple, so that the teacher is no child: never trained, wrapped or saved
        self.sites, self.objective = tuple(sites), objective or Objective()
        self.student = student if self.objective.free else None
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("scale", torch.ones(len(sites)))
        self.register_buffer("hidden_scale", torch.ones(0))  # set by `DistillTask.measure_scale`, like `scale`

    def train(self, mode: bool = True):
        # Dropout would ask the student to match the teacher through noise. Experts without tokens give gradients of zeros in training, which DDP waits for.
        super().train(False)
        for module in self.modules():
            if isinstance(module, KANExperts):
                module.training = mode
        return self

    @torch.no_grad()
    def teacher_pass(self, batch: dict[str, Tensor], pairs: bool, logits: bool) -> Seen:
        """One pass of the teacher over model inputs; its blocks are watched if `pairs`."""
        with watched_blocks(self.sites if pairs else (), batch) as seen:
            states, found = run_model(self._models[0], batch, self.objective.states, logits)
        return Seen([seen[number] for number in sorted(seen)], states, found)

    def student_pass(self, batch: dict[str, Tensor]) -> Seen:
        """One pass of the student, end to end."""
        return Seen([], *run_model(self._models[1], batch, self.objective.states, self.objective.logits))

    def forward(self, batch: dict[str, Tensor], student_only: bool = False) -> Any:
        """(weighted sum of the losses, each of them), summed over tokens, see `Objective`.

        Args:
            batch: model inputs; `labels` of masked tokens; and `teacher_states` (unmasked tokens, layers, d) where they need not be computed.
            student_only: return `student_pass(batch)` instead: a sharded student can be run only from here, where its weights are gathered.
        """
        if student_only:
            return self.student_pass(batch)
        objective, batch = self.objective, dict(batch)
        stored, labels = batch.pop("teacher_states", None), batch.pop("labels", None)
        seen = Seen([], (), None)
        if stored is None and (objective.local or objective.states or objective.kl):
            seen = self.teacher_pass(batch, bool(objective.local), bool(objective.kl))
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.scale.device)
        if objective.local:
            parts["local"] = self._local(seen.pairs)
            total = total + objective.local * parts["local"]
        if objective.free:
            own = self.student_pass(batch)
            wanted = [select_tokens(state, batch) for state in seen.states[1:]] if stored is None else list(stored.unbind(1))
            if objective.hidden:
                parts["hidden"] = self.hidden_error(own.states, wanted, batch)
                total = total + objective.hidden * parts["hidden"]
            if objective.embedding:
                parts["embedding"] = _embedding_error(select_tokens(own.states[-1], batch), wanted[-1], batch)
                total = total + objective.embedding * parts["embedding"]
            if own.logits is not None:
                weighted, kl, ce = self._predictions(own.logits, seen.logits, batch, labels)
                parts |= {name: part for name, part, weight in (("kl", kl, objective.kl), ("ce", ce, objective.ce)) if weight}
                total = total + weighted
        return total, {name: part.detach() for name, part in parts.items()}

    def _local(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        errors = [(block(x) - target).float().square().mean(-1).sum() for block, (x, target) in zip(self.blocks, pairs, strict=True)]
        return (torch.stack(errors) / self.scale).mean()

    def hidden_error(self, own: Sequence[Tensor], wanted: Sequence[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Summed over tokens: the mean over layers of squared errors over the teacher's variance.

        Args:
            own: embeddings and every layer's states (texts, length, d). wanted: every layer's (tokens, d).
        """
        errors = [
            (select_tokens(mine, batch).float() - theirs.float()).square().mean(-1).sum() / scale
            for mine, theirs, scale in zip(own[1:], wanted, self.hidden_scale.unbind(), strict=True)
        ]
        return torch.stack(errors).mean()

    def _predictions(self, own: Tensor, wanted: Tensor | None, batch: dict[str, Tensor], labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        check_vocabularies(own, wanted)
        mask, objective = batch["attention_mask"] != 0, self.objective
        labels = next_tokens(batch) if labels is None else labels
        scored = (labels != IGNORED).sum(1, keepdim=True).clamp(min=1)
        # A text's mean cross-entropy counts for all its tokens, so that this sum too is one over tokens.
        shares = (mask.sum(1, keepdim=True) / scored).expand_as(labels)
        return logit_losses(own, wanted, mask, labels, shares, objective.kl, objective.ce, objective.temperature)


def run_model(model: nn.Module, batch: dict[str, Tensor], states: bool, logits: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(hidden states, logits) of a batch of model inputs, as far as they are wanted; without logits the model runs without its head."""
    runs: Any = model if logits else getattr(model, "base_model", model)
    output = runs(**batch, output_hidden_states=True) if states else runs(**batch)
    found = getattr(output, "hidden_states", None) if states else ()
    if found is None:
        raise ConfigError("distil", subject=type(model).__name__, got="a model without hidden_states", hint="Set hidden_weight and embedding_weight to 0.")
    return tuple(found), output.logits if logits else None


def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Embeddings first, then every layer, each (texts, length, d), from the model without its head."""
    return run_model(model, batch, True, False)[0]


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """(texts, length): the token after each, `IGNORED` where none follows. Texts begin at the left."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, :-1] = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
    return labels


def check_vocabularies(own: Tensor, wanted: Tensor | None) -> None:
    """Refuses logits over different tokens.

    Raises:
        SurgeryError: the last dimensions differ.
    """
    if wanted is not None and own.shape != wanted.shape:
        raise SurgeryError(
            "match teacher and student",
            got=f"{own.shape[-1]:,} and {wanted.shape[-1]:,} tokens in their vocabularies",
            hint="Use the model that was patched as the teacher.",
        )


def _embedding_error(own: Tensor, wanted: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """1 - cosine of the texts' mean vectors, each times the text's tokens; own and wanted (tokens, d)."""
    counts = batch["attention_mask"].sum(1)
    mine, theirs = (torch.stack([text.float().mean(0) for text in rows.split(counts.tolist())]) for rows in (own, wanted))
    return ((1 - F.cosine_similarity(mine, theirs, dim=-1)) * counts).sum()
