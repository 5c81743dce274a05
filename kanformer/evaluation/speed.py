"""How fast the models run, and how much memory it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kanformer.evaluation.texts import Batch

_WARM_UP = 2


@torch.no_grad()
def tokens_per_second(models: Mapping[str, nn.Module], batches: Sequence[Batch], rounds: int, after: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median over `rounds` batches of tokens (no padding) per second, forward only, the models taking turns on each batch.

    Each model runs two batches more before, to warm up. The batches are used again where there are fewer than rounds; they and the models lie on one device.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + _WARM_UP):
        batch = batches[turn % len(batches)]
        names = list(models) if turn % 2 else list(models)[::-1]
        for name in names:
            seconds = _seconds(models[name], batch)
            after()
            if turn >= _WARM_UP:
                found[name].append(batch.tokens / seconds)
    return {name: statistics.median(rates) for name, rates in found.items()}


def _seconds(model: nn.Module, batch: Batch) -> float:
    _wait(batch)
    started = time.perf_counter()
    model(**batch.inputs)
    _wait(batch)
    return time.perf_counter() - started


def _wait(batch: Batch) -> None:
    """To the end of what was launched on a GPU."""
    if batch.targets.is_cuda:
        torch.cuda.synchronize(batch.targets.device)


class PeakMemory:
    """On a GPU the most that torch had allocated there; on a CPU the process' largest resident size of those that `look` saw. All models lie in it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.largest = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self, *_: Any) -> None:
        """Call it often: between two looks a CPU's memory may rise and fall unseen."""
        if self.device.type == "cuda":
            self.largest = torch.cuda.max_memory_allocated(self.device)
        else:
            import psutil

            self.largest = max(self.largest, psutil.Process().memory_info().rss)

    def result(self) -> dict[str, Any]:
        kind = "torch.cuda.max_memory_allocated" if self.device.type == "cuda" else "largest resident size between batches"
        return {"bytes": self.largest, "kind": kind}
