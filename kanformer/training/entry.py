"""How a script starts and ends: settings, one-line errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kanformer.errors import KanformerError, TrainingDiverged
from kanformer.training.arguments import parse_arguments

T = TypeVar("T")
BAD_INPUT, DIVERGED = 2, 3


def run(cls: type[T], work: Callable[[T], Any], argv: Sequence[str], prog: str, description: str) -> None:
    """Parses the settings and does the work; exits with 2 on bad input and 3 when the loss diverged."""
    try:
        work(parse_arguments(cls, argv, prog, description))
    except KanformerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(DIVERGED if isinstance(error, TrainingDiverged) else BAD_INPUT) from None
