"""What is summed over the tokens of a corpus for one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NUMBERS = 2**24  # logits that are worked on at a time


class LanguageTally:
    """Cross-entropy of predicted tokens, and how far the predictions are from a reference's. All means weigh every predicted token alike.

    - ce: mean of -log p(token), in nats. perplexity: exp(ce).
    - bits_per_byte: the summed -log2 p(token) over the UTF-8 bytes that the predicted tokens stand for (`texts.byte_widths`): of a causal model's text
      from the end of its first token, which nothing predicts, to the end of the last token that was not cut off; of a masked model the masked
      tokens' bytes (a pseudo-likelihood, to be compared with its like only). Predicted special tokens count in the sum and have no bytes.
    - kl: mean of KL(reference || model) = sum_v p(v) (log p(v) - log q(v)) over the vocabulary, in nats, at temperature 1.
    - top1_agreement: share of tokens where both have the same likeliest prediction.

    Logarithms are in float32 (float64 for float64 logits), sums in float64.
    """

    def __init__(self) -> None:
        self.nats = self.kl = 0.0
        self.tokens = self.agreeing = 0
        self.compared = False

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Takes in logits (tokens, vocabulary), the right tokens (tokens,), and the reference's logits."""
        rows = max(1, _NUMBERS // logits.shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            scores = _log_softmax(logits[part])
            self.nats -= float(scores.gather(1, targets[part].unsqueeze(1)).double().sum())
            if reference is not None:
                wanted = _log_softmax(reference[part])
                share = wanted.exp()
                self.kl += float(torch.where(share > 0, share * (wanted - scores), 0.0).sum(-1).double().sum())
                self.agreeing += int((scores.argmax(-1) == wanted.argmax(-1)).sum())
                self.compared = True
        self.tokens += len(logits)

    def result(self, scored_bytes: int | None) -> dict[str, Any]:
        ce = self.nats / self.tokens
        found: dict[str, Any] = {"ce": ce, "perplexity": math.exp(min(ce, 700.0))}
        found["bits_per_byte"] = self.nats / math.log(2) / scored_bytes if scored_bytes else None
        if self.compared:
            found |= {"kl": self.kl / self.tokens, "top1_agreement": self.agreeing / self.tokens}
        return found

    @staticmethod
    def loss(result: dict[str, Any]) -> float:
        """What the loss recovered is measured in: the cross-entropy."""
        return result["ce"]


class EncoderTally:
    """How near an encoder without a head is to a reference, in float64.

    - embedding_cosine: mean over texts of the cosine between sentence embeddings, which are the means of the last hidden states over the text's tokens.
    - hidden_cosine: mean over tokens and layers of the cosine between hidden states; `layers`: the same layer by layer.
    """

    def __init__(self) -> None:
        self.embeddings, self.texts, self.tokens = 0.0, 0, 0
        self.layers: list[float] = []

    def add(self, states: Sequence[Tensor], mask: Tensor, reference: Sequence[Tensor]) -> None:
        """Takes in all hidden states (texts, length, d), embeddings first, of both, and the mask (texts, length)."""
        vectors = [_mean_over_tokens(each[-1], mask) for each in (states, reference)]
        self.embeddings += float(F.cosine_similarity(*vectors, dim=-1).sum())
        real = mask != 0
        cosines = [float(F.cosine_similarity(a[real].double(), b[real].double(), dim=-1).sum()) for a, b in zip(states[1:], reference[1:], strict=True)]
        self.layers = [old + new for old, new in zip(self.layers or [0.0] * len(cosines), cosines, strict=True)]
        self.texts, self.tokens = self.texts + len(mask), self.tokens + int(real.sum())

    def result(self, scored_bytes: int | None) -> dict[str, Any]:
        layers = [total / self.tokens for total in self.layers]
        return {"embedding_cosine": self.embeddings / self.texts, "hidden_cosine": sum(layers) / len(layers), "layers": layers}

    @staticmethod
    def loss(result: dict[str, Any]) -> float:
        """What the loss recovered is measured in: 1 - embedding_cosine, 0 for the reference."""
        return 1 - result["embedding_cosine"]


def recovered(loss: float, ablated: float, reference: float) -> float | None:
    """Loss recovered, (L_ablated - L) / (L_ablated - L_reference): 1 is the reference's loss, 0 that of the ablated blocks.

    None where the ablated model is no worse than the reference, so that there is nothing to recover.
    Source: Bricken et al. 2023, Towards monosemanticity, as used for sparse autoencoders; here with all blocks ablated at once, since a single one
    is often worth so little that the ratio is noise.
    """
    return (ablated - loss) / (ablated - reference) if ablated > reference else None


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)


def _mean_over_tokens(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).double()
    return (states.double() * weight).sum(1) / weight.sum(1)
