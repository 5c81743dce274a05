"""The one exception family. Every message says what was attempted, on what, what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KanformerError(Exception):
    """Base of everything kanformer raises on purpose.

    Args:
        action: what was attempted, in the infinitive ("patch the model").
        subject: on what ("BertModel", "encoder.layer.0").
        got: what was found.
        expected: what would have been right.
        hint: what the reader can do about it.
    """

    def __init__(
        self,
        action: str,
        *,
        subject: object = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.action, self.subject, self.got, self.expected, self.hint = action, subject, got, expected, hint
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"cannot {self.action}"
        if self.subject is not None:
            text += f" ({_cut(self.subject)})"
        facts = [f"got {_cut(self.got)}" if self.got is not None else "", f"expected {self.expected}" if self.expected is not None else ""]
        facts = [fact for fact in facts if fact]
        if facts:
            text += ": " + ", ".join(facts)
        return text + (f". {self.hint}" if self.hint else "")

    def __reduce__(self):
        # Pickled between worker processes: rebuild from the finished message's parts.
        return (_rebuild, (type(self), self.action, self.subject, self.got, self.expected, self.hint))


def _cut(value: object, length: int = 1000) -> str:
    """What came from a user or a file, without its tail where it is a book."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def _rebuild(cls, action, subject, got, expected, hint):
    return cls(action, subject=subject, got=got, expected=expected, hint=hint)


class ConfigError(KanformerError, ValueError):
    """A configuration value or key is wrong."""


class ShapeError(KanformerError, ValueError):
    """A tensor does not have the shape or dtype that a layer needs."""


class DataError(KanformerError, ValueError):
    """Text, batches or activations cannot be used."""


class SurgeryError(KanformerError, ValueError):
    """A model cannot be patched, restored or described; it is as it was before the call."""


class NoFeedForwardError(SurgeryError):
    """Nothing in the model (or nothing of what was asked for) is a feed-forward block that kanformer knows."""


class CheckpointError(KanformerError, OSError):
    """A folder or file on disk cannot be read or written; what was there before is untouched."""


class TrainingDiverged(KanformerError, ArithmeticError):
    """The loss stopped being a finite number; the last complete checkpoint still stands."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known words, for error hints."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(item) for item in near)}?"
    return f"Known: {', '.join(known)}."
