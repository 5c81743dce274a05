"""Folders and files that are complete or not there: written aside, marked, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kanformer.errors import CheckpointError

MARKER = "complete.json"


def write_folder(final: Path, fill: Callable[[Path], None], info: dict[str, Any] | None = None) -> None:
    """Lets `fill` write into a folder beside `final`, marks it complete and puts it in the place of `final`.

    Raises:
        CheckpointError: the disk is full or read-only; what stood at `final` is untouched.
    """
    from safetensors import SafetensorError

    final = Path(os.path.abspath(final))
    aside, old = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "old"))
    try:
        recover(final)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        _sync(aside)
        (aside / MARKER).write_text(json.dumps(info or {}), encoding="utf-8")
        _sync(aside)
        _put(aside, final, old)
    except Exception as error:
        # safetensors and torch have errors of their own for a full disk; tokenizers raises a bare Exception.
        if not isinstance(error, OSError | SafetensorError | RuntimeError) and type(error) is not Exception:
            raise
        raise CheckpointError(
            "write the checkpoint",
            subject=final,
            got=reason(error),
            hint="Free some space or choose another output_dir; earlier checkpoints are intact.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Looks, without making anything, whether `folder` can be made or written to: bad input leaves nothing behind.

    Raises:
        CheckpointError: its nearest existing parent is no folder, or read-only.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise CheckpointError("use the output folder", subject=folder, got=f"{nearest}, which is no folder that can be written to")


def recover(final: Path) -> None:
    """Puts the older folder back where a crash came between the two renames of `write_folder`."""
    final = Path(os.path.abspath(final))
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        os.rename(old, final)


def _put(aside: Path, final: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(aside, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Writes a small text file so that a reader sees the old or the new one, never half."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise CheckpointError("write a file", subject=path, got=reason(error)) from error
