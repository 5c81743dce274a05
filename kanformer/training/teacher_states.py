"""The teacher's hidden states of the training texts on disk: computed once, read in every step, shared by runs on the same texts."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import CheckpointError
from kanformer.surgery.folders import reason, replace_file
from kanformer.training.data import pad

_BATCH = 32
_BYTES = 2  # bfloat16


class TeacherStates:
    """A file of bfloat16 numbers, (tokens, layers, d) text after text, and a JSON file beside it that says of which texts.

    Read with plain reads: the pages belong to the system's cache, not to the process.
    """

    def __init__(self, path: Path, examples: Sequence[Sequence[int]]) -> None:
        self.path, facts = path, _read_facts(path)
        if facts["texts"] != _fingerprint(examples):
            raise CheckpointError("use the teacher's states", subject=path, got="those of other texts", hint="Delete that file, or name another one.")
        self.layers, self.width = facts["layers"], facts["width"]
        self.per_token = self.layers * self.width * _BYTES
        self.starts = [0]
        for example in examples:
            self.starts.append(self.starts[-1] + len(example))
        size = path.stat().st_size
        if size != self.starts[-1] * self.per_token:
            raise CheckpointError("use the teacher's states", subject=path, got=f"{size:,} bytes", expected=f"{self.starts[-1] * self.per_token:,}")
        self.file = open(path, "rb")  # noqa: SIM115  (read until the process ends)

    def of(self, indices: Sequence[int]) -> Tensor:
        """The states of these texts' tokens one after the other, (tokens, layers, d)."""
        parts = []
        for index in indices:
            start, end = (position * self.per_token for position in self.starts[index : index + 2])
            parts.append(torch.frombuffer(bytearray(os.pread(self.file.fileno(), end - start, start)), dtype=torch.bfloat16))
        return torch.cat(parts).view(-1, self.layers, self.width)


def write_teacher_states(
    path: Path,
    states: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    teacher: nn.Module,
    examples: Sequence[Sequence[int]],
    pad_id: int,
    progress: Any = iter,
) -> None:
    """Runs the teacher over all texts and writes what `TeacherStates` reads; nothing is left at `path` unless all of it was written.

    Args:
        states: the hidden states (texts, length, d) of every layer that is compared, for a batch of model inputs.
        progress: wraps the iteration over batches.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    device = next(teacher.parameters()).device
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example))
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    partial = path.with_name(f".{path.name}.partial")
    layers = width = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            for first in progress(range(0, len(examples), _BATCH)):
                chosen = by_length[first : first + _BATCH]
                batch = {name: value.to(device) for name, value in pad([examples[index] for index in chosen], pad_id).items()}
                block = torch.stack([state.to(torch.bfloat16) for state in states(batch)], 2).cpu()  # (texts, length, layers, d)
                layers, width = block.shape[2:]
                for row, index in enumerate(chosen):
                    file.seek(starts[index] * layers * width * _BYTES)
                    file.write(block[row, : len(examples[index])].contiguous().view(torch.uint8).numpy().tobytes())
        replace_file(_facts_path(path), json.dumps({"texts": _fingerprint(examples), "layers": layers, "width": width}))
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            "write the teacher's states", subject=path, got=reason(error), hint=f"They take {starts[-1] * max(1, layers * width) * _BYTES / 2**30:.1f} GiB."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def remove_teacher_states(path: Path) -> None:
    """Deletes the two files, if they are there."""
    for each in (path, _facts_path(path)):
        each.unlink(missing_ok=True)


def _facts_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(_facts_path(path).read_text(encoding="utf-8"))
        return {name: facts[name] for name in ("texts", "layers", "width")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("use the teacher's states", subject=path, got=reason(error), hint="Delete that file; it is made anew.") from error


def _fingerprint(examples: Sequence[Sequence[int]]) -> list[int]:
    checksum = 0
    for example in examples:
        checksum = zlib.crc32(str(list(example)).encode(), checksum)
    return [len(examples), checksum]
