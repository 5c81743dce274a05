"""How much memory a collection will take, known before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.contexts import BINS, SAMPLE
from kanformer.interpret.scoring.table import DEFAULT_RANKS
from kanformer.layers import EdgeFunctions, KANFeedForward

_HISTOGRAM = 256 * 16  # bytes per channel, see conversion.histogram
GIB = 2**30


@dataclass(frozen=True)
class MapCost:
    """Bytes of one map: `passing` while data stream (sums per edge and per channel), `kept` in the result (scores per edge, contexts, histograms)."""

    path: str
    map: str
    edges: int
    passing: int
    kept: int


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_collection` gives; `print` it. Activations of the model itself are not in it: they depend on the batches."""

    maps: tuple[MapCost, ...]
    available: int | None

    @property
    def edges(self) -> int:
        return sum(one.edges for one in self.maps)

    @property
    def bytes(self) -> int:
        """At most at one time: all sums, and the scores of the maps that are done (a map's sums are freed when its scores are made)."""
        freed, kept, peak = 0, 0, 0
        everything = sum(one.passing for one in self.maps)
        for one in self.maps:
            kept += one.kept
            peak = max(peak, everything - freed + kept)
            freed += one.passing
        return peak

    def check(self) -> None:
        """Raises ConfigError where it does not fit."""
        if self.available is not None and self.bytes > self.available:
            raise ConfigError(
                "collect edge scores",
                got=f"{self.edges:,} edges, which need {self.bytes / GIB:.2f} GiB",
                expected=f"at most {self.available / GIB:.2f} GiB",
                hint="Keep only the first of each map (top=10_000; blocks in turns), ask for fewer scores or some layers (layers=[0, 1]), or give max_memory=.",
            )

    def __str__(self) -> str:
        from kanformer.surgery.tables import table

        rows = [[one.path or "(model)", one.map, f"{one.edges:,}", f"{one.passing / 2**20:,.1f}", f"{one.kept / 2**20:,.1f}"] for one in self.maps]
        text = table(["block", "map", "edges", "MiB in the pass", "MiB kept"], rows, right=(2, 3, 4))
        limit = "" if self.available is None else f" of {self.available / GIB:.2f} GiB"
        return f"{text}\n{self.edges:,} edges, at most {self.bytes / GIB:.2f} GiB{limit} besides the model and its activations"


def plan_collection(blocks: Mapping[str, KANFeedForward], scores: Collection[str], contexts: int, top: int | None, max_memory: int | None) -> MemoryPlan:
    """What collecting will take from these blocks; `max_memory` in bytes, None means what the machine has free."""
    maps = []
    for path, block in blocks.items():
        for name, module in block.spline_modules():
            channels, members = module.grid_channels, module.basis.n_basis + 3
            shared = isinstance(module, EdgeFunctions)
            edges = channels * (block.in_features if shared else module.out_features)
            size = torch.promote_types(module.kan_coef.dtype, torch.float32).itemsize
            per_channel = _HISTOGRAM + (8 * members**2 if scores else 0)
            samples = channels * (SAMPLE * 4 + 2 * contexts * 16) if contexts else 0
            pairs = 8 * module.groups * (channels // module.groups + 1) ** 2 if shared and "effect" in scores else 0
            tables = ("share" in scores) + ("effect1" in scores or "effect" in scores) + 2 * ("effect" in scores)
            kept = len(scores) * size * (edges if top is None else min(top, edges)) + channels * (per_channel + contexts * (2 + BINS) * 12)
            maps.append(MapCost(path, "kan_down" if shared else name, edges, edges * tables * size + channels * per_channel + samples + pairs, kept))
    return MemoryPlan(tuple(maps), max_memory if max_memory is not None else _available(blocks))


def plan_turns(
    blocks: Mapping[str, KANFeedForward], scores: Collection[str], contexts: int, top: int | None, max_memory: int | None
) -> list[dict[str, KANFeedForward]]:
    """The blocks of each pass: all in one where everything is kept, else as many at a time as fit.

    Raises:
        ConfigError: they do not fit, or with `top` a single block does not.
    """
    plan = plan_collection(blocks, scores, contexts, None, max_memory)
    if top is None or not scores:
        plan.check()
        return [dict(blocks)]
    if not set(DEFAULT_RANKS) & set(scores):
        raise ConfigError("keep the first edges", got=f"scores={tuple(scores)}", expected=f"one of {', '.join(DEFAULT_RANKS)} among them, to rank by")
    kept = sum(one.kept for one in plan_collection(blocks, scores, contexts, top, max_memory).maps)
    room = None if plan.available is None else plan.available - kept
    turns: list[dict[str, KANFeedForward]] = []
    for path, block in blocks.items():
        both = {**turns[-1], path: block} if turns else {path: block}
        if turns and (room is None or plan_collection(both, scores, contexts, None, room).bytes <= room):
            turns[-1] = both
        else:
            plan_collection({path: block}, scores, contexts, None, room).check()
            turns.append({path: block})
    return turns


def _available(blocks: Mapping[str, KANFeedForward]) -> int | None:
    """Bytes that are free where the sums will lie, less a tenth."""
    device = next((parameter.device for block in blocks.values() for parameter in block.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    import psutil

    return int(0.9 * psutil.virtual_memory().available)
