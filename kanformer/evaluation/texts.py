"""Texts as padded batches, one text per row, with the tokens to be predicted and the bytes that these stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kanformer.training.data import pad, pad_token
from kanformer.training.masking import IGNORED, mask_tokens

_WINDOW = 64  # batches among which texts are sorted by length, to save padding


@dataclass(frozen=True)
class Batch:
    """Some texts.

    Attributes:
        inputs: `input_ids` and `attention_mask`, (texts, length).
        targets: (texts, length), the token that the output at a position shall predict, IGNORED where there is none.
        scored_bytes: what the predicted tokens stand for, see `byte_widths`; None where the tokenizer does not say.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    scored_bytes: int | None

    def to(self, device: torch.device) -> Batch:
        return Batch({key: value.to(device) for key, value in self.inputs.items()}, self.targets.to(device), self.scored_bytes)

    @property
    def texts(self) -> int:
        return self.targets.shape[0]

    @property
    def tokens(self) -> int:
        """All that are no padding."""
        return int(self.inputs["attention_mask"].sum())


@dataclass(frozen=True)
class Reader:
    """How texts become batches. Each text stands by itself and is cut at `max_length` tokens; one without a token is left out.

    A causal model predicts every token of a text but its first; a masked one the tokens that `mask_tokens` chose, by a generator that is seeded
    with `seed` and the text's number, so that a text is masked alike in every batch; an encoder predicts nothing.
    """

    tokenizer: Any
    task: str
    max_length: int
    batch_size: int = 16
    seed: int = 0
    mlm_probability: float = 0.15

    def batches(self, texts: Sequence[str]) -> Iterator[Batch]:
        """Tokenizes as it goes: of the tokens, no more than a window of batches is in memory."""
        numbered = enumerate(texts)
        while window := list(itertools.islice(numbered, self.batch_size * _WINDOW)):
            rows = [row for row in self._encode(window) if row.ids]
            rows.sort(key=lambda row: len(row.ids))
            for start in range(0, len(rows), self.batch_size):
                yield self._batch(rows[start : start + self.batch_size])

    def _encode(self, numbered: list[tuple[int, str]]) -> list[_Row]:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        found = self.tokenizer([text for _, text in numbered], truncation=True, max_length=self.max_length, return_offsets_mapping=fast)
        rows = []
        for row, (number, text) in enumerate(numbered):
            widths = byte_widths(text, found["offset_mapping"][row]) if fast else None
            rows.append(_Row(number, found["input_ids"][row], widths))
        return rows

    def _batch(self, rows: list[_Row]) -> Batch:
        inputs = pad([row.ids for row in rows], pad_token(self.tokenizer))
        targets, counted = torch.full_like(inputs["input_ids"], IGNORED), 0
        for index, row in enumerate(rows):
            predicted = self._predict(row, inputs["input_ids"][index], targets[index])
            counted += sum(row.widths[place] for place in predicted) if row.widths is not None else 0
        return Batch(inputs, targets, counted if all(row.widths is not None for row in rows) else None)

    def _predict(self, row: _Row, ids: Tensor, targets: Tensor) -> Sequence[int]:
        """Writes the text's targets (and its masks), and says which of its tokens are predicted."""
        length = len(row.ids)
        if self.task == "causal_lm":
            targets[: length - 1] = ids[1:length]
            return range(1, length)
        if self.task == "masked_lm":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row.number)
            own = ids[:length].clone()
            ids[:length], targets[:length] = mask_tokens(self.tokenizer, own, own, self.mlm_probability, generator)
            return torch.nonzero(targets != IGNORED).flatten().tolist()
        return ()


@dataclass(frozen=True)
class _Row:
    number: int
    ids: list[int]
    widths: list[int] | None


def byte_widths(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes of the text that each token stands for, by the tokenizer's (start, end) in characters.

    A token stands for what lies between the end of the token before it and its own end, so the space before a word belongs to the word; a special
    token stands for nothing, and so does what the tokenizer leaves out at the ends. A character in several tokens counts with the first of them.
    """
    end = next((start for start, stop in offsets if stop > start), 0)
    widths = []
    for _, stop in offsets:
        stop = max(stop, end)
        widths.append(len(text[end:stop].encode("utf-8", "surrogatepass")))
        end = stop
    return widths
