"""One grid of runs at a time in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kanformer.errors import ConfigError


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Holds the folder, which is made if need be, so that no two grids write into it; a killed one holds nothing.

    Args:
        what: is at work there, for the message: "study", "grid".

    Raises:
        ConfigError: another one is.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            got = f"a folder in which another {what} is at work"
            raise ConfigError(f"start the {what}", subject=f"output_dir={folder}", got=got, hint="Wait for it, or end it.") from error
        yield
