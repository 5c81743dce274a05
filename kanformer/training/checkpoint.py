"""Checkpoints of a training that are complete or not there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from kanformer.surgery.folders import MARKER

RESULTS = "all_results.json"  # written last of all
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the marked checkpoints, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*") if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / MARKER).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def drop_old(output_dir: Path, keep: int | None, spare: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints and that of step `spare`."""
    for step, path in complete_checkpoints(output_dir)[:-keep] if keep else ():
        if step != spare:
            shutil.rmtree(path, ignore_errors=True)
