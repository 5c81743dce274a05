"""What is differentiated: a model's loss, summed over what it scores, and a random probe of its curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.errors import ConfigError, DataError
from kanformer.interpret.collecting.tokens import content_seed

IGNORED = -100
UserLoss = Callable[[Any, Mapping[str, Any]], Tensor]
_CAUSAL, _MASKED, _SEQUENCES = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM",), ("ForConditionalGeneration",)


@dataclass(frozen=True)
class Measured:
    """The loss of one batch.

    Attributes:
        total: scalar, the loss times what it is a mean over; in the graph where gradients are recorded.
        count: what it is a mean over: predicted tokens, labelled sequences, or tokens.
        sequences, counts: (sequences,) the same per sequence, detached, in float64; None where only the batch's mean is known.
        probes: scalars, independent draws: the gradient of each by the outputs has the Hessian of `total` as its second moment.
        flat: whether the gradient of `total` is zero by construction.
    """

    total: Tensor
    count: float
    sequences: Tensor | None = None
    counts: Tensor | None = None
    probes: tuple[Tensor, ...] = ()
    flat: bool = False


class Objective:
    """Chooses the loss of a model: a user's, else the model's own where the batch has labels, else one made from the inputs.

    - loss(outputs, batch), the user's: a scalar, the mean over the batch's tokens (padding left out).
    - labels in the batch: the model's own `outputs.loss`.
    - a causal language model without labels: cross-entropy of each next token; a masked one: of every token at its own place, nothing masked
      (mask them yourself and give labels for its training objective); an encoder-decoder with decoder_input_ids: of each next one of these.
    - an encoder without a head: how far the final hidden state moves, the mean over tokens of |h - h0|^2 / |h0|^2 with h0 as the model gives it now;
      any other head without labels: how far its logits move. The gradient there is zero, the curvature is not: `effect` is all second order.

    The curvature of a cross-entropy is that of labels drawn from the model's own predictions (the Gauss-Newton matrix, Martens 2020, arXiv
    1412.1193, section 9), of the hidden state's movement that of a Gaussian projection. Another loss gives its own gradients (the empirical
    Fisher matrix), which at a good fit is too small and away from it too large: read it as a ranking. Draws depend on the sequences' content only.
    """

    def __init__(self, model: nn.Module, loss: UserLoss | None) -> None:
        if loss is not None and not callable(loss):
            raise ConfigError("choose a loss", got=repr(loss), expected="a function of (outputs, batch) that gives a scalar")
        self.model, self.user, self.name = model, loss, "loss"
        kind = type(model).__name__
        self.causal, self.masked, self.sequences = kind.endswith(_CAUSAL), kind.endswith(_MASKED), kind.endswith(_SEQUENCES)

    def __call__(self, outputs: Any, batch: Mapping[str, Any], reference: Any = None, probes: int = 0) -> Measured:
        """The loss of one batch.

        Args:
            outputs: what the model gave. batch: what it was given.
            reference: what the model gives for the batch when nothing is changed; needed for an encoder's movement, None means `outputs`.
            probes: draws for the curvature; of the movement there is always one where gradients are recorded, for nothing else has a gradient.

        Raises:
            DataError: no loss can be made of this, or it is not finite.
        """
        measured = self._measure(outputs, batch, outputs if reference is None else reference, probes)
        if not bool(torch.isfinite(measured.total.detach())):
            raise DataError("compute the loss", subject=self.name, got=float(measured.total.detach()), expected="a finite number")
        return measured

    def _measure(self, outputs: Any, batch: Mapping[str, Any], reference: Any, probes: int) -> Measured:
        if self.user is not None:
            return self._users(outputs, batch)
        logits = _field(outputs, "logits")
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            return self._labelled(outputs, batch, logits, labels, probes)
        predicted = self._predicted(logits, batch)
        if logits is not None and predicted is not None:
            self.name = "cross-entropy of the visible token" if self.masked else "cross-entropy of the next token"
            return _cross_entropy(*(_shifted if not self.masked else _in_place)(logits, predicted), batch, probes)
        what, hidden = _moving(outputs)
        if hidden is None:
            raise DataError(
                "compute the loss",
                subject=type(self.model).__name__,
                got=f"a batch of {sorted(batch)} and no hidden state or logits in the outputs",
                expected="labels in it",
                hint="Add labels to the batches, or pass loss=a function of (outputs, batch).",
            )
        self.name = f"movement of the {what}"
        before = _moving(reference)[1]
        assert before is not None
        return _movement(hidden, before.detach(), batch, max(1, probes) if hidden.requires_grad else 0, reference is outputs)

    def needs_reference(self, outputs: Any, batch: Mapping[str, Any]) -> bool:
        """Whether the loss of this batch is a movement, away from a `reference`."""
        return self.user is None and not isinstance(batch.get("labels"), Tensor) and self._predicted(_field(outputs, "logits"), batch) is None

    def _predicted(self, logits: Tensor | None, batch: Mapping[str, Any]) -> Tensor | None:
        """The ids that a language model predicts without labels, (sequences, length) with `IGNORED` for padding, or None for other models."""
        prefix = "decoder_" if self.sequences else ""
        ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
        known = self.causal or self.masked or self.sequences
        if not known or logits is None or not isinstance(ids, Tensor) or logits.shape[:2] != ids.shape:
            return None
        return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)

    def _users(self, outputs: Any, batch: Mapping[str, Any]) -> Measured:
        assert self.user is not None
        self.name = getattr(self.user, "__name__", type(self.user).__name__)
        value = self.user(outputs, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(
                "compute the loss", subject=self.name, got=f"{tuple(value.shape) if isinstance(value, Tensor) else value!r}", expected="a scalar tensor"
            )
        count = float(_token_count(batch))
        return Measured(value.reshape(()) * count, count)

    def _labelled(self, outputs: Any, batch: Mapping[str, Any], logits: Tensor | None, labels: Tensor, probes: int) -> Measured:
        value = _field(outputs, "loss")
        if value is None:
            raise DataError("compute the loss", subject=type(self.model).__name__, got="labels, but no loss in the outputs", hint="Pass loss=.")
        self.name = "the model's own loss"
        whole = labels.dtype == torch.int64 and logits is not None and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1
        if not whole or logits is None:
            count = float((labels != IGNORED).sum()) if labels.dtype == torch.int64 and labels.dim() == 2 else float(labels.shape[0])
            return Measured(value * count, count)
        own = _cross_entropy(*self._aligned(logits, labels), batch, probes)
        mean = float(own.total.detach()) / max(1.0, own.count)
        if abs(mean - float(value.detach())) > 1e-3 * max(1e-3, abs(mean)):  # smoothing, routers' losses: known as a mean only
            return Measured(value * own.count, own.count, probes=own.probes)
        return Measured(value * own.count, own.count, own.sequences, own.counts, own.probes)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (_shifted if self.causal else _in_place)(logits, labels)


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1], labels[:, 1:]


def _in_place(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits, labels


def _moving(outputs: Any) -> tuple[str, Tensor | None]:
    """What moves in outputs without a loss, and its name."""
    logits, hidden = _field(outputs, "logits"), outputs if isinstance(outputs, Tensor) else _field(outputs, "last_hidden_state")
    return ("logits", logits) if logits is not None else ("final hidden state", hidden)


def _cross_entropy(logits: Tensor, labels: Tensor, batch: Mapping[str, Any], probes: int) -> Measured:
    """Of logits (sequences, ..., classes) and labels (sequences, ...)."""
    scores = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    kept = labels != IGNORED
    losses = -scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(kept, losses, 0.0)
    rows = losses.detach().double().reshape(len(labels), -1).sum(1)
    counts = kept.reshape(len(labels), -1).sum(1).double()
    drawn = []
    for number in range(probes):
        seeds = _seeds(batch, len(labels), number)
        sampled = torch.stack([_sample(row, seed, chosen) for row, seed, chosen in zip(scores.detach(), seeds, kept, strict=True)])
        drawn.append(-torch.where(kept, scores.gather(-1, sampled.unsqueeze(-1)).squeeze(-1), 0.0).sum())
    return Measured(losses.sum(), float(counts.sum()), rows, counts, tuple(drawn))


def _sample(scores: Tensor, seed: int, kept: Tensor) -> Tensor:
    """Labels drawn by log-probabilities (..., classes) where `kept`; the draws do not depend on padding."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(kept.shape, dtype=torch.int64, device=scores.device)
    level = torch.rand(int(kept.sum()), 1, generator=generator, dtype=torch.float64).to(scores)
    below = scores[kept].exp().cumsum(-1)
    found[kept] = torch.searchsorted(below, level * below[:, -1:]).squeeze(-1).clamp(max=scores.shape[-1] - 1)
    return found


def _movement(hidden: Tensor, before: Tensor, batch: Mapping[str, Any], probes: int, flat: bool) -> Measured:
    """|h - h0|^2 / |h0|^2 per token of hidden states (sequences, ..., d)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden, before = hidden.to(wide), before.to(wide)
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    kept = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if isinstance(mask, Tensor) and mask.shape == kept.shape:
        kept = mask != 0
    size = before.square().sum(-1).clamp(min=1e-30)
    moved = torch.where(kept, (hidden - before).square().sum(-1) / size, 0.0)
    drawn = []
    for number in range(probes):
        noise = torch.zeros_like(before)
        for row, seed in enumerate(_seeds(batch, len(hidden), number)):
            draws = torch.randn(int(kept[row].sum()), hidden.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            noise[row][kept[row]] = draws.to(noise)
        drawn.append((noise * hidden * (2 / size).sqrt().unsqueeze(-1)).sum())
    counts = kept.reshape(len(hidden), -1).sum(1).double()
    return Measured(moved.sum(), float(counts.sum()), moved.detach().double().reshape(len(hidden), -1).sum(1), counts, tuple(drawn), flat)


def _seeds(batch: Mapping[str, Any], sequences: int, draw: int) -> list[int]:
    """A number per sequence made from its content without padding, another one for each draw."""
    mask = batch.get("attention_mask")
    for key in ("input_ids", "inputs_embeds", *batch):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == sequences:
            masked = isinstance(mask, Tensor) and mask.shape == value.shape[:2]
            return [_mixed(content_seed(row[keep != 0] if masked else row), draw) for row, keep in zip(value, mask if masked else value, strict=True)]  # type: ignore[arg-type]
    return [_mixed(row, draw) for row in range(sequences)]


def _mixed(seed: int, draw: int) -> int:
    """Another seed for each draw, within the 32 bits that a generator on the CPU reads."""
    return (seed + draw * 0x9E3779B1) % 2**32


def _token_count(batch: Mapping[str, Any]) -> int:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum())
    if isinstance(ids, Tensor):
        return ids.numel()
    return next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
