"""What is written down while training: metrics.jsonl, a line per report, and the same to the trackers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from kanformer.errors import CheckpointError
from kanformer.surgery.folders import reason, replace_file


class Journal:
    """metrics.jsonl in a run's folder, written by the main process only."""

    def __init__(self, output_dir: Path, accelerator: Any) -> None:
        self.path, self.accelerator = output_dir / "metrics.jsonl", accelerator

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line.

        Raises:
            CheckpointError: the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError("write the metrics", subject=self.path, got=reason(error), hint="Free some space and go on by --resume.") from error
        self.accelerator.log(values, step=step)

    def cut(self, step: int, finished: bool) -> None:
        """After a resume the lines of steps that will run again are dropped, so that the file is one curve; a finished run is evaluated again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if step and _step_of(line) <= step]
        if finished:
            kept = [line for line in kept if _step_of(line) < step or "eval_" not in line]
        replace_file(self.path, "".join(line + "\n" for line in kept))


class Window:
    """Means since the last line of metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.tokens, self.started = 0.0, 0, time.time()

    def add(self, loss: float, metrics: dict[str, float], count: float, tokens: int) -> None:
        """Takes a step in: its summed loss and metrics, and the items that they are summed over."""
        for name, value in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count, self.tokens = self.count + count, self.tokens + tokens

    def state(self) -> tuple[dict[str, float], float]:
        """What a checkpoint keeps, so that the next line is the same after a resume; the speed is measured anew."""
        return self.sums, self.count

    def tokens_per_second(self) -> float:
        return self.tokens / max(time.time() - self.started, 1e-9)

    def summary(self) -> dict[str, float]:
        return {**{name: value / self.count for name, value in self.sums.items()}, "tokens_per_second": round(self.tokens_per_second(), 1)}


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 1 << 62  # a line cut by a crash
