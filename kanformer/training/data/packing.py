"""From texts to examples of token ids: a text each, or blocks cut from all texts in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kanformer.errors import DataError
from kanformer.training.data.padding import pad_token


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """One example per text, cut at max_length; texts without tokens are dropped."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    examples = [example for example in ids if example]
    if not examples:
        raise DataError("tokenize", got="texts without a single token")
    return examples


def tokenize_streamed(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """The tokens of one text of a stream, whose rows are counted: one without any stands as a padding token."""
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"] or [pad_token(tokenizer)]


def pack(tokenizer: Any, texts: Sequence[str], block_size: int) -> list[list[int]]:
    """All texts in a row, separated by the end-of-text token, cut into blocks of exactly block_size tokens.

    Raises:
        DataError: less text than one block.
    """
    packer = Packer(tokenizer, block_size)
    blocks, rest = packer.cut(texts, [])
    packer.check(len(blocks), len(rest))
    return blocks


@dataclass(frozen=True)
class Packer:
    """Cuts blocks of `block_size` tokens from texts that come in portions; trl calls it `packing_strategy="wrapped"`."""

    tokenizer: Any
    block_size: int

    def cut(self, texts: Sequence[str], rest: list[int]) -> tuple[list[list[int]], list[int]]:
        """(blocks, what is left over) of the left-over tokens of the portion before and these texts."""
        end = end_tokens(self.tokenizer)
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        stream = [*rest, *(token for ids in found for token in (*ids, *end))]
        last = len(stream) - len(stream) % self.block_size
        return [stream[start : start + self.block_size] for start in range(0, last, self.block_size)], stream[last:]

    def check(self, blocks: int, rest: int, part: str | None = None) -> None:
        """Refuses texts (of this part of the data) that gave no block.

        Raises:
            DataError: there are fewer tokens than a block has.
        """
        if not blocks:
            raise DataError(
                "cut the text into blocks",
                subject=part,
                got=f"{rest:,} tokens",
                expected=f"at least one block of {self.block_size}",
                hint="Give more text or a smaller max_length.",
            )

    def summary(self, blocks: int, rest: int) -> str:
        """What became of the tokens, in one line."""
        return f"packed {blocks * self.block_size + rest:,} tokens into {blocks:,} blocks of {self.block_size}; the last {rest:,} fill none and are left out"


def end_tokens(tokenizer: Any) -> list[int]:
    """What stands after a text: the end-of-text token, else the separator, else nothing."""
    found = next((token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None), None)
    return [] if found is None else [found]
